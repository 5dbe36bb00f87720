"""What the driver and a model replica say to each other: candidates out, measurements back.

Free of torch, so that the process that steers a search never loads a model. The other end is
`layerwise.stages.evaluate.evaluator`.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from layerwise.stages.contract import Context, ModelSource, Replicas
from layerwise.stages.data.text import Tokens

METRICS = ("kl", "nll", "agreement", "accuracy")
"""What can be measured, each a mean over predictions (tokens of a language model, entries of a classifier): KL(dense ||
candidate) in nats, negative log-likelihood of the next token or of the label in nats (perplexity is its exponential),
share of predictions where both say the same, share where the candidate says the next token or the label."""

_GREATEST_EXPONENT = math.log(sys.float_info.max)

Genome = tuple[int, ...]
"""Level index of every unit, in the database's order; 0 is what the model has already."""

Measurement = dict[str, Any]
"""`mean` and `stderr` over sequences (None where not finite), `n_tokens` read, and, on request, `sequences`: the mean
of each."""

Score = dict[str, Measurement]
"""Metric to measurement, for one genome."""


@dataclass(frozen=True)
class Request:
    """Candidates to score on the same tokens.

    Args:
        genomes: the candidates.
        metrics: from METRICS.
        tokens: how many tokens to use; None for all.
        draw: seed for which ones.
        sequences: also give the mean of every sequence.
    """

    genomes: tuple[Genome, ...]
    metrics: tuple[str, ...] = ("kl",)
    tokens: int | None = None
    draw: int = 0
    sequences: bool = False

    @property
    def key(self) -> str:
        """The same for the same request: its name in the journal of an interrupted stage."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:24]


Pool = Replicas[tuple[Request, ...], list[Score]]
"""Answers requests that differ only in their genomes, with the scores of all of them in one list."""


def evaluator_factory(
    context: Context, tokens: Tokens, *, database: Path | None = None, models: Sequence[Path] = (), batch_tokens: int
) -> Callable[[], Callable[[tuple[Request, ...]], list[Score]]]:
    """What `Executor.replicas` takes: loads a model, text and levels on a worker.

    Candidates are compared with the workflow's dense model, whatever model the levels are of.

    Args:
        context: the stage's.
        tokens: from `layerwise.stages.data.text.tokenized`.
        database: genomes choose levels of this database, or
        models: compressed models of one dense model, in which case level i + 1 of every unit is that of model i.
        batch_tokens: tokens that run at a time.
    """
    return partial(_open_evaluator, context.model, tokens, database, tuple(models), batch_tokens)


def _open_evaluator(
    model: ModelSource, tokens: Tokens, database: Path | None, models: tuple[Path, ...], batch_tokens: int
) -> Callable[[tuple[Request, ...]], list[Score]]:
    from layerwise.stages.data.text import load_labels, load_sequences
    from layerwise.stages.evaluate.evaluator import Evaluator
    from layerwise.stages.evaluate.model_levels import ModelLevels
    from layerwise.stages.levels.database import Database
    from layerwise.stages.models.loading import load_network

    levels = Database(database, model) if database else ModelLevels(models)
    source = levels.model(model)
    network = load_network(source)
    reference = network if source == model else load_network(model)
    evaluator = Evaluator(
        network,
        load_sequences(tokens),
        levels,
        reference=reference,
        batch_tokens=batch_tokens,
        labels=load_labels(tokens),
    )
    return lambda requests: evaluator(_united(requests))


def _united(requests: Sequence[Request]) -> Request:
    """One request for the genomes of all, in their order."""
    return replace(requests[0], genomes=tuple(genome for request in requests for genome in request.genomes))


def score(pool: Pool, request: Request, *, workers: int, note: str = "") -> list[Score]:
    """Score a request on all replicas.

    Candidates are sorted, so that those with common first blocks meet on one replica. A candidate's numbers do not
    depend on its company, and each is kept by itself: an interrupted stage goes on with any number of replicas.

    Args:
        pool: the replicas.
        request: any number of genomes.
        workers: how many replicas there are.
        note: what is being done, for the progress display.
    Returns:
        one score per genome, in their order.
    """
    distinct = sorted(set(request.genomes))  # two budgets may well lead to one allocation
    parts = [replace(request, genomes=(genome,)) for genome in distinct]
    keys = [f"{part.key}-{note}" for part in parts]
    found = dict(zip(distinct, pool.map_together(parts, keys=keys, calls=workers, note=note), strict=True))
    return [found[genome] for genome in request.genomes]


def perplexity(nll: float | None) -> float | None:
    """The exponential of a mean negative log-likelihood; None where it is not finite in float64."""
    return None if nll is None or nll > _GREATEST_EXPONENT else math.exp(nll)
