"""True-sequential GPTQ against a plain loop over the block's own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.stages.compress import Task
from layerwise.stages.compress.block_run import BlockRun
from layerwise.stages.compress.gptq import Params as GptqParams
from layerwise.stages.compress.gptq import quantized
from layerwise.stages.compress.gptq_sequential import Params, gptq_sequential
from layerwise.stages.models.causal_lm import CausalLM

STEPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["attn.c_proj"], ["c_fc"], ["mlp.c_proj"]],
}
"""The order in which a block of the published models runs its layers; those of one step read the same input."""


def block_task(lm: Any, index: int, *, batch_size: int = 8) -> Task:
    ids = torch.randint(0, 256, (6, 12), generator=torch.Generator().manual_seed(1))
    stream = lm.begin(ids)
    hidden = stream.hidden
    for before in range(index):
        hidden = lm.run_block(before, hidden, stream)
    units = [unit for unit in lm.units if unit.block == index]
    run = BlockRun(lm, index, units, ids, hidden, lm.run_block(index, hidden, stream), batch_size=batch_size)
    return Task(
        {unit.name: lm.weight(unit).clone() for unit in units},
        lambda unit, kind: torch.empty(0),
        {unit.name: unit for unit in units},
        block=run,
    )


def hessian_in(lm: Any, task: Task, name: str) -> Tensor:
    """X Xᵀ of a layer's inputs, by a hook of torch's while the block runs as it is."""
    rows: list[Tensor] = []
    handle = lm.module(name).register_forward_pre_hook(lambda module, args: rows.append(args[0].flatten(0, -2)))
    block = task.block
    assert block is not None
    lm.run_block(block.index, block.inputs, lm.begin(block.ids))
    handle.remove()
    return rows[0].T @ rows[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_step_sees_the_inputs_that_the_steps_before_it_leave(
    load_model: Callable[[str], Any], family: str
) -> None:
    lm = load_model(family)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    task = block_task(lm, 1)
    params = Params(bits=(2, 4), group_size=16)
    made = gptq_sequential(task, params)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
    assert set(made) == set(task.units)
    changed = 0
    for number, bits in enumerate(params.bits):
        other = CausalLM(copy.deepcopy(lm.model))
        for step in STEPS[family]:
            names = [name for leaf in step for name in task.units if name.endswith(f".{leaf}")]
            assert len(names) == len(step)
            H = hessian_in(other, task, names[0])
            for name in names:
                (level,) = quantized(task.weights[name], H, GptqParams(bits=(bits,), group_size=16))
                found = made[name][number].decode()
                assert torch.equal(found, level.decode()), name
                first = quantized(
                    task.weights[name], hessian_in(lm, task, name), GptqParams(bits=(bits,), group_size=16)
                )
                changed += not torch.equal(first[0].decode(), found)
            for name in names:
                other.overwrite(task.units[name], made[name][number].decode())
    assert changed > 2, "what came before has changed the later layers"


def test_the_batch_size_changes_nothing_but_the_order_of_sums(load_model: Callable[[str], Any]) -> None:
    lm, params = load_model("llama"), Params(bits=(3,), group_size=16)
    made = [gptq_sequential(block_task(lm, 0, batch_size=size), params) for size in (1, 8)]
    for name in made[0]:
        assert (made[0][name][0].decode() - made[1][name][0].decode()).abs().max() <= 1e-6


def test_experts_are_steps_of_their_own(load_model: Callable[[str], Any]) -> None:
    lm = load_model("mixtral")
    task = block_task(lm, 2)
    block = task.block
    assert block is not None
    steps = block.groups()
    assert sorted(name for step in steps for name in step) == sorted(task.units)
    assert [len(step) for step in steps] == [3, 1, 1, *[1] * 8], "q, k and v read the same; every expert has its own"
    place = {name: number for number, step in enumerate(steps) for name in step}
    for number in range(4):
        expert = f"model.layers.2.mlp.experts.{number}"
        assert place["model.layers.2.mlp.gate"] < place[f"{expert}.gate_up_proj"] < place[f"{expert}.down_proj"]
    made = gptq_sequential(task, Params(bits=(8,), group_size=16))
    answers = block.run({name: levels[0].decode() for name, levels in made.items()})
    assert (answers - block.outputs).square().mean() < 1e-2 * block.outputs.square().mean()


def test_a_block_answers_what_the_dense_model_answers_until_it_is_changed(load_model: Callable[[str], Any]) -> None:
    lm = load_model("gemma2")
    task = block_task(lm, 1, batch_size=2)
    block = task.block
    assert block is not None
    torch.testing.assert_close(block.run({}), block.outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(block.run(task.weights), block.outputs, rtol=1e-5, atol=1e-5)
    zeros = {name: torch.zeros_like(weight) for name, weight in task.weights.items()}
    torch.testing.assert_close(block.run(zeros), block.inputs, rtol=0, atol=1e-6)  # norms of zero are zero
