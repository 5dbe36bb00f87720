"""What a network is made of: units, half-blocks and blocks, found without a line for each family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, pad, silu, softmax

from layerwise.stages.models.causal_lm import CausalLM
from layerwise.stages.models.inputs import observed

QKV, UP = "self_attn.q_proj+k_proj+v_proj", "mlp.gate_proj+up_proj"
ATTENTION = {"self_attn.q_proj": QKV, "self_attn.k_proj": QKV, "self_attn.v_proj": QKV, "self_attn.o_proj": None}
GATED = {**ATTENTION, "mlp.gate_proj": UP, "mlp.up_proj": UP, "mlp.down_proj": None}
EXPERTS = {**ATTENTION, "mlp.gate": None, "mlp.experts.gate_up_proj": None, "mlp.experts.down_proj": None}
KINDS: dict[str, dict[str, str | None]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2"), GATED),
    "opt": {
        "self_attn.k_proj": QKV, "self_attn.v_proj": QKV, "self_attn.q_proj": QKV, "self_attn.out_proj": None,
        "fc1": None, "fc2": None,
    },
    "gpt2": dict.fromkeys(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "phi3": dict.fromkeys(("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    **dict.fromkeys(("mixtral", "qwen3moe", "olmoe"), EXPERTS),
    "granitemoe": {
        kind.replace("mlp.gate", "mlp.router").replace("mlp.", "block_sparse_moe."): group
        for kind, group in {**ATTENTION, "mlp.gate": None}.items()
    } | dict.fromkeys(("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj")),
    "gptj": {
        "attn.q_proj": "attn.q_proj+k_proj+v_proj", "attn.k_proj": "attn.q_proj+k_proj+v_proj",
        "attn.v_proj": "attn.q_proj+k_proj+v_proj", "attn.out_proj": None, "mlp.fc_in": None, "mlp.fc_out": None,
    },
    "bloom": dict.fromkeys((
        "self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
    )),
}  # fmt: skip
"""What the published architectures hold: the weights of a block, and with which an engine fuses them."""

POSITIONS = {"gpt2": ["transformer.wpe.weight"], "opt": ["model.decoder.embed_positions.weight"]}
"""Embeddings of positions: added, not multiplied."""

TIED = {"qwen3", "gemma2", "opt", "gpt2", "granitemoe", "bloom"}


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_every_weight_of_two_or_more_dimensions_is_in_exactly_one_unit(
    load_model: Callable[[str], Any], any_family: str
) -> None:
    lm = load_model(any_family)
    matrices = {name: parameter for name, parameter in lm.model.named_parameters() if parameter.dim() >= 2}
    names = {id(parameter): name for name, parameter in matrices.items()}
    seen = {name: torch.zeros(parameter.shape, dtype=torch.int) for name, parameter in matrices.items()}
    for unit in lm.units:
        name = names[id(lm.parameter(unit.view.tensor))]
        unit.view.part(seen[name]).add_(1)
        assert unit.n_weights == unit.view.part(seen[name]).numel()
        assert lm.weight(unit).shape == unit.shape
    for weight in lm.uncovered:
        seen[weight.tensor] += 1
        assert weight.n_weights == matrices[weight.tensor].numel()
        assert weight.reason
    assert all((count == 1).all() for count in seen.values())
    assert [weight.tensor for weight in lm.uncovered] == POSITIONS.get(any_family, [])
    assert len({unit.name for unit in (*lm.units, *lm.parents)}) == len(lm.units) + len(lm.parents)


def test_the_units_are_of_the_published_kinds_block_by_block(load_model: Callable[[str], Any], any_family: str) -> None:
    lm, kinds = load_model(any_family), KINDS[any_family]
    inside = [unit for unit in lm.units if unit.block is not None]
    assert [unit.block for unit in inside] == sorted(unit.block for unit in inside)
    for block in range(3):
        here = [unit for unit in inside if unit.block == block]
        assert {unit.kind for unit in here} == set(kinds)
        for unit in here:
            experts = ".experts." in unit.kind
            stray = unit.kind in ("mlp.gate", "block_sparse_moe.router")
            assert unit.role == ("expert" if experts else "parameter" if stray else "linear")
            assert unit.group == (kinds[unit.kind] and f"{block}.{kinds[unit.kind]}")
            assert unit.positions == (block,)
            assert unit.multiplied
            # Two of the four experts for every token: known from the configuration.
            assert unit.share == (2 / 4 if experts else 1)
            assert unit.view.transposed == (any_family == "gpt2")
            assert unit.replaceable == (unit.role == "linear")
        named = [unit.name for unit in here if ".experts." not in unit.kind]
        assert all(name == f"{lm.block_path}.{block}.{kind}" for name, kind in zip(
            named, [unit.kind for unit in here if ".experts." not in unit.kind], strict=True
        ))  # fmt: skip
        stacked = [unit for unit in here if ".experts." in unit.kind]
        assert [(unit.view.index, unit.name.split(".")[-2]) for unit in stacked] == [
            ((number,), str(number)) for _ in range(len(stacked) // 4) for number in range(4)
        ]


def test_embedding_and_head_are_units_and_one_where_they_are_tied(
    load_model: Callable[[str], Any], any_family: str
) -> None:
    lm = load_model(any_family)
    outside = [unit for unit in lm.units if unit.block is None]
    head = lm.model.get_output_embeddings()
    assert (head.weight is lm.model.get_input_embeddings().weight) == (any_family in TIED)
    if any_family in TIED:
        assert [(unit.role, unit.positions, unit.multiplied) for unit in outside] == [("head", (-1, 3), True)]
        assert lm.units[0] is outside[0], "a tied weight is used first of all"
    else:
        assert [(unit.role, unit.positions, unit.multiplied) for unit in outside] == [
            ("embedding", (-1,), False), ("head", (3,), True),
        ]  # fmt: skip
        assert lm.units[0] is outside[0]
        assert lm.units[-1] is outside[1]
    assert all(torch.equal(lm.weight(unit), head.weight) for unit in outside if unit.role == "head")


# --- what multiplies them ---


def test_a_units_weight_times_its_inputs_is_what_its_module_answers(
    load_model: Callable[[str], Any], any_family: str
) -> None:
    lm = load_model(any_family)
    ids = random_ids(2, 6)
    inputs, answers = {}, {}
    layers = [unit for unit in lm.units if unit.role in ("linear", "head")]
    handles = [
        lm.module(unit.name).register_forward_hook(
            lambda module, args, output, name=unit.name: answers.__setitem__(name, output)
        )
        for unit in layers
    ]
    with observed(lm, lm.units, lambda unit, X, whole: inputs.__setitem__(unit.name, X)):
        lm.logits(ids)
    for handle in handles:
        handle.remove()
    assert not any(module._forward_pre_hooks for module in lm.model.modules()), "hooks are gone"
    assert set(inputs) >= {unit.name for unit in lm.units if unit.multiplied and unit.role != "expert"}
    assert not {unit.name for unit in lm.units if not unit.multiplied} & set(inputs)
    for unit in layers:
        bias = lm.module(unit.name).bias
        expected = inputs[unit.name].double() @ lm.weight(unit).double().T + (0 if bias is None else bias.double())
        answer = answers[unit.name].reshape(-1, unit.shape[0]).double()
        torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)  # float32 sums of up to 128


ROUTING: dict[str, Callable[[Tensor], Tensor]] = {
    "mixtral": lambda logits: softmax(logits, -1) / softmax(logits, -1).topk(2).values.sum(-1, keepdim=True),
    "qwen3moe": lambda logits: softmax(logits, -1),  # norm_topk_prob is off
    "olmoe": lambda logits: softmax(logits, -1),
    "granitemoe": lambda logits: torch.exp(logits) / torch.exp(logits.topk(2).values).sum(-1, keepdim=True),
}
"""Weights of the two chosen experts, from the router's answers; how each architecture makes them."""


