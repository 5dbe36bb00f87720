"""Pareto geometry: which points no other one beats, and how good a frontier is.

A point is one allocation, a coordinate one thing to minimise: bytes, milliseconds, loss. Everything here is geometry
over arrays (points, coordinates) and knows nothing of problems, so it serves measured results as well as solvers.

A point with a NaN is unknown: it is on no front and adds nothing. Infinite coordinates are coordinates like others. All
functions are exact. Only `non_dominated` is made for many thousands of points; `non_dominated_ranks` takes O(n^2)
from three coordinates on, and `hypervolume` grows with the power of the coordinates, as every exact method does.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerwise.errors import UsageError


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point beats, every coordinate to be minimised.

    A point is beaten by one that is nowhere larger and somewhere smaller. Equal points do not beat each other, so
    either all of them are on the front or none.

    Args:
        points: (n, d). A point with a NaN is never on the front and beats nobody.
    Returns:
        (n,), True on the front. Two dimensions take O(n log n), others O(n) for each point of the front.
    """
    points = _points(points)
    known = ~np.isnan(points).any(axis=1)
    distinct, place = _distinct(points[known])
    front = np.zeros(len(points), dtype=np.bool_)
    front[known] = _front(distinct)[place]
    return front


def non_dominated_ranks(points: ArrayLike) -> NDArray[np.int64]:
    """The number of the front that each point is on, when front after front is taken away.

    Args:
        points: (n, d), every coordinate to be minimised.
    Returns:
        (n,). Rank 0 is the front (`non_dominated`); a point of rank r is beaten by one of rank r - 1 and by none of its
        own or a higher rank. Points with a NaN come last, all in one rank that is never 0.
    Source: Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II" (2002), section III-A. In two
        dimensions the sweep of Jensen (2003), O(n log n).
    """
    points = _points(points)
    known = ~np.isnan(points).any(axis=1)
    distinct, place = _distinct(points[known])
    ranks = np.zeros(len(points), dtype=np.int64)
    ranks[known] = (_ranks_by_sweep(distinct) if points.shape[1] == 2 else _ranks_by_pairs(distinct))[place]
    ranks[~known] = ranks.max(initial=0) + 1
    return ranks


def crowding_distance(points: ArrayLike) -> NDArray[np.float64]:
    """How alone each point of a front is: the summed sides of the box between its neighbours.

    Args:
        points: (n, d), the points of one front.
    Returns:
        (n,), each coordinate counted in units of its range; inf for the points at the two ends of a coordinate. A
        coordinate that is the same everywhere counts for nothing. Of equal points the first has the distance, and the
        others have 0, because a front loses nothing with them; so have points with a NaN or inf.
    Source: Deb et al. (2002), section III-B. There equal points share the distance by the accident of their order.
    """
    points = _points(points)
    distance = np.zeros(len(points))
    finite = np.flatnonzero(np.isfinite(points).all(axis=1))
    distinct, place = _distinct(points[finite])
    firsts = np.unique(place, return_index=True)[1]
    distance[finite[firsts]] = _crowding(distinct)
    return distance


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """The volume of what a set of points dominates, up to a reference point; larger is better.

    Args:
        points: (n, d), every coordinate to be minimised. Points that are not below the reference in every coordinate
            add nothing.
        reference: (d,), finite: the worst that still counts. Volumes are comparable only under the same reference.
    Returns:
        The exact volume but for rounding, about n times 1e-16 of it; 0 without points, inf with a coordinate of -inf.
    Raises:
        UsageError: the reference is not finite or has other coordinates than the points.
    Source: in two dimensions a sweep; above, the exclusive volumes of WFG, one coordinate sliced off at each step:
        While, Bradstreet, Barone, "A fast way of calculating exact hypervolumes" (2012).
    """
    points, reference = _points(points), np.asarray(reference, dtype=np.float64)
    if not np.isfinite(reference).all():
        raise UsageError(f"the reference point must be finite, found {reference.tolist()}")
    if not len(points):
        return 0.0
    if reference.shape != points.shape[1:]:
        raise UsageError(f"the reference point has shape {reference.shape}, but points have {points.shape[1]} numbers")
    inside = points[(points < reference).all(axis=1)]  # False for NaN
    if np.isneginf(inside).any():
        return math.inf
    return _volume(inside - reference)


