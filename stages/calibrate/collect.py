"""Gathers statistics of one shard of the text, one block at a time.

The hidden states of the shard's sequences stand before one block; the block runs on them batch by batch while what its
units multiply is measured; the results replace the hidden states, the statistics go to disk, and the next block
follows. So memory holds the hidden states once and the statistics of one block, whatever the depth. Units that read the
same tensor (q, k and v) share what is measured of it. Batches come in a fixed order: same bytes every time.

The hidden states wait on the CPU, or on disk where they do not fit (`hidden.py`), and go to the network's device batch
by batch; statistics add up on the device. From disk an interrupted shard goes on at the block where it was.

Gradients need the whole model and are taken afterwards, sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.results.durable import note_settled, settle_file
from layerwise.results.links import unfinished
from layerwise.stages.calibrate import Statistic, find_statistic
from layerwise.stages.calibrate.hidden import SPILL_BYTES, Hidden, InMemory, OnDisk
from layerwise.stages.models.in_blocks import InBlocks
from layerwise.stages.models.inputs import observed, reading
from layerwise.stages.models.network import BEGIN, Unit


@dataclass
class Gathered:
    """What was found out about a shard beside the files.

    Args:
        owners: unit to the unit under whose name the statistics of its inputs stand.
        counts: tokens that reached each unit.
    """

    owners: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class _Enough(Exception):
    """Leaves a part of the network once the inputs of its units have been seen."""


def statistic_file(folder: Path, statistic: str, position: int, shard: int | None = None) -> Path:
    """Where the statistics of one part of the network stand; part 0 is what comes before the blocks."""
    of_shard = "" if shard is None else f"-{shard}"
    return folder / statistic / f"part-{position + 1}{of_shard}.safetensors"


def collect(
    network: InBlocks,
    units: Sequence[Unit],
    sequences: Tensor,
    folder: Path,
    *,
    statistics: Sequence[str],
    shard: int,
    batch_size: int,
    labels: Tensor | None = None,
) -> Gathered:
    """Write one file of each statistic for each part of the network.

    Args:
        network: the model.
        units: the units to take statistics of.
        sequences: (sequences, length) int64, those of the shard; of a classifier its inputs, (entries, ...).
        folder: gets the files, see `statistic_file`.
        statistics: their names.
        shard: its number, for the names of the files.
        batch_size: sequences that run at a time.
        labels: (entries,), of a classifier, for gradients of its loss.
    Raises:
        UsageError: there are no labels where gradients are needed.
    """
    found = {name: find_statistic(name) for name in statistics}
    hidden_kept = [name for name, statistic in found.items() if statistic.of == "hidden"]
    of_inputs = {name: statistic for name, statistic in found.items() if statistic.of == "inputs"}
    batches = sequences.to(network.device).split(batch_size)
    hidden, gathered = _begun(network, batches, folder / "hidden" / str(shard))
    for position in range(BEGIN, hidden.position):  # found: made before an interruption
        for name in found:
            file = statistic_file(folder, name, position, shard)
            if file.is_file():
                note_settled(file)
    measuring = _Measuring(network, of_inputs, gathered)
    if hidden.position == BEGIN:
        with observed(network, [unit for unit in units if unit.positions[-1] == BEGIN], measuring.add):
            first = (network.begin(batch).hidden.cpu() for batch in batches)
            hidden.advance(first, partial(measuring.save, folder, BEGIN, shard))
    while True:
        position = hidden.position
        for name in hidden_kept:
            states = torch.cat(list(hidden.batches()))
            _save({"ids": sequences, "hidden": states}, statistic_file(folder, name, position, shard))
        members = [unit for unit in units if unit.multiplied and unit.positions[-1] == position]
        measuring = _Measuring(network, of_inputs, gathered)
        if position == network.n_blocks:
            break
        network.bring(position)
        with observed(network, members, measuring.add):
            # Masks and positions are made anew for each block: cheap, and of the hidden states' size if kept.
            after = (
                network.run_block(position, state.to(network.device), network.begin(batch)).cpu()
                for state, batch in zip(hidden.batches(), batches, strict=True)
            )
            hidden.advance(after, partial(measuring.save, folder, position, shard))
    if members:
        _see_the_head(network, members, hidden.batches(), batches, measuring)
    measuring.save(folder, position, shard)
    gradients = {name: statistic for name, statistic in found.items() if statistic.of == "gradients"}
    if gradients:
        _take_gradients(network, units, sequences, labels, gradients, folder, shard)
    return gathered


def _begun(network: InBlocks, batches: Sequence[Tensor], folder: Path) -> tuple[Hidden, Gathered]:
    """The hidden states as they were when the shard was interrupted, or none yet, and what had been gathered.

    Those of a model that is streamed, or that are many, are on disk.
    """
    one = network.begin(batches[0][:1]).hidden
    size_bytes = one.numel() * one.element_size() * sum(map(len, batches))
    if network.streamed is None and size_bytes <= SPILL_BYTES:
        return InMemory(), Gathered()
    kept = OnDisk(folder)
    found = kept.found()
    return kept, Gathered() if found is None else Gathered(**found)


def _see_the_head(
    network: InBlocks,
    members: Sequence[Unit],
    hidden: Iterable[Tensor],
    batches: Sequence[Tensor],
    measuring: _Measuring,
) -> None:
    """The head's inputs, without the logits: those of a batch can be larger than the model."""

    waiting: set[str] = set()

    def see(unit: Unit, X: Tensor, whole: Tensor) -> None:
        measuring.add(unit, X, whole)
        waiting.discard(unit.name)
        if not waiting:
            raise _Enough

    with observed(network, members, see):
        for state, batch in zip(hidden, batches, strict=True):
            waiting |= {unit.name for unit in members}
            with suppress(_Enough):
                network.end(state.to(network.device), network.begin(batch))


