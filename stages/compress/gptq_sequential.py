"""`gptq_sequential`: GPTQ, a block at a time, every layer with the inputs that the layers before it leave when
quantized.

Within a block the layers are quantized in the order in which they run, those that read the same input together. Before
each step the block runs on its calibration inputs with what is quantized so far, at the same bit-width, so the Hessian
is of the inputs that the layer will really get. It is what the published code calls true-sequential; inputs of the
block itself stay those of the dense model. Each bit-width takes as many passes over the calibration text as there are
steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from layerwise.stages.compress import MenuEntry, Task, gptq

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level


class Params(gptq.Params):
    """As of `gptq`."""

    method: Literal["gptq_sequential"] = "gptq_sequential"  # type: ignore[assignment]

    scope: ClassVar[Literal["unit", "block"]] = "block"
    needs: ClassVar[frozenset[str]] = frozenset({"block_inputs"})

    def again(self, level: str) -> MenuEntry:
        """`gptq`, which is given the Hessians of the steps."""
        one = self.bits[self.level_names().index(level)]
        return gptq.Params.model_validate(self.model_dump(exclude={"method"}) | {"method": "gptq", "bits": one})


def gptq_sequential(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level per bit-width of every unit of a block.

    Args:
        task: a block with its inputs.
    Returns:
        by unit, levels in the order of `params.bits`.
    Raises:
        NotFinite: as `gptq`.
    Source: GPTQ, arXiv:2210.17323, algorithm 1, and `true_sequential` of its published code.
    """
    block = task.block
    assert block is not None, "a task of scope block"
    steps = block.groups()
    levels: dict[str, list[Level]] = {name: [] for name in task.units}
    for bits in params.bits:
        one = params.model_copy(update={"bits": (bits,)})
        done: dict[str, Tensor] = {}
        for step in steps:
            hessians = _hessians(task, step, done)
            for name in step:
                (level,) = gptq.quantized(task.weights[name], hessians[name], one, keep=task.keep.get(name))
                levels[name].append(level)
                done[name] = level.decode()
    return levels


def _hessians(task: Task, step: list[str], done: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`X Xᵀ` of the inputs of some units, with the weights of others replaced; units that read the same share one.

    That of a unit which no one input multiplies is the identity: its columns weigh all the same.
    """
    import torch

    assert task.block is not None
    shared: dict[str, Tensor] = {}

    def add(name: str, X: Tensor) -> None:
        rows = X.float()
        H = rows.T @ rows
        shared[name] = shared[name] + H if name in shared else H

    multiplied = [name for name in step[:1] if task.units[name].multiplied]
    task.block.watch(done, multiplied, add)
    width = task.units[step[0]].shape[1]
    device = task.weights[step[0]].device
    unseen = torch.zeros(width, width, device=device) if multiplied else torch.eye(width, device=device)
    return dict.fromkeys(step, shared.get(step[0], unseen))