def test_an_expert_sees_the_tokens_that_the_router_gives_it_and_no_others(
    load_model: Callable[[str], Any], moe_family: str
) -> None:
    lm = load_model(moe_family)
    units = [unit for unit in lm.units if unit.block == 1]
    feed_forward = next(parent for parent in lm.parents if parent.block == 1 and parent.role == "mlp")
    seen: dict[str, Tensor] = {}
    calls: list[tuple[Tensor, Tensor]] = []
    handle = lm.module(feed_forward.name).register_forward_hook(lambda module, args, out: calls.append((args[0], out)))
    with observed(lm, units, lambda unit, X, whole: seen.__setitem__(unit.name, X)):
        lm.logits(random_ids(2, 10))
    handle.remove()

    ((hidden, answer),) = calls
    x = hidden.reshape(-1, 32).double()
    (router,) = [unit for unit in units if unit.role == "parameter"]
    assert torch.equal(seen[router.name].double(), x)
    logits = x @ lm.weight(router).double().T
    weights, chosen = ROUTING[moe_family](logits), logits.topk(2).indices
    total = torch.zeros_like(x)
    for number in range(4):
        tokens = (chosen == number).T.nonzero()[:, 1]  # those of which it is the first choice come first
        up, down = (
            next(unit for unit in units if unit.view.index == (number,) and unit.kind.endswith(kind))
            for kind in ("gate_up_proj", "down_proj")
        )
        assert torch.equal(seen[up.name].double(), x[tokens])
        gate, value = (x[tokens] @ lm.weight(up).double().T).chunk(2, -1)
        inner = silu(gate) * value
        torch.testing.assert_close(seen[down.name].double(), inner, rtol=1e-4, atol=1e-5)  # float32 sums of 32
        total[tokens] += weights[tokens, number, None] * (inner @ lm.weight(down).double().T)
    factor = getattr(lm.module(feed_forward.name), "residual_multiplier", 1)
    torch.testing.assert_close(answer.reshape(-1, 32).double(), factor * total, rtol=1e-4, atol=1e-5)