class _Measuring:
    """Adds up statistics of the inputs of units while a part of the network runs."""

    def __init__(self, network: InBlocks, statistics: Mapping[str, Statistic], gathered: Gathered) -> None:
        self.network, self.statistics, self.gathered = network, statistics, gathered
        self.totals: dict[str, dict[str, Tensor]] = {name: {} for name in statistics}
        self._readers: dict[tuple[Any, ...], tuple[str, Tensor]] = {}

    def add(self, unit: Unit, X: Tensor, whole: Tensor) -> None:
        """One input of a unit, as rows, and the tensor that it came in."""
        owners, counts = self.gathered.owners, self.gathered.counts
        counts[unit.name] = counts.get(unit.name, 0) + _n_tokens(unit, X)
        read = (id(whole), *reading(self.network.owner(unit)))
        owner, _ = self._readers.get(read, (None, None))
        if owner is not None and owner != unit.name and owners.get(unit.name, owner) == owner:
            owners[unit.name] = owner
            return
        # The tensor is kept, so that its id stays its own; the next call of the same unit replaces it.
        self._readers = {key: kept for key, kept in self._readers.items() if kept[0] != unit.name}
        self._readers[read] = unit.name, whole
        owners[unit.name] = unit.name
        for group, rows in zip(group_names(unit.name, unit.groups), X.tensor_split(unit.groups, dim=1), strict=True):
            for name, statistic in self.statistics.items():
                measured, totals = statistic.measure(rows), self.totals[name]
                totals[group] = statistic.merge(totals[group], measured) if group in totals else measured

    def save(self, folder: Path, position: int, shard: int) -> Gathered:
        """Write what was found of one part of the network; gives what is known of all parts so far."""
        for name, tensors in self.totals.items():
            if tensors:
                _save(tensors, statistic_file(folder, name, position, shard))
        return self.gathered


def group_names(unit: str, groups: int) -> list[str]:
    """Under which names the statistics of a unit stand in their file."""
    return [unit] if groups == 1 else [f"{unit}#{group}" for group in range(groups)]


def _n_tokens(unit: Unit, X: Tensor) -> int:
    """Tokens in an input; some families give every expert every token, with zeros where it was not chosen."""
    return int((X != 0).any(1).sum()) if unit.role == "expert" else len(X)


def _take_gradients(
    network: InBlocks,
    units: Sequence[Unit],
    sequences: Tensor,
    labels: Tensor | None,
    statistics: Mapping[str, Statistic],
    folder: Path,
    shard: int,
) -> None:
    """Statistics of the gradients of the loss, one sequence after the other."""
    parameters = {unit.view.tensor: network.parameter(unit.view.tensor) for unit in units if unit.view is not None}
    totals: dict[str, dict[str, Tensor]] = {name: {} for name in statistics}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        for number, ids in enumerate(sequences.to(network.device).split(1)):
            targets = network.targets(ids, None if labels is None else labels[number : number + 1].to(network.device))
            if targets is None:
                raise UsageError(
                    f"{', '.join(statistics)} needs the loss, and the data has no labels",
                    hint="let the function of the data give (inputs, labels)",
                )
            logits = network.forward(ids).float().reshape(network.predictions(ids), -1)[: targets.shape[1]]
            torch.nn.functional.cross_entropy(logits, targets[0], reduction="sum").backward()
            for unit in units:
                gradient = parameters[unit.view.tensor].grad if unit.view is not None else None
                if unit.view is None or gradient is None:
                    continue
                for name, statistic in statistics.items():
                    measured, total = statistic.measure(unit.view.read(gradient)), totals[name]
                    total[unit.name] = statistic.merge(total[unit.name], measured) if unit.name in total else measured
            for parameter in parameters.values():
                parameter.grad = None
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    by_name = {unit.name: unit for unit in units}
    for name, total in totals.items():
        for position in sorted({by_name[unit].positions[-1] for unit in total}):
            part = {unit: tensor for unit, tensor in total.items() if by_name[unit].positions[-1] == position}
            _save(part, statistic_file(folder, name, position, shard))


def merge(parts: Sequence[Path], target: Path, together: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Statistics of several shards in one file, tensor by tensor and in the order given."""
    from safetensors import safe_open

    total: dict[str, Tensor] = {}
    for part in parts:
        with safe_open(part, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                total[name] = together(total[name], tensor) if name in total else tensor
    _save(total, target)


def _save(tensors: Mapping[str, Tensor], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(target) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        settle_file(partial, target)
