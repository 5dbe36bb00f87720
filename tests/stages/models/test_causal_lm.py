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
from layerwise.stages.models.causal_lm import CausalLM


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 24), (3, 16), (2, 1)])
def test_begin_blocks_and_end_give_the_plain_logits_bit_for_bit(
    load_model: Callable[[str], Any], any_family: str, shape: tuple[int, int]
) -> None:
    lm = load_model(any_family)
    ids = random_ids(*shape)
    stream = lm.begin(ids)
    hidden = stream.hidden
    for index in range(len(lm.blocks)):
        hidden = lm.run_block(index, hidden, stream)
    with torch.no_grad():
        plain = lm.model(input_ids=ids).logits
    assert torch.equal(lm.end(hidden, stream), plain)
    assert torch.equal(lm.logits(ids), plain)
    assert not any("forward" in vars(module) for module in lm.model.modules()), "all are themselves again"


def test_a_stream_of_several_batches_does_not_mix_them_up(load_model: Callable[[str], Any], any_family: str) -> None:
    lm = load_model(any_family)
    batches = [random_ids(2, 12, 1), random_ids(1, 20, 2)]
    streams = [lm.begin(ids) for ids in batches]
    states = [stream.hidden for stream in streams]
    for index in range(len(lm.blocks)):
        states = [lm.run_block(index, state, stream) for state, stream in zip(states, streams, strict=True)]
    for ids, state, stream in zip(batches, states, streams, strict=True):
        assert torch.equal(lm.end(state, stream), lm.logits(ids))


def test_masks_that_differ_from_block_to_block_are_kept_apart(load_model: Callable[[str], Any]) -> None:
    lm = load_model("gemma2")
    kinds = lm.model.config.layer_types
    assert kinds[:2] == ["sliding_attention", "full_attention"]
    masks = [kwargs["attention_mask"] for _, kwargs in lm.begin(random_ids(1, 24)).calls]
    assert all(masks[a] is not None or masks[b] is not None for a, b in [(0, 1), (1, 2)])
    assert not (masks[0] is masks[1] or (None not in masks[:2] and torch.equal(masks[0], masks[1])))


def test_a_loaded_model_is_frozen_and_evaluates(load_model: Callable[[str], Any]) -> None:
    lm = load_model("opt")  # has dropout
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


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


class Odd(nn.Module):
    """A model that runs one of its two blocks, and others; none, if it `fails`."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        text = SimpleNamespace(num_hidden_layers=2, vocab_size=8)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.fails = fails
        self.embedding = nn.Embedding(8, 2)
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
        self.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        if self.fails:
            raise AttributeError("no pixel_values")
        hidden = self.layers[0](self.embedding(input_ids))
        for expert in self.experts:
            hidden = expert(hidden)
        return SimpleNamespace(logits=hidden @ self.embedding.weight.T)


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        (False, "Odd: no ModuleList of 2 blocks that all run"),
        (True, "Odd does not run on token ids alone: AttributeError: no pixel_values"),
    ],
)
def test_a_model_that_does_not_run_its_blocks_is_refused(fails: bool, told: str) -> None:
    with pytest.raises(UnsupportedModel, match=told):
        CausalLM(Odd(fails))


@pytest.mark.parametrize("sees", ["before", "after"])
def test_a_model_that_looks_ahead_is_refused(sees: str) -> None:
    class Looking(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            turned = hidden if sees == "before" else hidden.flip(1)
            total = turned.cumsum(1)
            return hidden + (total if sees == "before" else total.flip(1)) / 4

    class Model(Halving):
        def __init__(self) -> None:
            super().__init__(1.0)
            self.layers = nn.ModuleList([Looking(), Looking()])

    torch.manual_seed(0)
    if sees == "before":
        assert CausalLM(Model()).n_blocks == 2
    else:
        with pytest.raises(UnsupportedModel, match="Model is not causal: what it says of a token depends on later"):
            CausalLM(Model())


class Doubled(nn.Module):
    """A block: a layer beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(hidden)


class Halving(nn.Module):
    """A model that does something between its blocks, where nobody can see it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        text = SimpleNamespace(num_hidden_layers=2, vocab_size=8)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.embedding = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([Doubled(), Doubled()])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = self.factor * layer(hidden)
        return SimpleNamespace(logits=hidden @ self.embedding.weight.T)


def test_a_model_whose_parts_are_not_the_model_is_refused_with_the_difference() -> None:
    torch.manual_seed(0)
    CausalLM(Halving(1.0))
    with pytest.raises(UnsupportedModel, match=r"Halving: its blocks, run one by one, .* differ by up to \d") as caught:
        CausalLM(Halving(0.5))
    found = re.search(r"differ by up to ([^)]*)\)", caught.value.message)
    assert found is not None
    assert 0.01 < float(found[1]) < 100
