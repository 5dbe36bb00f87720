"""When a search ends: the stop rules that every search shares."""

from __future__ import annotations

import math
from dataclasses import dataclass

from layerwise.errors import UsageError


@dataclass(frozen=True)
class Stop:
    """Rules that end a search; the first that applies does. One that is None never applies.

    `evaluations` and `tokens` are never exceeded: no round begins that could take the search above them, the closing
    round on all the data included. The first round and the closing round always run.

    Args:
        evaluations: candidates evaluated, one in several rounds counted several times.
        tokens: evaluated tokens, all candidates together. Needs the search's `total_tokens`.
        seconds: time since the search was made, with that before a stop and a restore, looked at after every tell. The
            one rule by which two runs may differ, because the machine decides.
        patience: so many rounds in a row (asks, or generations of several asks) without a better allocation.
        gap: the least loss is within this share of itself above `lower_bound`. Only losses measured on all of the data
            count, because a bound says nothing about a sample.
        lower_bound: what no allocation can go below, such as `branch(problem).lower_bound` of an additive problem.
    Raises:
        UsageError: a limit that is no number, or below the least that makes sense, or a gap without a bound.
    """

    evaluations: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    patience: int | None = None
    gap: float | None = None
    lower_bound: float | None = None

    def __post_init__(self) -> None:
        for name, least in {"evaluations": 1, "tokens": 1, "patience": 1, "seconds": 0, "gap": 0}.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # NaN included
                raise UsageError(f"stop after {name}: must be at least {least}, found {value}")
        if (self.gap is None) != (self.lower_bound is None):
            raise UsageError("stop at a gap: gap and lower_bound go together")
        if self.lower_bound is not None and not math.isfinite(self.lower_bound):
            raise UsageError(f"stop at a gap: the lower bound must be finite, found {self.lower_bound}")
