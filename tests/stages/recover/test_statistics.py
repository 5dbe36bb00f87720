"""Norms fitted in closed form: what was done to them is undone, and against numpy's solver."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layerwise.errors import UsageError
from layerwise.stages.contract import ModelSource
from layerwise.stages.models.causal_lm import CausalLM
from layerwise.stages.models.compressed import CompressedModel, source_of
from layerwise.stages.recover.statistics import Params, statistics

IDS = torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
def test_norms_that_were_changed_are_put_back(
    load_model: Callable[[str], Any], model_folder: Callable[[str], Path], family: str
) -> None:
    """With nothing else changed every norm gets the dense model's inputs, and so its weight, whatever form it has."""
    dense, student = load_model(family), CausalLM.load(ModelSource(model_folder(family)))
    generator = torch.Generator().manual_seed(0)
    norms = [name for name, one in student.parameters.items() if one.dim() == 1 and name.endswith(".weight")]
    for name in norms:
        student.parameter(name).data.add_(torch.rand(student.parameter(name).shape, generator=generator))
    assert not torch.allclose(student.logits(IDS), dense.logits(IDS), atol=0.1)
    found = statistics(student, dense, IDS, Params(damp_percent=0, batch_size=4))
    assert sorted(found) == sorted(norms)
    for name, weight in found.items():
        assert torch.allclose(weight, dense.parameter(name), atol=1e-3), name
        assert torch.equal(weight, student.parameter(name))
    assert torch.allclose(student.logits(IDS), dense.logits(IDS), atol=0.02)


def test_a_norm_behind_changed_inputs_is_the_least_squares_fit(
    load_model: Callable[[str], Any], model_folder: Callable[[str], Path]
) -> None:
    dense, student = load_model("llama"), CausalLM.load(ModelSource(model_folder("llama")))
    embedding = student.parameter("model.embed_tokens.weight").data
    embedding.add_(torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1)) * embedding.std())
    first = "model.layers.0.input_layernorm"
    outputs = []
    for network in (dense, student):
        network.module(first).register_forward_hook(lambda module, args, output: outputs.append(output.flatten(0, 1)))
        network.begin(IDS)
        network.run_block(0, network.begin(IDS).hidden, network.begin(IDS))
        network.module(first)._forward_hooks.clear()
    target, given = outputs[0].double().numpy(), outputs[-1].double().numpy()
    weight = student.parameter(f"{first}.weight").detach().double().numpy()
    expected = [
        weight[channel] * np.linalg.lstsq(given[:, [channel]], target[:, channel], rcond=None)[0][0]
        for channel in range(len(weight))
    ]
    found = statistics(student, dense, IDS, Params(damp_percent=0, batch_size=4))[f"{first}.weight"]
    assert found.numpy() == pytest.approx(np.array(expected), rel=1e-4, abs=1e-5)


def test_the_stage_leaves_every_level_as_it_was_and_new_norms_below(in_turn: Callable[..., Any]) -> None:
    made = in_turn("llama", dropped=True)
    folder = made.bench.run("apply", {"pick": made.allocation.candidate}, **made.inputs).out
    repairs = [{"method": "statistics"}, {"method": "perp", "steps": 2, "batch_size": 2, "check_every": 1}]
    repaired = made.bench.run("recover", {"repairs": repairs}, model=folder)
    before, after = CompressedModel(folder), CompressedModel(repaired.out)
    assert after.document.about["repairs"] == ["statistics", "perp"]
    for unit in before.levels:
        old, new = before.level(unit), after.level(unit)
        assert all(torch.equal(old.tensors[name], new.tensors[name]) for name in old.tensors)
    networks = [CausalLM.load(source_of(one, made.bench.model)) for one in (folder, repaired.out)]
    changed = {
        name for name, one in networks[0].parameters.items() if not torch.equal(one, networks[1].parameter(name))
    }
    assert changed
    assert all(networks[0].parameter(name).dim() == 1 for name in changed)


def test_a_teacher_of_other_blocks_is_refused(load_model: Callable[[str], Any]) -> None:
    class Shorter:
        n_blocks = 2

    with pytest.raises(UsageError, match="the model has 3 blocks, the workflow's dense one, its teacher, 2"):
        statistics(load_model("llama"), Shorter(), IDS, Params())  # type: ignore[arg-type]