def knee(x: ArrayLike, y: ArrayLike) -> int | None:
    """Where a falling curve bends most: the point furthest below the straight line between its two ends.

    Both axes are first scaled to [0, 1], so their units do not matter. The measure is linear in y, because a loss
    counts by its amount. Give `np.log(y)` for the bend that the curve has on a logarithmic axis, where an exponential
    decay is straight.

    Args:
        x: (n,) costs of the points of a front, or numbers of the values of a spectrum, in any order.
        y: (n,) their losses. A point that is not finite in both is left out.
    Returns:
        The index of the knee (the first of several equal points), or None if no point lies below the line: with fewer
        than three different points, or a curve that bends outwards.
    Raises:
        UsageError: x and y differ in length.
    Source: the chord construction of Das, "On characterizing the knee of the Pareto curve" (1999), in two dimensions;
        the scaling as in Kneedle (Satopää et al., 2011).
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise UsageError(f"a curve has as many x as y, found shapes {x.shape} and {y.shape}")
    finite = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    x, y = x[finite], y[finite]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    below = 1 - (x - x.min()) / np.ptp(x) - (y - y.min()) / np.ptp(y)  # the line from (0, 1) to (1, 0), times sqrt(2)
    best = int(np.argmax(below))
    return int(finite[best]) if below[best] > 1e-12 else None  # rounding alone stays far below this


@dataclass(frozen=True)
class Comparison:
    """Two frontiers a and b, each measured by the other.

    Args:
        epsilon_ab: the additive epsilon of a over b: the least amount that, taken off every coordinate of a, lets a
            dominate or equal all of b. At most 0 means that a already does.
        epsilon_ba: the same of b over a. Equal fronts have 0 both ways; where both are positive, neither front is
            better everywhere.
        coverage_ab: the share of the points of b that some point of a dominates or equals.
        coverage_ba: the share of the points of a that some point of b dominates or equals.
    """

    epsilon_ab: float
    epsilon_ba: float
    coverage_ab: float
    coverage_ba: float


def compare(a: ArrayLike, b: ArrayLike) -> Comparison:
    """Compare two frontiers.

    An epsilon is one amount for all coordinates: bring them to a common scale first (`compare(a / scale, b / scale)`)
    where they have different units. The coverage does not depend on the scale.

    Args:
        a: (n, d), every coordinate to be minimised. Points off the front, or with a NaN, are left out.
        b: (m, d), likewise.
    Raises:
        UsageError: a set without a front, or sets of different dimensions.
    Source: additive epsilon: Zitzler et al., "Performance assessment of multiobjective optimizers" (2003), section
        IV-B; coverage: Zitzler and Thiele, "Multiobjective optimization using evolutionary algorithms" (1998).
    """
    a, b = _points(a), _points(b)
    a, b = a[non_dominated(a)], b[non_dominated(b)]
    if not len(a) or not len(b):
        raise UsageError(f"a frontier to be compared needs points, found {len(a)} and {len(b)}")
    if a.shape[1] != b.shape[1]:
        raise UsageError(f"the two frontiers have {a.shape[1]} and {b.shape[1]} coordinates")
    lead, trail = _excess(a, b), _excess(b, a)
    return Comparison(
        epsilon_ab=float(lead.max()),
        epsilon_ba=float(trail.max()),
        coverage_ab=float((lead <= 0).mean()),
        coverage_ba=float((trail <= 0).mean()),
    )


def _excess(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """(m,): by how much the points of a must at least be lowered for one of them to reach each point of b."""
    columns = a.T.copy()  # (d, n): numpy is slow along short rows

    def least_above(point: NDArray[np.float64]) -> float:
        above = np.where(columns == point[:, None], 0.0, columns - point[:, None])
        return float(above.max(axis=0).min())

    with np.errstate(invalid="ignore"):  # inf - inf, which counts as 0
        return np.array([least_above(point) for point in b])


def _points(points: ArrayLike) -> NDArray[np.float64]:
    """(n, d); an empty list is no points of one coordinate."""
    array = np.asarray(points, dtype=np.float64)
    if array.shape == (0,):
        return array.reshape(0, 1)
    if array.ndim != 2 or not array.shape[1]:
        raise UsageError(f"points are an array (points, coordinates), found shape {array.shape}")
    return array


def _distinct(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """The different points in lexicographic order, so that none is beaten by a later one, and the place of each."""
    order = np.lexsort(points.T[::-1])
    ordered = points[order]
    new = np.ones(len(points), dtype=np.bool_)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    place = np.empty(len(points), dtype=np.intp)
    place[order] = np.cumsum(new) - 1
    return ordered[new], place


def _front(distinct: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The front of different points in lexicographic order."""
    front = np.zeros(len(distinct), dtype=np.bool_)
    if distinct.shape[1] == 2:  # each point that is lower than all further left
        y = distinct[:, 1]
        front[:1], front[1:] = True, y[1:] < np.minimum.accumulate(y)[:-1]
        return front
    left = np.arange(len(distinct))
    while len(left):  # the first of those left is on the front; only those that are better somewhere stay
        front[left[0]] = True
        left = left[(distinct[left] < distinct[left[0]]).any(axis=1)]
    return front