class Convolving(nn.Module):
    """A block of causal convolutions over the positions, one in groups and one over an image of all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Conv1d(8, 8, 3, dilation=2)
        self.parted = nn.Conv1d(8, 8, 3, groups=4)
        self.image = nn.Conv2d(1, 1, (1, 3), padding=(0, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.transpose(1, 2)
        mixed = self.whole(pad(x, (4, 0))) + self.parted(pad(x, (2, 0)))
        return hidden + mixed.transpose(1, 2) + self.image(hidden[:, None])[:, 0]


class ConvolvingModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        text = SimpleNamespace(num_hidden_layers=1, vocab_size=8)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.embedding = nn.Embedding(8, 8)
        self.layers = nn.ModuleList([Convolving()])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=hidden @ self.embedding.weight.T)


def test_a_convolution_is_a_matrix_over_patches_and_one_in_groups_several() -> None:
    torch.manual_seed(0)
    lm = CausalLM(ConvolvingModel())
    units = {unit.kind: unit for unit in lm.units}
    assert all(unit.role == "conv" and unit.multiplied for unit in units.values())
    assert {kind: (unit.shape, unit.groups) for kind, unit in units.items()} == {
        "whole": ((8, 24), 1), "parted": ((8, 6), 4), "image": ((1, 3), 1),
    }  # fmt: skip
    assert not any(unit.replaceable for unit in lm.units)
    seen: dict[str, Tensor] = {}
    stream = lm.begin(torch.arange(14).reshape(2, 7) % 8)
    with observed(lm, lm.units, lambda unit, X, whole: seen.__setitem__(unit.kind, X)):
        lm.run_block(0, stream.hidden, stream)
    assert set(seen) == {"whole", "parted", "image"}
    block = lm.blocks[0]
    x = pad(stream.hidden.transpose(1, 2), (4, 0))
    expected = conv1d(x, block.whole.weight, dilation=2).transpose(1, 2).reshape(-1, 8)
    torch.testing.assert_close(seen["whole"] @ lm.weight(units["whole"]).T, expected, rtol=1e-5, atol=1e-6)
    expected = conv2d(stream.hidden[:, None], block.image.weight, padding=(0, 1)).reshape(-1, 1)
    torch.testing.assert_close(seen["image"] @ lm.weight(units["image"]).T, expected, rtol=1e-5, atol=1e-6)


# --- half-blocks and blocks ---


class Averaging(nn.Module):
    """Attention of the plainest kind: the mean of what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.proj(hidden.cumsum(1) / torch.arange(1, 1 + hidden.shape[1])[:, None])


