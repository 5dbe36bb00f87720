"""Published rules for how dense each layer should be, said as losses: whoever minimises their sum within a budget of
density gets what the rule asks for, as nearly as there are levels for it.

    erk   density in proportion to e = (out + in) / (out · in)            n e log(1 / d)
    owl   density 1 - S + t - mean t, t = 2λ r / (max r - min r)          n exp(-s (d - t)) / s

for a unit of n weights at density d. Where the sum is least within a budget, one weight more is worth the same in every
unit: n e / d and n exp(-s (d - t)) over n. So d is in proportion to e, and at most 1, or d - t is the same for all; the
budget finds the constant that papers solve for. Both are convex, and bend so much that levels which fill a budget to
the last weight do not outbid those which follow the rule.

Sources: ERK, arXiv:1911.11134, section 3; OWL, arXiv:2310.05175, section 3.2.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from layerwise.stages.levels.database import LevelEntry, UnitEntry

LAMBDA = 0.08
"""OWL's λ: how far a layer's density may be from the mean of all."""

STEEPNESS = 20.0
"""s: large, so that the rule counts for more than filling the budget; exp(s) is still a number for solvers."""


def erk_losses(units: Sequence[UnitEntry]) -> list[list[float | None]]:
    """ERK's loss of every level of every unit; None of those that are of no weight."""

    def loss(unit: UnitEntry, d: float) -> float:
        n = _weights(unit)
        return sum(unit.unit.shape) * math.log(1 / max(d, 0.5 / n))  # n e = out + in; nothing left is half a weight

    return _losses(units, loss)


def owl_losses(units: Sequence[UnitEntry], outliers: Mapping[str, tuple[int, int]]) -> list[list[float | None]]:
    """OWL's loss of every level of every unit; None of those that are of no weight.

    Args:
        units: the units. Those of a block are a layer of the paper.
        outliers: by unit, how many of its weights are outliers, and how many it has.
    """
    found: defaultdict[int | None, list[tuple[int, int]]] = defaultdict(list)
    for unit in units:
        if unit.name in outliers:
            found[unit.unit.block].append(outliers[unit.name])
    r = {layer: sum(n for n, _ in counts) / sum(n for _, n in counts) for layer, counts in found.items()}
    least, most = min(r.values(), default=0.0), max(r.values(), default=0.0)
    scale = 2 * LAMBDA / (most - least) if most > least else 0.0

    def loss(unit: UnitEntry, d: float) -> float:
        t = scale * (r[unit.unit.block] - least)
        return _weights(unit) * math.exp(-STEEPNESS * (d - t)) / STEEPNESS

    return _losses(units, loss)


def _losses(units: Sequence[UnitEntry], loss: Callable[[UnitEntry, float], float]) -> list[list[float | None]]:
    densities = [[(unit, density(unit, level)) for level in unit.levels] for unit in units]
    return [[None if d is None else loss(unit, d) for unit, d in levels] for levels in densities]


def density(unit: UnitEntry, level: LevelEntry) -> float | None:
    """The share of a unit's weights that a level keeps; None if it could not be made or is of no weight."""
    if not _weights(unit) or level.costs is None:
        return None
    return level.costs["parameters"] / _weights(unit)


def _weights(unit: UnitEntry) -> int:
    rows, columns = unit.unit.shape
    return 0 if unit.unit.is_parent else rows * columns