def _ranks_by_sweep(distinct: NDArray[np.float64]) -> NDArray[np.int64]:
    """From left to right: a point is beaten by every front that has already come as low as the point."""
    ranks = np.empty(len(distinct), dtype=np.int64)
    lowest: list[float] = []  # y of each front, rising with the rank
    for index, y in enumerate(distinct[:, 1].tolist()):
        rank = bisect_right(lowest, y)
        lowest[rank : rank + 1] = [y]
        ranks[index] = rank
    return ranks


def _ranks_by_pairs(distinct: NDArray[np.float64]) -> NDArray[np.int64]:
    """One more than the highest rank of those that beat the point, all of which stand before it."""
    ranks = np.empty(len(distinct), dtype=np.int64)
    for index, point in enumerate(distinct):
        beaten_by = (distinct[:index] <= point).all(axis=1)
        ranks[index] = ranks[:index][beaten_by].max(initial=-1) + 1
    return ranks


def _crowding(distinct: NDArray[np.float64]) -> NDArray[np.float64]:
    """Crowding distances of different, finite points."""
    if len(distinct) < 3:
        return np.full(len(distinct), np.inf)
    distance = np.zeros(len(distinct))
    for values in distinct.T:
        order = np.argsort(values, kind="stable")
        span = values[order[-1]] - values[order[0]]
        if span > 0:
            distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / span
            distance[order[[0, -1]]] = np.inf
    return distance


def _volume(points: NDArray[np.float64]) -> float:
    """The volume between points that are all negative and the origin."""
    points = _distinct(points)[0]
    points = points[_front(points)]
    if points.shape[1] == 1:
        return -float(points.min(initial=0.0))
    if points.shape[1] == 2:  # from left to right, each point adds the rectangle below the one before
        x, y = points.T
        return float(-x @ -np.diff(y, prepend=0.0))
    points = points[np.argsort(points[:, -1])[::-1]]  # from the worst to the best in the last coordinate
    base, height = points[:, :-1], -points[:, -1]
    alone = [  # the base that no later point covers; later ones reach at least as high
        abs(float(np.prod(base[index]))) - _volume(np.maximum(base[index + 1 :], base[index]))
        for index in range(len(points))
    ]
    return math.fsum(height * alone)
