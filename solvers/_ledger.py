"""The books of a search: what it has spent, what it was told, and whether its stop rules let it go on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerwise.errors import UsageError
from layerwise.solvers.problem import Choice, Problem
from layerwise.solvers.stopping import Stop

Clock = Callable[[], float]
"""Seconds since some fixed moment."""


@dataclass(frozen=True)
class Course:
    """What decides the course of any search besides its problem, its start and its own settings.

    Args:
        seed: 0 or more; all random streams come from it.
        total_tokens: how much search data there is, None if not known.
        stop: the rules by which it ends.
        clock: for `Stop.seconds`.
        tokens_per_ask: how much data an ask sees, None for all of it or where that differs from ask to ask.
    Raises:
        UsageError: the seed is negative.
    """

    seed: int
    total_tokens: int | None
    stop: Stop
    clock: Clock
    tokens_per_ask: int | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"seed must be at least 0, found {self.seed}")

    def ledger(self) -> Ledger:
        """Empty books."""
        return Ledger(self.stop, self.total_tokens, self.clock)

    def rng(self, number: int, purpose: int) -> np.random.Generator:
        """A random generator of its own for each round and purpose, so that nothing about it needs saving."""
        key = np.array([self.seed, number], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, purpose]))


class Ledger:
    """Counts evaluations, tokens, rounds without progress, and seconds.

    Args:
        stop: the rules.
        total_tokens: how much search data there is, None if not known.
        clock: read only where `stop` limits the seconds, so that other searches have nothing random in their state.
    Raises:
        UsageError: tokens are limited, but how much data there is is not known.
    """

    def __init__(self, stop: Stop, total_tokens: int | None, clock: Clock) -> None:
        if total_tokens is not None and total_tokens < 1:
            raise UsageError(f"total_tokens must be at least 1, found {total_tokens}")
        if stop.tokens is not None and total_tokens is None:
            raise UsageError(
                "a limit on tokens needs total_tokens, because a closing round uses all of the search data"
            )
        self._stop, self._total_tokens, self._clock = stop, total_tokens, clock
        self.evaluations = self.stale = 0
        self.tokens: int | None = 0
        self._seconds, self._since = 0.0, self._now()

    def amount(self, wanted: int | None) -> int | None:
        """Tokens of a round: None, which is all of the data, where as much or more is wanted."""
        if wanted is not None and wanted < 1:
            raise UsageError(f"numbers of tokens must be at least 1, found {wanted}")
        return None if wanted is None or (self._total_tokens is not None and wanted >= self._total_tokens) else wanted

    def enter(self, n_candidates: int, tokens: int | None) -> None:
        """Book a round that was told."""
        cost = self._cost(n_candidates, tokens)
        self.evaluations += n_candidates
        self.tokens = None if cost is None or self.tokens is None else self.tokens + cost

    def affords(self, rounds: Iterable[tuple[int, int | None]]) -> bool:
        """True if these rounds, given as (candidates, tokens of each), stay within evaluations and tokens."""
        planned = list(rounds)
        if self._stop.evaluations is not None:
            total = self.evaluations + sum(n_candidates for n_candidates, _ in planned)
            if total > self._stop.evaluations:
                return False
        if self._stop.tokens is None:
            return True
        costs = [self._cost(n_candidates, tokens) for n_candidates, tokens in planned]
        return (self.tokens or 0) + sum(cost or 0 for cost in costs) <= self._stop.tokens  # all known: see __init__

    def over(self, loss: float | None) -> bool:
        """True if patience or time has run out, or a loss on all the data (None if there is none) is near the bound."""
        stop = self._stop
        if stop.patience is not None and self.stale >= stop.patience:
            return True
        if stop.seconds is not None and self._elapsed() >= stop.seconds:
            return True
        if loss is None or stop.gap is None or stop.lower_bound is None:
            return False
        return loss - stop.lower_bound <= stop.gap * abs(loss)

    def state_dict(self) -> dict[str, Any]:
        return {
            "evaluations": self.evaluations,
            "tokens": self.tokens,
            "stale": self.stale,
            "seconds": self._elapsed(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.evaluations, self.tokens, self.stale = state["evaluations"], state["tokens"], state["stale"]
        self._seconds, self._since = state["seconds"], self._now()

    def _cost(self, n_candidates: int, tokens: int | None) -> int | None:
        each = self._total_tokens if tokens is None else tokens
        return None if each is None else n_candidates * each

    def _elapsed(self) -> float:
        return self._seconds + self._now() - self._since

    def _now(self) -> float:
        return 0.0 if self._stop.seconds is None else self._clock()


def told(losses: Sequence[float], n_candidates: int) -> list[float]:
    """The losses as floats, with NaN for every candidate that failed.

    Raises:
        UsageError: not one number for each candidate.
    """
    try:
        given = list(losses)
    except TypeError as error:
        raise UsageError(f"tell takes one loss for each candidate, found {losses!r}") from error
    if len(given) != n_candidates:
        raise UsageError(f"{len(given)} losses told for {n_candidates} candidates asked")
    values = [_number(index, loss) for index, loss in enumerate(given)]
    return [value if math.isfinite(value) else math.nan for value in values]


def _number(index: int, loss: Any) -> float:
    try:
        if isinstance(loss, str | bytes):
            raise TypeError("text")
        return float(loss)
    except (TypeError, ValueError) as error:
        message = f"the loss of candidate {index} is not a number: {loss!r}"
        raise UsageError(message, hint="tell NaN for a candidate that failed") from error


def identity(problem: Problem, start: Choice | None, settings: Mapping[str, Any]) -> str:
    """A hash of everything that decides the course of a search, so that a state is not continued by another one.

    Args:
        problem: the plain one.
        start: an allocation of it, None where the search finds its own.
        settings: all arguments of the search, and its name; plain JSON.
    """
    nested = sorted((list(place), list(inside)) for place, inside in problem.nested.items())
    document = [dict(settings), dict(problem.budgets), problem.shape, nested]
    digest = hashlib.sha256(json.dumps(document).encode())
    for resource in sorted(problem.costs):
        digest.update(resource.encode() + problem.costs[resource].tobytes())
    if start is not None:
        digest.update(start.tobytes())
    return digest.hexdigest()


def check_identity(state: Mapping[str, Any], expected: str) -> None:
    """Raise UsageError if a saved state belongs to a search with another problem, start or settings."""
    if state.get("version") != 1 or state.get("identity") != expected:
        raise UsageError("the saved state belongs to a search with another problem, start or settings")
