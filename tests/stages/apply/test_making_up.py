"""Weights that are left of a block make up for those that are compressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layerwise.stages.apply.making_up import Moving, make_up
from layerwise.stages.compress.block_run import BlockRun


def block_of(lm: Any) -> tuple[BlockRun, dict[str, Tensor]]:
    """The first block with its dense inputs and answers, and its weights."""
    ids = torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(4))
    stream = lm.begin(ids)
    units = [unit for unit in lm.units if unit.block == 0]
    run = BlockRun(lm, 0, units, ids, stream.hidden, lm.run_block(0, stream.hidden, stream))
    return run, {unit.name: lm.weight(unit).clone() for unit in units}


def test_what_is_left_brings_the_block_nearer_to_its_dense_answers(load_model: Callable[[str], Any]) -> None:
    lm = load_model("llama")
    run, weights = block_of(lm)
    network = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    name = next(name for name in weights if name.endswith("v_proj"))
    settled = {name: weights[name] * 0.7}
    keep = torch.rand(weights[name.replace("v_proj", "o_proj")].shape, generator=torch.Generator().manual_seed(0)) > 0.3
    left = [Moving(other, weights[other]) for other in weights if other.split(".")[-1] in ("up_proj", "down_proj")]
    masked = name.replace("v_proj", "o_proj")
    left.append(Moving(masked, weights[masked] * keep, keep))

    def error() -> float:
        moved = {other: tensor for part in left for other, tensor in part.tensors().items()}
        return float((run.run(settled | moved) - run.outputs).square().mean())

    before, tuned = error(), make_up(run, settled, left, steps=30, seed=0)
    assert tuned.step > 0
    assert error() < 0.8 * before  # every sequence is looked at, so the engine's loss is this one
    assert not left[-1].tensors()[masked][~keep].any(), "what was pruned stays so"
    assert all(torch.equal(tensor, network[name]) for name, tensor in lm.model.state_dict().items())
    assert not torch.equal(left[0].weight, weights[left[0].name]), "a copy has moved"


def test_where_nothing_is_compressed_nothing_moves(load_model: Callable[[str], Any]) -> None:
    run, weights = block_of(load_model("llama"))
    left = [Moving(name, weight) for name, weight in weights.items()]
    assert make_up(run, {}, left, steps=10, seed=0).step == 0
    assert all(torch.equal(part.weight, weights[part.name]) for part in left)
