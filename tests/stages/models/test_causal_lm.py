"""A model in parts is the model as a whole, whatever the family."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import ModelSource
from layerwise.stages.models.causal_lm import CausalLM, Unit, select_units

QKV, UP = "self_attn.q_proj+k_proj+v_proj", "mlp.gate_proj+up_proj"
GATED = {
    "self_attn.q_proj": QKV, "self_attn.k_proj": QKV, "self_attn.v_proj": QKV, "self_attn.o_proj": None,
    "mlp.gate_proj": UP, "mlp.up_proj": UP, "mlp.down_proj": None,
}  # fmt: skip
KINDS: dict[str, dict[str, str | None]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2"), GATED),
    "opt": {
        "self_attn.k_proj": QKV, "self_attn.v_proj": QKV, "self_attn.q_proj": QKV, "self_attn.out_proj": None,
        "fc1": None, "fc2": None,
    },
    "gpt2": dict.fromkeys(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "phi3": dict.fromkeys(("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")),
}  # fmt: skip
"""What the published architectures hold: the linear layers of a block, and with which an engine fuses them."""


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 24), (3, 16), (2, 1)])
def test_embedding_blocks_and_head_give_the_plain_logits_bit_for_bit(
    load_model: Callable[[str], Any], family: str, shape: tuple[int, int]
) -> None:
    lm = load_model(family)
    ids = random_ids(*shape)
    stream = lm.embed(ids)
    hidden = stream.hidden
    for index in range(len(lm.blocks)):
        hidden = lm.run_block(index, hidden, stream)
    with torch.no_grad():
        plain = lm.model(input_ids=ids).logits
    assert torch.equal(lm.head(hidden, stream), plain)
    assert torch.equal(lm.logits(ids), plain)
    assert not any("forward" in vars(block) for block in lm.blocks), "the blocks are themselves again"


def test_a_stream_of_several_batches_does_not_mix_them_up(load_model: Callable[[str], Any], family: str) -> None:
    lm = load_model(family)
    batches = [random_ids(2, 12, 1), random_ids(1, 20, 2)]
    streams = [lm.embed(ids) for ids in batches]
    states = [stream.hidden for stream in streams]
    for index in range(len(lm.blocks)):
        states = [lm.run_block(index, state, stream) for state, stream in zip(states, streams, strict=True)]
    for ids, state, stream in zip(batches, states, streams, strict=True):
        assert torch.equal(lm.head(state, stream), lm.logits(ids))


def test_masks_that_differ_from_block_to_block_are_kept_apart(load_model: Callable[[str], Any]) -> None:
    lm = load_model("gemma2")
    kinds = lm.model.config.layer_types
    assert kinds[:2] == ["sliding_attention", "full_attention"]
    masks = [kwargs["attention_mask"] for _, kwargs in lm.embed(random_ids(1, 24)).calls]
    assert all(masks[a] is not None or masks[b] is not None for a, b in [(0, 1), (1, 2)])
    assert not (masks[0] is masks[1] or (None not in masks[:2] and torch.equal(masks[0], masks[1])))


def test_the_units_are_the_linear_layers_of_the_blocks_in_their_order(
    load_model: Callable[[str], Any], family: str
) -> None:
    lm = load_model(family)
    expected = [(index, kind) for index in range(len(lm.blocks)) for kind in KINDS[family]]
    assert [(unit.block, unit.kind) for unit in lm.units] == expected
    for unit in lm.units:
        assert unit.name == f"{lm.block_path}.{unit.block}.{unit.kind}"
        assert unit.group == (KINDS[family][unit.kind] and f"{unit.block}.{KINDS[family][unit.kind]}")
        assert unit.transposed == (family == "gpt2")
        assert unit.n_weights == lm.weight(unit).numel()


def test_a_unit_multiplies_its_input_by_its_weight_as_out_by_in(load_model: Callable[[str], Any], family: str) -> None:
    lm = load_model(family)
    generator = torch.Generator().manual_seed(0)
    for unit in lm.units[: len(KINDS[family])]:
        module, weight = lm.module(unit.name), lm.weight(unit)
        W = weight.T if unit.transposed else weight
        assert W.shape == unit.shape
        X = torch.randn(5, unit.shape[1], generator=generator)
        expected = X.double() @ W.double().T + (0 if module.bias is None else module.bias.double())
        torch.testing.assert_close(module(X).double(), expected, rtol=1e-5, atol=1e-5)  # float32 sums of 40


def test_a_loaded_model_is_frozen_and_evaluates(load_model: Callable[[str], Any]) -> None:
    lm = load_model("opt")  # has dropout
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


# --- choosing units ---

UNITS = [
    Unit(f"model.layers.{block}.{kind}", kind, block, (4, 4), False, None)
    for block in (0, 1, 10)
    for kind in ("self_attn.q_proj", "mlp.down_proj")
]


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        ([], [], [0, 1, 2, 3, 4, 5]),
        (["mlp.down_proj"], [], [1, 3, 5]),
        (["model.layers.1.mlp.down_proj"], [], [3]),
        (["re:model\\.layers\\.1\\."], [], [2, 3]),
        (["re:layers"], ["self_attn.q_proj"], None),  # a pattern matches from the start
        (["re:.*q_proj", "mlp.down_proj"], ["re:.*\\.10\\."], [0, 1, 2, 3]),
        ([], ["self_attn.q_proj", "mlp.down_proj"], None),
        (["down_proj"], [], None),
    ],
)
def test_units_are_chosen_by_name_kind_or_pattern(
    targets: list[str], ignore: list[str], expected: list[int] | None
) -> None:
    if expected is None:
        with pytest.raises(UnsupportedModel, match="no unit is left") as caught:
            select_units(UNITS, targets, ignore)
        assert caught.value.hint is not None
        assert "model.layers.0.self_attn.q_proj" in caught.value.hint
    else:
        assert select_units(UNITS, targets, ignore) == [UNITS[number] for number in expected]


# --- what it cannot take ---


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=re.escape(str(tmp_path / "nothing"))):
        CausalLM.load(ModelSource(tmp_path / "nothing"))


def test_a_missing_weight_is_named(model_folder: Callable[[str], Path], edited_model: Callable[..., Path]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = edited_model(model_folder("llama"), lambda tensors: tensors.pop(name))
    with pytest.raises(UnsupportedModel, match=f"1 weights are missing .*{re.escape(name)}"):
        CausalLM.load(ModelSource(folder))


def test_a_weight_of_another_shape_is_refused(
    model_folder: Callable[[str], Path], edited_model: Callable[..., Path]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = edited_model(model_folder("llama"), lambda tensors: tensors.update({name: torch.zeros(7, 32)}))
    with pytest.raises(UnsupportedModel, match=re.escape(str(folder))):
        CausalLM.load(ModelSource(folder))


def test_a_folder_without_weights_is_refused(
    model_folder: Callable[[str], Path], edited_model: Callable[..., Path]
) -> None:
    folder = edited_model(model_folder("llama"), lambda tensors: None)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match="cannot load"):
        CausalLM.load(ModelSource(folder))


def test_a_truncated_weight_file_is_refused(
    model_folder: Callable[[str], Path], edited_model: Callable[..., Path]
) -> None:
    folder = edited_model(model_folder("llama"), lambda tensors: None)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UnsupportedModel, match="cannot load"):
        CausalLM.load(ModelSource(folder))


def test_an_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    with pytest.raises(UnsupportedModel, match="cannot load"):
        CausalLM.load(ModelSource(tmp_path))


def test_a_model_without_a_list_of_equal_blocks_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            text = SimpleNamespace(num_hidden_layers=2)
            self.config = SimpleNamespace(get_text_config=lambda: text)
            self.layers = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
            self.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])

    with pytest.raises(UnsupportedModel, match="Odd: no ModuleList of 2 equal blocks"):
        CausalLM(Odd())
