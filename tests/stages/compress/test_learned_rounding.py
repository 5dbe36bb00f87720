"""Learned rounding: its gradients against formulas, its losses against the block itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import NotFinite
from layerwise.stages.compress import Task
from layerwise.stages.compress.block_run import BlockRun
from layerwise.stages.compress.learned_rounding import Params, Rounding, learned_rounding
from layerwise.stages.compress.rtn import Params as RtnParams
from layerwise.stages.compress.rtn import rtn
from layerwise.stages.compress.tuning import Free, tune
from layerwise.stages.models.causal_lm import CausalLM

Load = Callable[[str], CausalLM]


def block_task(lm: CausalLM, index: int = 1) -> Task:
    ids = torch.randint(0, 256, (6, 12), generator=torch.Generator().manual_seed(1))
    stream = lm.begin(ids)
    hidden = stream.hidden
    for before in range(index):
        hidden = lm.run_block(before, hidden, stream)
    units = {unit.name: unit for unit in lm.units if unit.block == index}
    run = BlockRun(lm, index, list(units.values()), ids, hidden, lm.run_block(index, hidden, stream))
    weights = {name: lm.weight(unit).clone() for name, unit in units.items()}
    return Task(weights, lambda unit, kind: torch.empty(0), units, block=run)


def block_loss(task: Task, weights: dict[str, Tensor]) -> float:
    assert task.block is not None
    return (task.block.run(weights) - task.block.outputs).double().square().mean().item()


@pytest.mark.parametrize("sym", [True, False])
def test_gradients_are_those_of_the_straight_through_estimator(sym: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn((5, 16), generator=generator)
    weight[0] = weight[0].abs() + 0.1  # a range that ends at zero
    upstream = torch.randn((5, 16), generator=generator)
    part = Rounding("w", weight, 2, Params(bits=2, group_size=8, sym=sym))
    V, alpha, beta = (free.tensor for free in part.free)
    V.copy_(torch.rand(V.shape, generator=generator) - 0.5)
    alpha.copy_(0.5 + torch.rand(alpha.shape, generator=generator) / 2)
    beta.copy_(0.5 + torch.rand(beta.shape, generator=generator) / 2)
    for free in part.free:
        free.tensor.requires_grad_(True)
    (part.tensors()["w"] * upstream).sum().backward()

    W, G = weight.double().view(5, 2, 8), upstream.double().view(5, 2, 8)
    low = W.amin(2, keepdim=True).clamp(max=0) * beta.detach()
    high = W.amax(2, keepdim=True).clamp(min=0) * alpha.detach()
    if sym:
        upper = high > -low
        scale = (torch.where(upper, -high, -low) / 2).half().double()
        zero = torch.full_like(scale, 2)
        by_high, by_low = torch.where(upper, -0.5, 0.0), torch.where(upper, 0.0, -0.5)
    else:
        scale = ((high - low) / 3).half().double()
        zero = (-low / scale).round()
        by_high, by_low = torch.full_like(scale, 1 / 3), torch.full_like(scale, -1 / 3)
    codes = (W / scale + V.detach()).round() + zero
    inside = ((codes >= 0) & (codes <= 3)).double()
    q = codes.clamp(0, 3) - zero
    torch.testing.assert_close(V.grad, (G * scale * inside).float())
    # By the scale: the code itself, less W / s for what moves with it; where codes are cut off, the zero point moves.
    by_scale = q - inside * W / scale
    by_zero = torch.zeros_like(q) if sym else -scale * (1 - inside)
    moved = (G * (by_scale + by_zero * low / scale**2)).sum(2, keepdim=True)
    moved_low = (G * by_zero * -1 / scale).sum(2, keepdim=True)
    torch.testing.assert_close(alpha.grad, (moved * by_high * high / alpha.detach()).float(), rtol=1e-5, atol=1e-5)
    expected = (moved * by_low + moved_low) * low / beta.detach()
    torch.testing.assert_close(beta.grad, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "sym"), [("llama", True), ("gpt2", False), ("mixtral", False)])
def test_what_is_learned_answers_better_than_rounding_to_nearest(load_model: Load, family: str, sym: bool) -> None:
    lm = load_model(family)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    task = block_task(lm)
    params = Params(bits=(2, 4), group_size=16, sym=sym, steps=40, batch_size=4)
    made = learned_rounding(task, params)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
    for number, bits in enumerate(params.bits):
        decoded = {name: levels[number].decode() for name, levels in made.items()}
        loss = block_loss(task, decoded)
        tuned = made[next(iter(made))][number].recipe["tuned"]
        assert tuned["after"] == pytest.approx(loss, rel=1e-5), "a level is what was tuned, to the last code"
        nearest = {
            name: rtn(
                Task({name: task.weights[name]}, task.statistic, {name: unit}),
                RtnParams(bits=(bits,), group_size=16, sym=sym),
            )[name][0].decode()
            for name, unit in task.units.items()
        }
        assert loss < 0.8 * block_loss(task, nearest)


def test_a_seed_decides_everything_and_bit_widths_do_not_touch_each_other(load_model: Load) -> None:
    lm = load_model("llama")
    alone = learned_rounding(block_task(lm), Params(bits=3, group_size=16, steps=10, batch_size=2))
    among = learned_rounding(block_task(lm), Params(bits=(2, 3), group_size=16, steps=10, batch_size=2))
    other = learned_rounding(block_task(lm), Params(bits=3, group_size=16, steps=10, batch_size=2, seed=1))
    for name in alone:
        assert torch.equal(alone[name][0].decode(), among[name][1].decode())
    assert any(not torch.equal(alone[name][0].decode(), other[name][0].decode()) for name in alone)


def test_fewer_sequences_than_a_batch_and_groups_wider_than_the_layer_are_taken_as_they_are(load_model: Load) -> None:
    task = block_task(load_model("llama"))
    made = learned_rounding(task, Params(bits=3, group_size=4096, steps=5, batch_size=1000))
    whole = learned_rounding(task, Params(bits=3, group_size=-1, steps=5, batch_size=6))
    for name in made:
        assert torch.equal(made[name][0].decode(), whole[name][0].decode())


@pytest.mark.parametrize("spoilt", ["weight", "inputs", "answers"])
def test_what_is_not_finite_is_named(load_model: Load, spoilt: str) -> None:
    task = block_task(load_model("llama"))
    block = task.block
    assert block is not None
    name = next(iter(task.weights))
    {"weight": task.weights[name], "inputs": block.inputs, "answers": block.outputs}[spoilt].view(-1)[3] = float("nan")
    with pytest.raises(NotFinite, match=f"weight of {name}" if spoilt == "weight" else f"the {spoilt} of block 1"):
        learned_rounding(task, Params(bits=3, group_size=16, steps=5))


@dataclass
class RowsAndNorm:
    """What another encoding may leave free: a scale for each row of a unit, and the norm before it."""

    unit: str
    weight: Tensor
    norm: str
    scales: Tensor
    gain: Tensor
    rule: Any

    @property
    def free(self) -> list[Free]:
        return [Free(self.scales, 0.05, rule=self.rule), Free(self.gain, 0.05, rule=self.rule)]

    def tensors(self) -> dict[str, Tensor]:
        return {self.unit: self.weight * self.scales, self.norm: self.gain}


@pytest.mark.parametrize("rule", ["sign", "adam"])
def test_the_engine_tunes_whatever_an_encoding_leaves_free(load_model: Load, rule: str) -> None:
    lm = load_model("llama")
    task = block_task(lm)
    assert task.block is not None
    unit, norm = "model.layers.1.mlp.down_proj", "model.layers.1.input_layernorm.weight"
    gain = lm.parameter(norm).detach()
    wrong = torch.linspace(0.5, 1.5, len(task.weights[unit]))[:, None]
    part = RowsAndNorm(unit, task.weights[unit], norm, wrong.clone(), gain * 1.3, rule)
    tuned = tune(task.block, [part], steps=100, batch_size=6, seed=0)
    assert tuned.after < 0.02 * tuned.before
    assert (part.scales - 1).abs().mean() < 0.3 * (wrong - 1).abs().mean()
    with torch.no_grad():
        answers = task.block.answer(part.tensors(), torch.arange(6))
    assert (answers - task.block.outputs).square().mean().item() == pytest.approx(tuned.after, rel=1e-4)
