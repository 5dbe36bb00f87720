"""One model replica that scores allocations: the inner loop of every search.

- Levels are swapped by pointer, block by block: decoded weights live in a bounded cache over the memory-mapped
  database, and no more than one block is held beside it.
- Candidates of a batch form a prefix tree: sorted by genome, blocks that neighbours share are computed once, depth
  first, so memory is one hidden state per block.
- The dense model's answer on the same tokens is kept from the first use if it fits, else recomputed.

The numbers are those of the plain way (set all weights, run the whole model), because the same operations run on the
same tensors; `tests/stages/evaluate/test_evaluator.py` holds it to that.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from layerwise.errors import NotFinite
from layerwise.stages.evaluate.scoring import DENSE, Measurement, Request, Score
from layerwise.stages.models.causal_lm import CausalLM, Stream


class LevelSource(Protocol):
    """Weights by unit and level index: a database, or compressed models."""

    @property
    def unit_names(self) -> tuple[str, ...]:
        """The units of a genome, in its order."""
        ...

    def weight(self, unit: str, level: int) -> Tensor | None:
        """A unit's weight as the model holds it (GPT-2's Conv1D: transposed); None for its own dense one."""
        ...


class Evaluator:
    """A loaded model with its database and text.

    Args:
        model: the dense model; its weights are put back after every call.
        sequences: (sequences, length) int64 token ids.
        levels: where the weights of levels come from.
        batch_tokens: tokens that run at a time; at least one sequence.
        cache_bytes: for decoded weights.
        reference_bytes: for the dense model's logits; what does not fit is computed again at each use.
    """

    def __init__(
        self,
        model: CausalLM,
        sequences: Tensor,
        levels: LevelSource,
        *,
        batch_tokens: int = 2048,
        cache_bytes: int = 512 << 20,
        reference_bytes: int = 256 << 20,
    ) -> None:
        self.model, self.sequences, self.levels = model, sequences, levels
        self.batch_size = max(1, batch_tokens // sequences.shape[1])
        by_name = {unit.name: unit for unit in model.units}
        self.units = [by_name[name] for name in levels.unit_names]
        self.dense = [model.weight(unit).data for unit in self.units]
        self._members: dict[int, list[int]] = defaultdict(list)
        for index, unit in enumerate(self.units):
            self._members[unit.block].append(index)
        self._cache = _Bounded(cache_bytes)
        self._references = _Bounded(reference_bytes)

    def __call__(self, request: Request) -> list[Score]:
        """Score every genome.

        Returns:
            one score per genome. A candidate whose logits are not finite gets None, which never wins anything.
        Raises:
            NotFinite: the dense model itself gives NaN or Inf.
        """
        chosen, length = self._choose(request.tokens, request.draw)
        order = sorted(range(len(request.genomes)), key=request.genomes.__getitem__)
        found: list[dict[str, list[Tensor]]] = [{metric: [] for metric in request.metrics} for _ in order]
        for batch in chosen.split(self.batch_size):
            ids = self.sequences[batch, :length]
            stream = self.model.embed(ids)
            reference = _Reference(self._reference(tuple(batch.tolist()), length, stream))
            states = [stream.hidden]  # states[b] is the hidden state before block b
            previous: tuple[int, ...] | None = None
            for number in order:
                genome = request.genomes[number]
                logits = self._run(genome, previous, states, stream)
                previous = genome
                for metric, values in _measure(logits, reference, ids, request.metrics).items():
                    found[number][metric].append(values)
        return [
            {metric: _summary(torch.cat(values), length, request.sequences) for metric, values in candidate.items()}
            for candidate in found
        ]

    def _choose(self, tokens: int | None, draw: int) -> tuple[Tensor, int]:
        """Which sequences to use, and how much of each: distinct ones, sorted, the same for the same draw."""
        total, length = self.sequences.shape
        if tokens is None or tokens >= total * length:
            return torch.arange(total), length
        if tokens < length:
            total_wanted, length = 1, tokens
        else:
            total_wanted = tokens // length
        generator = np.random.Generator(np.random.Philox(key=draw))
        return torch.from_numpy(np.sort(generator.permutation(total)[:total_wanted])), length

    def _run(
        self, genome: tuple[int, ...], previous: tuple[int, ...] | None, states: list[Tensor], stream: Stream
    ) -> Tensor:
        """Logits of one candidate, reusing the hidden states before the first block where it differs."""
        if previous is not None and genome == previous:
            first = len(self.model.blocks)
        elif previous is None:
            first = 0
        else:
            changed = (unit.block for unit, a, b in zip(self.units, genome, previous, strict=True) if a != b)
            first = min(changed)
        del states[first + 1 :]
        for block in range(first, len(self.model.blocks)):
            with self._levels_in(block, genome):
                states.append(self.model.run_block(block, states[block], stream))
        return self.model.head(states[-1], stream)

    @contextmanager
    def _levels_in(self, block: int, genome: Sequence[int]) -> Iterator[None]:
        """A genome's levels in one block, and its own weights again afterwards: beside the cache, no more than one
        block is ever held decoded."""
        members = [index for index in self._members[block] if genome[index] != DENSE]
        try:
            for index in members:
                self.model.weight(self.units[index]).data = self._decoded(index, genome[index])
            yield
        finally:
            for index in members:
                self.model.weight(self.units[index]).data = self.dense[index]

    def _decoded(self, index: int, level: int) -> Tensor:
        decoded = self._cache.get((index, level))
        if decoded is None:
            dense = self.dense[index]
            weight = self.levels.weight(self.units[index].name, level)
            decoded = dense if weight is None else weight.to(dense.dtype).contiguous()
            self._cache.put((index, level), decoded)
        return decoded

    def _reference(self, batch: tuple[int, ...], length: int, stream: Stream) -> Tensor:
        """Logits of the dense model."""
        logits = self._references.get((batch, length))
        if logits is None:
            hidden = stream.hidden
            for block in range(len(self.model.blocks)):
                hidden = self.model.run_block(block, hidden, stream)
            logits = self.model.head(hidden, stream)
            if not torch.isfinite(logits).all():
                raise NotFinite(
                    "the dense model gives NaN or Inf on this text",
                    hint="check its weights, or compute in a wider dtype (model: {dtype: float32})",
                )
            self._references.put((batch, length), logits)
        return logits


class _Reference:
    """The dense model's answer to one batch, with what every candidate of the batch is compared with.

    Args:
        logits: (batch, length, vocabulary).
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.float()
        self.probabilities = torch.softmax(self.logits, -1)
        self.normaliser = torch.logsumexp(self.logits, -1)


def _measure(logits: Tensor, reference: _Reference, ids: Tensor, metrics: Sequence[str]) -> dict[str, Tensor]:
    """Means per sequence, float64.

    The divergence is written as `logsumexp(z) - logsumexp(r) - sum(p (z - r))`, with z the candidate's logits, r the
    dense model's and p = softmax(r): both differences are small where the divergence is, so float32 does not lose it.
    """
    logits = logits.float()
    normaliser = torch.logsumexp(logits, -1)
    found = {}
    for metric in metrics:
        if metric == "kl":
            expected = torch.linalg.vecdot(reference.probabilities, logits - reference.logits)
            value = normaliser.double() - reference.normaliser.double() - expected.double()
        elif metric == "nll":
            target = logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
            value = (normaliser[:, :-1] - target).double()
        else:
            value = (logits.argmax(-1) == reference.logits.argmax(-1)).double()
            value[~torch.isfinite(normaliser)] = math.nan
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
