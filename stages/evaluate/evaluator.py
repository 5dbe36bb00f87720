"""One model replica that scores allocations: the inner loop of every search.

- Levels are swapped by pointer, part by part: decoded weights live in a bounded cache over the memory-mapped database,
  and no more than one part of the network is held beside it. A half-block that is dropped answers zero, a block that is
  dropped is not run.
- Candidates of a batch form a prefix tree: sorted by genome, blocks that neighbours share are computed once, depth
  first, so memory is one hidden state per block.
- The dense model's answer on the same tokens is kept from the first use if it fits, else recomputed.

The numbers are those of the plain way (set all weights, run the whole model), because the same operations run on the
same tensors; `tests/stages/evaluate/test_evaluator.py` holds it to that.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from layerwise.errors import DataError, NotFinite
from layerwise.stages.evaluate.scoring import Genome, Measurement, Request, Score
from layerwise.stages.models.in_blocks import InBlocks, Stream
from layerwise.stages.models.installed import installed, laid_out
from layerwise.stages.models.network import BEGIN, Unit

_OF_TARGETS = {"nll": "cross-entropy", "accuracy": "accuracy"}
"""Metrics that need what is to be predicted, and how people call them."""


class LevelSource(Protocol):
    """Weights by unit and level index: a database, or compressed models. Level 0 is what the network has already."""

    @property
    def unit_names(self) -> tuple[str, ...]:
        """The units of a genome, in its order: by first use, so that neighbours in the order of genomes share
        blocks."""
        ...

    def weight(self, unit: str, level: int, device: torch.device | str = "cpu") -> Tensor | None:
        """The dense weight of a level, (out, in), decoded on a device; None for what the network has already."""
        ...

    def drops(self, unit: str, level: int) -> bool:
        """Whether a level leaves a parent out."""
        ...

    def narrows(self, unit: str, level: int) -> Mapping[str, int]:
        """The levels that a parent's level gives units inside; none for a level that leaves them their own."""
        ...


