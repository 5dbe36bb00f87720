"""Times that were not measured, read off those that were: a line over bytes, a rising curve over rows.

A product's time is t0 + bytes / bandwidth: what a launch costs, and what reading the weight costs. The line is fitted
by least absolute deviation, which one bad row does not bend, and carries the error it makes on a shape that it has not
seen. In the number of rows m, times are first made rising (isotonic regression: more work is never faster, a dip is
noise), then joined by straight lines in log-log. They are never joined across a number of rows where a kernel changes
its way of working, nor beyond what was measured.

Whatever comes from here is `fitted`, and only stands in for rows that are missing.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from layerwise.errors import UsageError
from layerwise.kernels.latency_table import Row


@dataclass(frozen=True)
class Affine:
    """t = t0 + bytes / bandwidth.

    Args:
        t0_ms: what every product costs, at least 0.
        bytes_per_ms: what is read in a millisecond; inf if time does not grow with the bytes.
        error: median of |fitted - measured| / measured over shapes left out of the fit in turn; nan with two shapes.
        worst: the greatest of them.
        shapes: how many the fit rests on.
    """

    t0_ms: float
    bytes_per_ms: float
    error: float
    worst: float
    shapes: int

    def milliseconds(self, size_bytes: float) -> float:
        """The time of a weight of so many bytes."""
        return self.t0_ms + size_bytes / self.bytes_per_ms

    @property
    def gigabytes_per_second(self) -> float:
        """The bandwidth in the usual unit."""
        return self.bytes_per_ms / 1e6


def fit_affine(points: Sequence[tuple[float, float]]) -> Affine:
    """Fit a line through times by least absolute deviation.

    Args:
        points: (bytes, ms), one per shape, of at least two different sizes.
    Returns:
        the line with the least sum of |fitted - measured| among those that neither fall nor start below 0, and its
        error on shapes left out.
    Raises:
        UsageError: fewer than two sizes.
    """
    if len({size for size, _ in points}) < 2:
        raise UsageError(
            f"a line through times needs at least two sizes of weights, not {len({s for s, _ in points})}",
            hint="measure another shape",
        )
    t0, slope = _line(points)
    errors = []
    if len(points) > 2:
        for left_out, (size, ms) in enumerate(points):
            rest = [point for place, point in enumerate(points) if place != left_out]
            if len({s for s, _ in rest}) > 1:
                start, rise = _line(rest)
                errors.append(abs(start + rise * size - ms) / ms)
    return Affine(
        t0_ms=t0,
        bytes_per_ms=1 / slope if slope else math.inf,
        error=statistics.median(errors) if errors else math.nan,
        worst=max(errors, default=math.nan),
        shapes=len(points),
    )


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(t0, slope), both at least 0.

    A line of least absolute deviation goes through two of the points, or, where a bound holds, through one: then it
    starts at 0 or does not rise. So trying them all finds it, and tables have few shapes.
    """
    lines = [(0.0, ms / size) for size, ms in points] + [(ms, 0.0) for _, ms in points]
    for (size, ms), (other, other_ms) in combinations(points, 2):
        if size != other:
            slope = (other_ms - ms) / (other - size)
            lines.append((ms - slope * size, slope))
    return min(
        ((t0, slope) for t0, slope in lines if t0 >= 0 and slope >= 0),
        key=lambda line: (sum(abs(line[0] + line[1] * size - ms) for size, ms in points), line),
    )


def fit_rows(rows: Sequence[Row]) -> dict[tuple[str, str, int, str], Affine]:
    """A line for each (backend, label, m, dtype) that was measured at two sizes or more."""
    grouped: dict[tuple[str, str, int, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.status == "measured":
            key = (row.backend, row.label, row.m, row.dtype)
            grouped.setdefault(key, []).append((row.size_bytes, row.median_ms))
    return {key: fit_affine(points) for key, points in grouped.items() if len({size for size, _ in points}) > 1}


def isotonic(values: Sequence[float]) -> list[float]:
    """The nearest values, in the sum of squares, of which none is below the one before (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (first, n_first), (second, n_second) = pools[-2:]
            pools[-2:] = [((first * n_first + second * n_second) / (n_first + n_second), n_first + n_second)]
    return [value for value, count in pools for _ in range(count)]


def interpolate_rows(times: Mapping[int, float], m: int, boundaries: Sequence[int] = ()) -> float | None:
    """The time at m rows, between numbers of rows that were measured.

    Args:
        times: ms by rows.
        m: rows, not among them as a rule.
        boundaries: numbers of rows after which the kernel works in another way.
    Returns:
        ms; None if m lies outside what was measured, or a boundary lies between its neighbours.
    """
    known = sorted(times)
    rising = dict(zip(known, isotonic([times[rows] for rows in known]), strict=True))
    if m in rising:
        return rising[m]
    for below, above in pairwise(known):
        if below < m < above and bisect_left(boundaries, below) == bisect_left(boundaries, above):
            share = math.log(m / below) / math.log(above / below)
            return math.exp((1 - share) * math.log(rising[below]) + share * math.log(rising[above]))
    return None
