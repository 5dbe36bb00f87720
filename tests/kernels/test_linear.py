"""Layers on packed weights: they stand where linear ones stood, and say what the decoded weights say."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layerwise.errors import UsageError
from layerwise.kernels import linear
from layerwise.kernels.backends import Work, prepare
from layerwise.kernels.dense import Dense
from layerwise.kernels.device import processor
from layerwise.kernels.linear import PackedLinear, replace_linears
from layerwise.kernels.packed import Packed
from layerwise.kernels.quantized import Quantized

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))


def quantized(n: int, k: int, *, bits: int = 4, group_size: int = 32, seed: int = 0, sym: bool = False) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-k // group_size)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = (torch.rand((n, groups), generator=generator) * 0.02 + 0.005).half()
    zero = None if sym else torch.randint(0, 2**bits, (n, groups), generator=generator, dtype=torch.uint8)
    return Quantized.pack(codes, scale, zero, bits=bits, group_size=group_size)


def always(backend: str) -> Callable[[Packed, Work], str]:
    return lambda packed, work: backend


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 5, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_layer_of_the_dense_weight(shape: tuple[int, ...], bias: bool) -> None:
    packed, x = quantized(24, 40), inputs(*shape)
    offset = torch.linspace(-1, 1, 24) if bias else None
    expected = x.double() @ packed.dense().double().T + (0 if offset is None else offset.double())
    y = PackedLinear(packed, offset)(x)
    assert y.shape == expected.shape
    assert torch.allclose(y.double(), expected, rtol=0, atol=40 * 2**-24 * 4)  # sums of 40 terms of size 1 in float32


def test_rows_that_are_not_contiguous_are_taken() -> None:
    packed, x = quantized(24, 40), inputs(40, 6).T
    expected = x.double() @ packed.dense().double().T
    assert torch.allclose(PackedLinear(packed)(x).double(), expected, rtol=0, atol=40 * 2**-24 * 4)  # as above


def test_the_backend_is_asked_once_for_each_number_of_rows_and_prepared_once() -> None:
    asked: list[int] = []

    def choose(packed: Packed, work: Work) -> str:
        asked.append(work.m)
        return "matmul" if work.m > 2 else "linear"

    layer = PackedLinear(quantized(24, 40), choose=choose)
    for rows in (1, 2, 4, 1, 5, 4, 2):
        layer(inputs(rows, 40))
    assert asked == [1, 2, 4, 5]
    assert len(layer._functions) == 2


def test_a_backend_for_a_number_of_rows_is_prepared_for_each_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []

    def watched(name: str, packed: Packed, work: Work) -> Callable[[Tensor], Tensor]:
        prepared.append(work.m)
        return prepare(name, packed, work)

    monkeypatch.setattr(linear, "prepare", watched)
    packed = quantized(24, 40)
    layer = PackedLinear(packed, choose=lambda packed, work: "onednn" if work.m < 9 else "linear")
    for rows in (9, 1, 2, 1, 3, 4, 2, 5, 10, 5, 1):
        x = inputs(rows, 40)
        assert torch.allclose(layer(x), x @ packed.dense().T, atol=1e-5)
    assert prepared == [9, 1, 2, 3, 4, 2, 5, 1]
    assert [key[:2] for key in layer._functions] == [("linear", None), *(("onednn", rows) for rows in (5, 1))]


def test_choices_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MAX_CHOICES", 3)
    layer = PackedLinear(quantized(24, 40))
    for rows in range(1, 10):
        layer(inputs(rows, 40))
    assert [rows for rows, _, _ in layer._chosen] == [7, 8, 9]
    assert len(layer._functions) == 1


def test_a_backend_that_cannot_take_the_weight_says_so() -> None:
    layer = PackedLinear(quantized(24, 40, bits=3), choose=always("int8_dynamic"))
    with pytest.raises(UsageError, match="int8_dynamic cannot take int3-g32-asym of 24 x 40"):
        layer(inputs(1, 40))


def test_it_prints_what_it_holds() -> None:
    assert "in_features=40, out_features=24, bias=False, int4-g32-asym" in repr(PackedLinear(quantized(24, 40)))


# --- saving, loading, moving ---


def test_its_state_is_the_packed_tensors_and_loads_through_safetensors(tmp_path: Path) -> None:
    packed, offset = quantized(24, 40), torch.linspace(-1, 1, 24)
    first = PackedLinear(packed, offset)
    x = inputs(3, 40)
    y = first(x)
    state = first.state_dict()
    assert set(state) == {"words", "scale", "zero", "bias"}
    save_file(state, tmp_path / "layer.safetensors")
    second = PackedLinear(quantized(24, 40, seed=5), torch.zeros(24))
    assert not torch.equal(second(x), y)
    second.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(second(x), y), "what was made from the old weight must be gone"
    assert torch.equal(second.packed.dense(), packed.dense())


def test_a_part_of_a_packed_weight_has_its_own_names() -> None:
    from layerwise.kernels.low_rank import LowRank

    base = quantized(24, 40)
    packed = LowRank((24, 40), A=inputs(2, 40).half(), B=inputs(24, 2).half(), base=base)
    layer = PackedLinear(packed)
    assert {"A", "B", "base__words", "base__scale", "base__zero"} == set(layer.state_dict())
    assert torch.equal(layer.packed.dense(), packed.dense())
    assert torch.allclose(layer(inputs(3, 40)), inputs(3, 40) @ packed.dense().T, atol=1e-5)


@pytest.mark.parametrize("send", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_carries_the_weight_and_not_what_a_backend_made_of_it(send: Callable[[Any], Any]) -> None:
    layer = PackedLinear(quantized(24, 40, bits=8, group_size=-1, sym=True))
    y = layer(inputs(3, 40))
    assert layer._functions
    sent = send(layer)
    assert not sent._functions
    assert torch.equal(sent(inputs(3, 40)), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_keeps_the_packed_weight_as_it_is(dtype: torch.dtype) -> None:
    packed = quantized(24, 40)
    model = nn.Sequential(PackedLinear(packed, torch.zeros(24))).to(dtype)
    assert {name: tensor.dtype for name, tensor in model[0].packed.tensors.items()} == {
        "words": torch.int16, "scale": torch.float16, "zero": torch.uint8,
    }  # fmt: skip
    assert torch.equal(model[0].packed.dense(), packed.dense())
    assert model(inputs(3, 40, dtype=dtype)).dtype == dtype


def test_moving_it_moves_the_packed_weight() -> None:
    layer = PackedLinear(quantized(24, 40)).to("meta")
    assert {tensor.device.type for tensor in layer.packed.tensors.values()} == {"meta"}


# --- in a model ---


def tiny(family: str) -> nn.Module:
    """A random model with weights large enough that quantizing them changes what it says."""
    import transformers

    sizes = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    llama = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    gpt2 = {"n_embd": 32, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = {"llama": ("LlamaConfig", llama), "gpt2": ("GPT2Config", gpt2)}[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config[0])(**sizes, **config[1]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15, generator=torch.Generator().manual_seed(parameter.numel()))
    return model.eval().requires_grad_(False)


def blocks_linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Shape (out, in) of every linear layer inside the blocks."""
    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            found[name] = tuple(module.weight.shape)[::-1]
        elif isinstance(module, nn.Linear) and "lm_head" not in name:
            found[name] = tuple(module.weight.shape)
    return found


