"""AWQ against a plain search written from the paper, and where a few channels carry the activations."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from layerwise.errors import NotFinite
from layerwise.stages.calibrate.channels import CHANNELS
from layerwise.stages.compress import Task
from layerwise.stages.compress.awq import Params, awq
from layerwise.stages.compress.block_run import BlockRun
from layerwise.stages.compress.rtn import Params as RtnParams
from layerwise.stages.compress.rtn import rtn
from layerwise.stages.models.causal_lm import CausalLM

FUSED = ["q_proj", "k_proj", "v_proj"]


def block_task(lm: CausalLM) -> tuple[Task, dict[str, Tensor]]:
    """A block with its statistics, where channel 5 of what the attention reads is thirty times the others."""
    lm = CausalLM(copy.deepcopy(lm.model))
    lm.parameter("model.layers.0.input_layernorm.weight").data[5] *= 30
    ids = torch.randint(0, 256, (6, 12), generator=torch.Generator().manual_seed(1))
    stream = lm.begin(ids)
    units = {unit.name: unit for unit in lm.units if unit.block == 0}
    run = BlockRun(lm, 0, list(units.values()), ids, stream.hidden, lm.run_block(0, stream.hidden, stream))
    X: dict[str, Tensor] = {}
    run.watch({}, list(units), lambda name, rows: X.update({name: torch.cat([X[name], rows]) if name in X else rows}))

    def statistic(unit: str, kind: str) -> Tensor:
        return X[unit].T @ X[unit] if kind == "hessian" else CHANNELS.measure(X[unit])

    return Task({name: lm.weight(unit).clone() for name, unit in units.items()}, statistic, units, block=run), X


def test_the_scale_is_the_best_of_the_grid_for_all_that_read_one_input(load_model: Callable[[str], CausalLM]) -> None:
    task, X = block_task(load_model("llama"))
    params = Params(bits=(2, 3), group_size=16, sym=False)
    made = awq(task, params)
    names = [f"model.layers.0.self_attn.{leaf}" for leaf in FUSED]
    inputs = X[names[0]].double()
    for number, bits in enumerate(params.bits):
        losses = []
        for point in range(20):
            s = inputs.abs().mean(0).pow(point / 20).clamp(min=1e-4)
            s = s / (s.max() * s.min()).sqrt()
            total = 0.0
            for name in names:
                W = task.weights[name].double()
                G = (W * s).view(len(W), -1, 16)
                low, high = G.amin(2, keepdim=True).clamp(max=0), G.amax(2, keepdim=True).clamp(min=0)
                step = (high - low) / (2**bits - 1)
                zero = (-low / step).round()
                Q = (((G / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step
                total += ((Q.view(W.shape) / s - W) @ inputs.T).square().sum().item()
            losses.append(total)
        levels = [made[name][number] for name in names]
        for level in levels:
            assert torch.equal(level.tensors["input_scale"], levels[0].tensors["input_scale"]), (
                "one norm divides for all"
            )
        found = sum(
            ((level.decode().double() - task.weights[name].double()) @ inputs.T).square().sum().item()
            for name, level in zip(names, levels, strict=True)
        )
        # Scales of inputs and groups are rounded to float16, which moves a few weights to the next code.
        assert found == pytest.approx(min(losses), rel=0.02)
        assert min(losses) < 0.5 * losses[0], "the strong channel is worth protecting"
        assert levels[0].recipe["alpha"] > 0


def test_no_level_is_worse_than_rounding_to_nearest(load_model: Callable[[str], CausalLM]) -> None:
    task, X = block_task(load_model("llama"))
    made = awq(task, Params(bits=3, group_size=4096))
    assert task.block is not None
    for names in task.block.groups():
        errors = [0.0, 0.0]
        for name in names:
            one = Task({name: task.weights[name]}, task.statistic, {name: task.units[name]})
            nearest = rtn(one, RtnParams(bits=3, group_size=-1))[name][0]
            for place, level in enumerate((made[name][0], nearest)):
                errors[place] += ((level.decode() - task.weights[name]) @ X[name].T).double().square().sum().item()
        assert errors[0] <= errors[1] * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["hessian", "channels"])
def test_statistics_that_are_not_finite_are_named(load_model: Callable[[str], CausalLM], kind: str) -> None:
    task, _ = block_task(load_model("llama"))
    first = next(iter(task.units))

    def spoilt(unit: str, wanted: str) -> Tensor:
        found = task.statistic(unit, wanted)
        return found * float("nan") if wanted == kind else found

    with pytest.raises(NotFinite, match=f"(?i){kind} of {first}"):
        awq(Task(task.weights, spoilt, task.units, block=task.block), Params(bits=3, group_size=16))