class Evaluator:
    """A loaded model with its database and text.

    Args:
        network: the model that levels are swapped in; its weights are put back after every call.
        sequences: (sequences, length) int64 token ids, on the CPU; they go to the network's device by batches. Of a
            classifier its inputs, (entries, ...); an entry counts as a sequence of one token.
        levels: where the weights of levels come from.
        reference: the model that candidates are compared with; the network as it is, if left out.
        batch_tokens: tokens that run at a time; at least one sequence.
        cache_bytes: for decoded weights.
        reference_bytes: for the reference's logits; what does not fit is computed again at each use.
        labels: (entries,) int64, what a classifier should say.
    """

    def __init__(
        self,
        network: InBlocks,
        sequences: Tensor,
        levels: LevelSource,
        *,
        reference: InBlocks | None = None,
        batch_tokens: int = 2048,
        cache_bytes: int = 512 << 20,
        reference_bytes: int = 256 << 20,
        labels: Tensor | None = None,
    ) -> None:
        self.network, self.sequences, self.levels, self.labels = network, sequences, levels, labels
        self.reference = network if reference is None else reference
        self._length = network.predictions(sequences)
        self.batch_size = max(1, batch_tokens // self._length)
        by_name = {unit.name: unit for unit in (*network.units, *network.parents)}
        self.units = [by_name[name] for name in levels.unit_names]
        self._numbers = {unit.name: index for index, unit in enumerate(self.units)}
        self._members: dict[int, list[int]] = defaultdict(list)
        for index, unit in enumerate(self.units):
            for position in unit.positions:
                self._members[position].append(index)
        self._cache = _Bounded(cache_bytes)
        self._references = _Bounded(reference_bytes)

    def __call__(self, request: Request) -> list[Score]:
        """Score every genome.

        Returns:
            one score per genome. A candidate whose logits are not finite gets None, which never wins anything.
        Raises:
            NotFinite: the reference itself gives NaN or Inf.
            DataError: a metric needs labels, and the data has none, or they are no classes of the network.
        """
        chosen, length = self._choose(request.tokens, request.draw)
        order = sorted(range(len(request.genomes)), key=request.genomes.__getitem__)
        found: list[dict[str, list[Tensor]]] = [{metric: [] for metric in request.metrics} for _ in order]
        for batch in chosen.split(self.batch_size):
            ids = self.sequences[batch]
            ids = (ids if length == self._length else ids[:, :length]).to(self.network.device)
            reference = _Reference(_by_prediction(self._reference(tuple(batch.tolist()), ids)))
            targets = self._targets(batch, ids, reference.logits.shape[-1], request.metrics)
            walk = _Walk(self, ids)
            for number in order:
                logits = _by_prediction(walk.to(request.genomes[number]))
                for metric, values in _measure(logits, reference, targets, request.metrics).items():
                    found[number][metric].append(values)
        return [
            {
                metric: _summary(torch.cat(values).cpu(), length, request.sequences)
                for metric, values in candidate.items()
            }
            for candidate in found
        ]

    def _choose(self, tokens: int | None, draw: int) -> tuple[Tensor, int]:
        """Which sequences to use, and how much of each: distinct ones, sorted, the same for the same draw."""
        total, length = len(self.sequences), self._length
        if tokens is None or tokens >= total * length:
            return torch.arange(total), length
        if tokens < length:
            total_wanted, length = 1, tokens
        else:
            total_wanted = tokens // length
        generator = np.random.Generator(np.random.Philox(key=draw))
        return torch.from_numpy(np.sort(generator.permutation(total)[:total_wanted])), length

    def _targets(self, batch: Tensor, ids: Tensor, classes: int, metrics: Sequence[str]) -> Tensor | None:
        """What is to be predicted, (batch, predictions that are known)."""
        labels = None if self.labels is None else self.labels[batch]
        if labels is not None and not 0 <= labels.min() <= labels.max() < classes:
            raise DataError(
                f"a label is {labels.max().item() if labels.min() >= 0 else labels.min().item()}, but the network has "
                f"{classes} classes, from 0 on"
            )
        targets = self.network.targets(ids, None if labels is None else labels.to(ids.device))
        of_targets = [name for metric, name in _OF_TARGETS.items() if metric in metrics]
        if targets is None and of_targets:
            raise DataError(
                f"{' and '.join(of_targets)} cannot be measured: the data has no labels",
                hint="let the function of the data give (inputs, labels)",
            )
        return targets

    def changed_weights(self, position: int, genome: Genome) -> dict[Unit, Tensor]:
        """The weights of a genome in one part of the network, where they are not the network's own."""
        weights = {}
        for index, level in self._chosen(position, genome).items():
            decoded = self._decoded(index, level)
            if decoded is not None:
                weights[self.units[index]] = decoded
        return weights

    def _chosen(self, position: int, genome: Genome) -> dict[int, int]:
        """By unit in one part of the network, its level where it is not the network's own: a narrowed parent's say."""
        changed = [index for index in self._members[position] if genome[index]]
        chosen = {index: genome[index] for index in changed if not self.units[index].is_parent}
        for index in changed:
            if self.units[index].is_parent:
                given = self.levels.narrows(self.units[index].name, genome[index])
                chosen |= {self._numbers[name]: level for name, level in given.items()}
        return chosen

    def dropped(self, position: int, genome: Genome) -> list[Unit]:
        """The parents that a genome leaves out in one block."""
        members = [index for index in self._members[position] if self.units[index].is_parent]
        return [self.units[index] for index in members if self.levels.drops(self.units[index].name, genome[index])]

    def first_change(self, genome: Genome, previous: Genome) -> int:
        """The first part of the network where two genomes differ; past the last one where they do not."""
        pairs = zip(self.units, genome, previous, strict=True)
        return min((unit.positions[0] for unit, a, b in pairs if a != b), default=self.network.n_blocks + 1)

    def _decoded(self, index: int, level: int) -> Tensor | None:
        decoded = self._cache.get((index, level))
        if decoded is None:
            weight = self.levels.weight(self.units[index].name, level, self.network.device)
            if weight is None:
                return None
            decoded = laid_out(self.network, self.units[index], weight)
            self._cache.put((index, level), decoded)
        return decoded

    def _reference(self, batch: tuple[int, ...], ids: Tensor) -> Tensor:
        """Logits of the model that candidates are compared with."""
        key = batch, ids.shape[1]
        logits = self._references.get(key)
        if logits is None:
            stream = self.reference.begin(ids)
            hidden = stream.hidden
            for block in range(self.reference.n_blocks):
                hidden = self.reference.run_block(block, hidden, stream)
            logits = self.reference.end(hidden, stream)
            if not torch.isfinite(logits).all():
                raise NotFinite(
                    f"the dense model gives NaN or Inf on this text{_told_by_weights(self.reference)}",
                    hint="check its weights, or compute in a wider dtype (model: {dtype: float32})",
                )
            self._references.put(key, logits)
        return logits


class _Walk:
    """One batch of tokens on its way from candidate to candidate: what two of them share is computed once.

    Args:
        evaluator: whose network runs.
        ids: (batch, length).
    """

    def __init__(self, evaluator: Evaluator, ids: Tensor) -> None:
        self.evaluator, self.network, self.ids = evaluator, evaluator.network, ids
        self.previous: Genome | None = None
        self.states: list[Tensor] = []  # states[b] is the hidden state before block b
        self.stream: Stream | None = None
        self.logits = torch.empty(0)

    def to(self, genome: Genome) -> Tensor:
        """Logits of one candidate, reusing what comes before the first part where it differs from the one before."""
        first = BEGIN if self.previous is None else self.evaluator.first_change(genome, self.previous)
        self.previous = genome
        if first > self.network.n_blocks:
            return self.logits
        if first == BEGIN or self.stream is None:
            with installed(self.network, self.evaluator.changed_weights(BEGIN, genome)):
                self.stream = self.network.begin(self.ids)
            self.states = [self.stream.hidden]
        del self.states[max(0, first) + 1 :]
        for block in range(max(0, first), self.network.n_blocks):
            self.states.append(self._run(block, genome, self.stream))
        with installed(self.network, self.evaluator.changed_weights(self.network.n_blocks, genome)):
            self.logits = self.network.end(self.states[-1], self.stream)
        return self.logits

    def _run(self, block: int, genome: Genome, stream: Stream) -> Tensor:
        dropped = self.evaluator.dropped(block, genome)
        if any(parent.role == "block" for parent in dropped):
            return self.states[block]
        weights = self.evaluator.changed_weights(block, genome)
        with installed(self.network, weights), self.network.without(dropped):
            return self.network.run_block(block, self.states[block], stream)


class _Reference:
    """The dense model's answer to one batch, with what every candidate of the batch is compared with.

    Args:
        logits: (batch, length, vocabulary).
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.float()
        self.probabilities = torch.softmax(self.logits, -1)
        self.normaliser = torch.logsumexp(self.logits, -1)


def _by_prediction(logits: Tensor) -> Tensor:
    """(batch, predictions, classes), of a classifier too, which gives one for each entry."""
    return logits if logits.dim() == 3 else logits[:, None]


def _measure(
    logits: Tensor, reference: _Reference, targets: Tensor | None, metrics: Sequence[str]
) -> dict[str, Tensor]:
    """Means per sequence, float64.

    The divergence is written as `logsumexp(z) - logsumexp(r) - sum(p (z - r))`, with z the candidate's logits, r the
    dense model's and p = softmax(r): both differences are small where the divergence is. What float32 leaves is the
    rounding of the two logsumexp, about 1e-6 a token of either sign; means below that are noise.
    """
    logits = logits.float()
    normaliser = torch.logsumexp(logits, -1)
    found = {}
    for metric in metrics:
        if metric == "kl":
            expected = torch.linalg.vecdot(reference.probabilities, logits - reference.logits)
            value = normaliser.double() - reference.normaliser.double() - expected.double()
        elif metric == "agreement":
            value = (logits.argmax(-1) == reference.logits.argmax(-1)).double()
            value[~torch.isfinite(normaliser)] = math.nan
        else:
            assert targets is not None, "checked before"
            known = targets.shape[1]
            if metric == "nll":
                target = logits[:, :known].gather(-1, targets[..., None]).squeeze(-1)
                value = (normaliser[:, :known] - target).double()
            else:
                value = (logits[:, :known].argmax(-1) == targets).double()
                value[~torch.isfinite(normaliser[:, :known])] = math.nan
        found[metric] = value.mean(-1)
    return found


def _summary(values: Tensor, length: int, sequences: bool) -> Measurement:
    """Mean and standard error of the mean over sequences, all of one length; a single sequence has no error."""
    finite = bool(torch.isfinite(values).all())
    n = len(values)
    measured: Measurement = {
        "mean": values.mean().item() if finite else None,
        "stderr": (values.std() / math.sqrt(n)).item() if finite and n > 1 else None,
        "n_tokens": n * length,
    }
    return measured | {"sequences": values.tolist()} if sequences and finite else measured


class _Bounded:
    """Tensors by key, the least recently used dropped when they exceed a size in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.items: OrderedDict[object, Tensor] = OrderedDict()

    def get(self, key: object) -> Tensor | None:
        if key in self.items:
            self.items.move_to_end(key)
        return self.items.get(key)

    def put(self, key: object, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if size > self.limit:
            return
        self.items[key] = tensor
        self.size += size
        while self.size > self.limit:
            _, dropped = self.items.popitem(last=False)
            self.size -= dropped.numel() * dropped.element_size()


def _told_by_weights(network: InBlocks) -> str:
    """Which of its weights are no numbers, as the end of a sentence: the least and the greatest of each show it."""
    bad = [
        (name, parameter)
        for name, parameter in network.parameters.items()
        if parameter.numel() and not all(bound.isfinite() for bound in parameter.aminmax())
    ]
    if not bad:
        return ""
    name, parameter = bad[0]
    wrong = int((~parameter.isfinite()).sum())
    more = f", and so have {len(bad) - 1} more weights" if len(bad) > 1 else ""
    return f": {name} has {wrong} of {parameter.numel()} values that are NaN or Inf{more}"
