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
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from layerwise.errors import NotFinite
from layerwise.stages.evaluate.scoring import Genome, Measurement, Request, Score
from layerwise.stages.models.causal_lm import CausalLM, Stream
from layerwise.stages.models.installed import installed, laid_out
from layerwise.stages.models.network import BEGIN, Unit


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


class Evaluator:
    """A loaded model with its database and text.

    Args:
        network: the model that levels are swapped in; its weights are put back after every call.
        sequences: (sequences, length) int64 token ids, on the CPU; they go to the network's device by batches.
        levels: where the weights of levels come from.
        reference: the model that candidates are compared with; the network as it is, if left out.
        batch_tokens: tokens that run at a time; at least one sequence.
        cache_bytes: for decoded weights.
        reference_bytes: for the reference's logits; what does not fit is computed again at each use.
    """

    def __init__(
        self,
        network: CausalLM,
        sequences: Tensor,
        levels: LevelSource,
        *,
        reference: CausalLM | None = None,
        batch_tokens: int = 2048,
        cache_bytes: int = 512 << 20,
        reference_bytes: int = 256 << 20,
    ) -> None:
        self.network, self.sequences, self.levels = network, sequences, levels
        self.reference = network if reference is None else reference
        self.batch_size = max(1, batch_tokens // sequences.shape[1])
        by_name = {unit.name: unit for unit in (*network.units, *network.parents)}
        self.units = [by_name[name] for name in levels.unit_names]
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
        """
        chosen, length = self._choose(request.tokens, request.draw)
        order = sorted(range(len(request.genomes)), key=request.genomes.__getitem__)
        found: list[dict[str, list[Tensor]]] = [{metric: [] for metric in request.metrics} for _ in order]
        for batch in chosen.split(self.batch_size):
            ids = self.sequences[batch, :length].to(self.network.device)
            reference = _Reference(self._reference(tuple(batch.tolist()), ids))
            walk = _Walk(self, ids)
            for number in order:
                logits = walk.to(request.genomes[number])
                for metric, values in _measure(logits, reference, ids, request.metrics).items():
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
        total, length = self.sequences.shape
        if tokens is None or tokens >= total * length:
            return torch.arange(total), length
        if tokens < length:
            total_wanted, length = 1, tokens
        else:
            total_wanted = tokens // length
        generator = np.random.Generator(np.random.Philox(key=draw))
        return torch.from_numpy(np.sort(generator.permutation(total)[:total_wanted])), length

    def changed_weights(self, position: int, genome: Genome) -> dict[Unit, Tensor]:
        """The weights of a genome in one part of the network, where they are not the network's own."""
        weights = {}
        for index in self._members[position]:
            unit = self.units[index]
            if genome[index] and not unit.is_parent:
                decoded = self._decoded(index, genome[index])
                if decoded is not None:
                    weights[unit] = decoded
        return weights

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
                    "the dense model gives NaN or Inf on this text",
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


def _measure(logits: Tensor, reference: _Reference, ids: Tensor, metrics: Sequence[str]) -> dict[str, Tensor]:
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
