"""A block of the dense model, its inputs and how to run it with other weights: what methods of scope `block` get."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from layerwise.stages.models.in_blocks import InBlocks
from layerwise.stages.models.inputs import observed
from layerwise.stages.models.installed import as_parameters, installed, laid_out
from layerwise.stages.models.network import Unit


class BlockRun:
    """One block with its calibration inputs.

    Args:
        network: the model; its weights are put back after every run.
        index: of the block.
        units: of the block, those that are worked on.
        ids: (sequences, length) token ids; these and the next two may stay on the CPU whatever the network's device is,
            and go there by batches.
        inputs: (sequences, length, width), hidden states before the block in the dense model.
        outputs: the same after it: what a compressed block should answer; see `target`.
        batch_size: sequences that run at a time.
    """

    def __init__(
        self,
        network: InBlocks,
        index: int,
        units: Sequence[Unit],
        ids: Tensor,
        inputs: Tensor,
        outputs: Tensor,
        *,
        batch_size: int = 8,
    ) -> None:
        self.network, self.index, self.units = network, index, tuple(units)
        self.ids, self.inputs, self.outputs = ids, inputs, outputs
        self.batch_size = batch_size
        self._by_name = {unit.name: unit for unit in units}

    def of(self, sequences: Tensor) -> BlockRun:
        """The same with some of the sequences, (chosen,) int64."""
        return BlockRun(
            self.network,
            self.index,
            self.units,
            self.ids[sequences],
            self.inputs[sequences],
            self.outputs[sequences],
            batch_size=self.batch_size,
        )

    def run(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The block's answers to all inputs, (sequences, length, width), with some units' weights (out, in)
        replaced."""
        return self.watch(weights, (), lambda unit, X: None)

    def watch(self, weights: Mapping[str, Tensor], units: Sequence[str], seen: Callable[[str, Tensor], None]) -> Tensor:
        """The same, telling of every input of some units as (rows, in)."""
        replaced = {
            self._by_name[name]: laid_out(self.network, self._by_name[name], weight) for name, weight in weights.items()
        }
        watched = [self._by_name[name] for name in units]
        answers = []
        with installed(self.network, replaced), observed(self.network, watched, lambda u, X, _: seen(u.name, X)):
            for ids, hidden in zip(self.ids.split(self.batch_size), self.inputs.split(self.batch_size), strict=True):
                answers.append(self._run(ids, hidden).to(self.inputs.device))
        return torch.cat(answers)

    def _run(self, ids: Tensor, hidden: Tensor) -> Tensor:
        device = self.network.device
        return self.network.run_block(self.index, hidden.to(device), self.network.begin(ids.to(device)))

    def target(self, sequences: Tensor) -> Tensor:
        """What the block should answer to some of the inputs, (chosen, length, width), on the network's device."""
        return self.outputs[sequences].to(self.network.device)

    def answer(self, tensors: Mapping[str, Tensor], sequences: Tensor) -> Tensor:
        """The block's answers to some of the inputs, (chosen, length, width), differentiable in the tensors given.

        Args:
            tensors: by unit, its weight (out, in), or by the full name of any other parameter of the block.
            sequences: (chosen,) int64, which of the sequences.
        """
        parameters = as_parameters(self.network, self._by_name, tensors)
        device = self.network.device
        hidden, stream = self.inputs[sequences].to(device), self.network.begin(self.ids[sequences].to(device))
        return self.network.differentiable_block(self.index, hidden, stream, parameters)

    def groups(self) -> list[list[str]]:
        """Units that read the same input, in the order in which the block gets to them; one batch is run for it."""
        readers: dict[int, list[str]] = {}
        kept: list[Tensor] = []

        def see(unit: Unit, X: Tensor, whole: Tensor) -> None:
            kept.append(whole)  # so that no other tensor gets its id
            names = readers.setdefault(id(whole), [])
            if unit.name not in names and not any(unit.name in others for others in readers.values()):
                names.append(unit.name)

        with observed(self.network, self.units, see):
            self._run(self.ids[: self.batch_size], self.inputs[: self.batch_size])
        found = [names for names in readers.values() if names]
        reached = {name for names in found for name in names}
        return found + [[unit.name] for unit in self.units if unit.name not in reached]