def packed_and_decoded(
    family: str, *, bits: int = 4, group_size: int = 32, sym: bool = False
) -> tuple[Any, Any, dict[str, Packed]]:
    """The model to be packed, the same with the decoded weights in it, and the packed weights."""
    model, decoded = tiny(family), tiny(family)
    weights: dict[str, Packed] = {
        name: quantized(n, k, bits=bits, group_size=group_size, sym=sym, seed=seed)
        for seed, (name, (n, k)) in enumerate(blocks_linears(model).items())
    }
    for name, packed in weights.items():
        layer = decoded.get_submodule(name)
        layer.weight.data = packed.dense().T if type(layer).__name__ == "Conv1D" else packed.dense()
    return model, decoded, weights


@pytest.mark.parametrize("backend", ["linear", "matmul", "mkl", "onednn"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_on_packed_weights_says_what_the_decoded_weights_say(family: str, backend: str) -> None:
    model, decoded, weights = packed_and_decoded(family)
    with torch.no_grad():
        before, expected = model(input_ids=IDS).logits, decoded(input_ids=IDS).logits
        found = replace_linears(model, weights, always(backend))(input_ids=IDS).logits
    assert len([layer for layer in model.modules() if isinstance(layer, PackedLinear)]) == len(weights) > 6
    assert torch.allclose(found, expected, rtol=0, atol=float(1e-4 * expected.abs().max()))  # float32, ten layers deep
    assert not torch.allclose(before, expected, rtol=0, atol=float(0.1 * expected.abs().max()))


@pytest.mark.parametrize(("backend", "bits", "group_size"), [("int4pack", 4, 32), ("int8_dynamic", 8, -1)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_kernels_that_round_activations_stay_within_a_few_percent(
    family: str, backend: str, bits: int, group_size: int
) -> None:
    model, decoded, weights = packed_and_decoded(family, bits=bits, group_size=group_size, sym=True)
    with torch.no_grad():
        expected = decoded(input_ids=IDS).logits
        found = replace_linears(model, weights, always(backend))(input_ids=IDS).logits
    # 8 bits of mantissa, or of an activation's range; of that one bit less on a processor without VNNI.
    bound = 0.05 if backend == "int4pack" or any("vnni" in feature for feature in processor()[1]) else 0.1
    assert 0 < (found - expected).norm() / expected.norm() < bound


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_packed_model_generates_what_the_decoded_one_generates(family: str) -> None:
    model, decoded, weights = packed_and_decoded(family)
    replace_linears(model, weights)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **settings), decoded.generate(IDS, **settings))


def test_a_whole_model_saves_and_loads_its_packed_state(tmp_path: Path) -> None:
    model, _, weights = packed_and_decoded("gpt2")
    replace_linears(model, weights)
    tied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tied, tmp_path / "model.safetensors")
    other, _, wrong = packed_and_decoded("gpt2", bits=4)
    replace_linears(other, {name: Dense(weight.shape, torch.zeros(weight.shape)) for name, weight in wrong.items()})
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    again, _, zeros = packed_and_decoded("gpt2")
    blank = {name: quantized(*weight.shape, seed=99) for name, weight in zeros.items()}
    replace_linears(again, blank).load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [
        ("model.layers.9.mlp", (4, 4), "the model has no layer model.layers.9.mlp"),
        ("model.layers.0.mlp", (4, 4), "model.layers.0.mlp is a LlamaMLP, not a linear layer"),
        ("model.layers.0.mlp.up_proj", (32, 40), "up_proj is 40 x 32, the packed weight 32 x 40"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_replaced(name: str, shape: tuple[int, int], complaint: str) -> None:
    model = tiny("llama")
    fitting = quantized(*blocks_linears(model)["model.layers.0.mlp.gate_proj"])
    with pytest.raises(UsageError, match=complaint):
        replace_linears(model, {"model.layers.0.mlp.gate_proj": fitting, name: quantized(*shape)})
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())