class InPlace(nn.Module):
    """A block whose halves stand side by side; one answer is added to the other in place, as Falcon's does it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Averaging(), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        attended, answer = self.attention(hidden), self.mlp(hidden)
        answer += attended
        return hidden + answer


def test_an_answer_that_is_changed_in_place_is_seen_as_it_was_given() -> None:
    torch.manual_seed(0)
    model = ConvolvingModel()
    model.layers = nn.ModuleList([InPlace()])
    assert [(parent.kind, parent.role) for parent in CausalLM(model).parents] == [
        ("block", "block"), ("attention", "attention"), ("mlp", "mlp"),
    ]  # fmt: skip


HALVES = {
    "granitemoe": ("self_attn", "block_sparse_moe"),
    "gpt2": ("attn", "mlp"),
    "gptj": ("attn", "mlp"),
    "bloom": (),
}
"""Attention and feed-forward; as in Llama where nothing is said. Those of OPT stand in the block itself, as layers."""

LAST = ("o_proj", "out_proj", "c_proj", "down_proj", "fc2", "fc_out")
"""The last layers of half-blocks: where they answer zero, the half-block adds nothing."""


def test_half_blocks_are_found_by_what_they_do(load_model: Callable[[str], Any], any_family: str) -> None:
    lm = load_model(any_family)
    halves = dict(zip(("attention", "mlp"), HALVES.get(any_family, ("self_attn", "mlp")), strict=False))
    expected = []
    for block in range(3):
        path = f"{lm.block_path}.{block}"
        expected += [(path, "block", None), *((f"{path}.{name}", role, path) for role, name in halves.items())]
    assert [(parent.name, parent.role, parent.parent) for parent in lm.parents] == expected
    assert set(lm.one_piece) == (set() if halves else {0, 1, 2})
    roles = {parent.name: parent.role for parent in lm.parents}
    for unit in lm.units:
        if unit.block is None:
            assert unit.parent is None
        elif not halves:
            assert unit.parent == f"{lm.block_path}.{unit.block}"
        else:
            assert roles[unit.parent] == ("attention" if "attn" in unit.kind else "mlp")


def test_a_half_block_left_out_is_one_whose_last_layer_answers_zero(
    load_model: Callable[[str], Any], any_family: str
) -> None:
    lm, ids = load_model(any_family), random_ids(2, 9)
    stream = lm.begin(ids)
    for half in [parent for parent in lm.parents if parent.role != "block" and parent.block == 1]:
        silent = copy.deepcopy(lm.model)
        for unit in lm.units:
            if unit.parent == half.name and unit.name.endswith(LAST):
                unit.view.part(silent.get_parameter(unit.view.tensor).data).zero_()
                bias = getattr(silent.get_submodule(unit.name), "bias", None) if unit.role == "linear" else None
                if bias is not None:
                    bias.data.zero_()
        with torch.no_grad():
            expected = silent(input_ids=ids, use_cache=False).logits
        hidden = stream.hidden
        with lm.without([half]):
            for index in range(3):
                hidden = lm.run_block(index, hidden, stream)
        torch.testing.assert_close(lm.end(hidden, stream), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, lm.logits(ids), atol=1e-2)
        assert torch.equal(lm.logits(ids), lm.logits(ids))
        gone = CausalLM(copy.deepcopy(lm.model))
        gone.leave_out([half.name])
        torch.testing.assert_close(gone.logits(ids), expected, rtol=1e-5, atol=1e-5)
        assert half.name not in {parent.name for parent in gone.parents} | {unit.parent for unit in gone.units}
        assert {unit.name for unit in lm.units} - {unit.name for unit in gone.units} == {
            unit.name for unit in lm.units if unit.parent == half.name
        }
    assert not any("forward" in vars(module) for module in lm.model.modules()), "all are themselves again"


def test_a_block_left_out_is_a_model_without_it(load_model: Callable[[str], Any], any_family: str) -> None:
    lm, ids = load_model(any_family), random_ids(2, 9)
    shorter = copy.deepcopy(lm.model)
    layers = shorter.get_submodule(lm.block_path)
    del layers[1]
    config = shorter.config.get_text_config()
    if getattr(config, "layer_types", None):
        config.layer_types = [kind for number, kind in enumerate(config.layer_types) if number != 1]
    config.num_hidden_layers = 2
    with torch.no_grad():
        expected = shorter(input_ids=ids, use_cache=False).logits
    gone = CausalLM(copy.deepcopy(lm.model))
    gone.leave_out([f"{lm.block_path}.1"])
    torch.testing.assert_close(gone.logits(ids), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, lm.logits(ids), atol=1e-2)
    assert {parent.block for parent in gone.parents} == {unit.block for unit in gone.units} - {None} == {0, 2}
