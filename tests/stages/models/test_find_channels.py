"""Which rows and columns of a half-block go together: against what the published architectures say, and against a
smaller model that transformers makes itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from layerwise.stages.models.channels import Channels
from layerwise.stages.models.find_channels import channels_of

APART, GATED, PLAIN = (((0, 16),), ((0, 8),), ((0, 8),)), (((0, 1),), ((0, 1),)), (((0, 1),),)
ALONE = (((0, 8),), ((0, 8),), ((0, 8),))
WIDER = (((0, 32),), ((0, 16),), ((0, 16),))
ATTENTION: dict[str, tuple[int, int, tuple[Any, ...]]] = {
    **dict.fromkeys(("llama", "qwen2", "mistral", "mixtral", "granitemoe"), (2, 2, APART)),
    **dict.fromkeys(("qwen3", "gemma2", "qwen3moe"), (2, 2, WIDER)),  # norms of single heads do no harm
    **dict.fromkeys(("opt", "gptj"), (4, 1, ALONE)),
    "gpt2": (4, 1, (((0, 8), (32, 8), (64, 8)),)),  # one weight: all queries, all keys, all values
    "phi3": (2, 2, (((0, 16), (32, 8), (48, 8)),)),
}
"""By family: groups, query heads of each, and where these lie along the rows of each weight that reads the input."""

MLP: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2"), GATED),
    **dict.fromkeys(("opt", "gpt2", "gptj"), PLAIN),
    "phi3": (((0, 1), (40, 1)),),  # gate and up in one weight
}

REFUSED = {
    ("olmoe", "attention"): "look at each other",  # a norm over all heads
    **{(family, "mlp"): "experts and routers" for family in ("mixtral", "qwen3moe", "olmoe", "granitemoe")},
}


def test_heads_and_channels_of_every_family_are_where_its_architecture_has_them(
    load_model: Callable[[str], Any], any_family: str
) -> None:
    lm = load_model(any_family)
    before = {name: tensor.clone() for name, tensor in lm.parameters.items()}
    found = channels_of(lm)
    assert found.keys() == {parent.name for parent in lm.parents if parent.role != "block"}
    for half in (parent for parent in lm.parents if parent.role != "block"):
        one = found[half.name]
        if (any_family, half.role) in REFUSED:
            assert isinstance(one, str)
            assert REFUSED[any_family, half.role] in one
            continue
        assert isinstance(one, Channels), one
        groups, heads, rows = ATTENTION[any_family] if half.role == "attention" else (40, 1, MLP[any_family])
        assert (one.groups, one.heads, tuple(one.rows.values())) == (groups, heads, rows)
        width = lm.weight(next(unit for unit in lm.units if unit.name == one.out)).shape[1]
        assert one.columns == ((0, width // groups),)
        assert Channels.from_json(one.as_json()) == one
    assert all(bool((lm.parameter(name) == tensor).all()) for name, tensor in before.items())


@pytest.mark.parametrize("role", ["attention", "mlp"])
def test_a_weight_that_two_blocks_share_is_refused(load_model: Callable[[str], Any], role: str) -> None:
    import copy

    from layerwise.stages.models.causal_lm import CausalLM

    model = copy.deepcopy(load_model("llama").model)
    first, second = model.model.layers[0], model.model.layers[1]
    if role == "attention":
        second.self_attn.v_proj.weight = first.self_attn.v_proj.weight
    else:
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
    lm = CausalLM(model)
    half = next(parent for parent in lm.parents if parent.role == role and parent.block == 1)
    found = channels_of(lm)[half.name]
    assert isinstance(found, str)
    assert "is shared with another part of the model" in found
