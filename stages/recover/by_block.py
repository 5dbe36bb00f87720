"""The loop, block by block: a stretch trains the parts of one block, on the answers of that block alone.

A block reads what the blocks before it leave, which have been trained already, and should answer as it does in the
dense model on the dense model's own text. Where its error on the held-out sequences has not fallen at the end of its
stretch, it stays as it was. What is told, and what decides which state is kept in the end, is the loss of the whole
model, as of every other training.

Left out: hidden states on disk; those of all sequences before and behind one block are held in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.stages.compress.block_run import BlockRun
from layerwise.stages.models.installed import as_parameters
from layerwise.stages.recover.training import Trainer, schedule

if TYPE_CHECKING:
    from layerwise.stages.models.causal_lm import CausalLM
    from layerwise.stages.models.network import Unit
    from layerwise.stages.recover.parts import Part
    from layerwise.stages.recover.training_params import TrainingParams


class BlockTrainer(Trainer):
    """A training whose stretches are blocks.

    Args:
        student, teacher, parts, train, heldout, params, folder: as of `Trainer`; each part is of one unit, and there
            are as many stretches as blocks with such units.
        units: of the parts, in their order.
    """

    def __init__(
        self,
        student: CausalLM,
        teacher: CausalLM,
        parts: Sequence[Part],
        train: Tensor,
        heldout: Tensor,
        params: TrainingParams,
        folder: Path,
        units: Sequence[Unit],
    ) -> None:
        super().__init__(student, teacher, parts, train, heldout, params, folder)
        self.networks = student, teacher
        self._parts: dict[int, list[tuple[Unit, Part]]] = {}
        for unit, part in zip(units, parts, strict=True):
            assert unit.block is not None, "units in no block do not fit"
            self._parts.setdefault(unit.block, []).append((unit, part))
        self.blocks = sorted(self._parts)
        self._at = -1
        self._runs: list[BlockRun] = []
        self._before: dict[str, Tensor] = {}
        self._error = 0.0

    def training_loss(self, step: int, batch: Tensor) -> Tensor:
        """The squared error of the block's answers, as a share of their mean square."""
        block = self.blocks[step // self.params.check_every]
        if block != self._at:
            self._begin_block(block)
        return self._block_error(self._runs[0], batch)

    def share_of_rate(self, step: int) -> float:
        """The schedule is that of one block."""
        per_block = self.params.check_every
        return schedule(step % per_block, self.params.model_copy(update={"steps": per_block}))

    @torch.no_grad()
    def end_stretch(self) -> None:
        """The block stays as it was if it is no better on the held-out sequences."""
        if not self._heldout_error() < self._error:
            for name, value in self._before.items():
                self.free[name].copy_(value)
        self._at = -1

    @torch.no_grad()
    def _begin_block(self, block: int) -> None:
        self._at = block
        self._runs = [self._run_of(block, ids) for ids in (self.train, self.heldout)]
        self._before = {
            name: tensor.detach().clone() for _, part in self._parts[block] for name, tensor in part.free.items()
        }
        self._error = self._heldout_error()

    def _run_of(self, block: int, ids: Tensor) -> BlockRun:
        """The block with what it reads now, and with what it answers in the dense model."""
        student, teacher = self.networks
        earlier = {number: self._tensors(number) for number in self.blocks if number < block}
        inputs = _hidden(student, earlier, ids, block, self.params.batch_size)
        outputs = _hidden(teacher, {}, ids, block + 1, self.params.batch_size)
        units = [unit for unit, _ in self._parts[block]]
        return BlockRun(student, block, units, ids, inputs, outputs, batch_size=self.params.batch_size)

    def _tensors(self, block: int) -> dict[str, Tensor]:
        """By full name of a parameter of the student."""
        units = {unit.name: unit for unit, _ in self._parts[block]}
        tensors = {name: tensor for _, part in self._parts[block] for name, tensor in part.tensors().items()}
        return as_parameters(self.networks[0], units, tensors)

    def _block_error(self, run: BlockRun, batch: Tensor) -> Tensor:
        tensors = {name: tensor for _, part in self._parts[run.index] for name, tensor in part.tensors().items()}
        target = run.target(batch).float()
        error = run.answer(tensors, batch).float() - target
        return error.square().mean() / target.square().mean().clamp(min=1e-12)

    def _heldout_error(self) -> float:
        run, total = self._runs[1], 0.0
        for batch in torch.arange(len(run.inputs), device=self.heldout.device).split(self.params.batch_size):
            total += self._block_error(run, batch).item() * len(batch)
        return total / len(run.inputs)


@torch.no_grad()
def _hidden(
    network: CausalLM, tensors: Mapping[int, Mapping[str, Tensor]], ids: Tensor, depth: int, batch_size: int
) -> Tensor:
    """Hidden states behind so many blocks, (sequences, length, width).

    Args:
        tensors: by block, other tensors for some of its parameters, by their full names.
    """
    found = []
    for batch in ids.split(batch_size):
        stream = network.begin(batch)
        hidden = stream.hidden
        for block in range(depth):
            hidden = network.differentiable_block(block, hidden, stream, tensors.get(block, {}))
        found.append(hidden)
    return torch.cat(found)
