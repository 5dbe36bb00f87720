"""Random allocation problems, drawn by hypothesis, which is needed for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from layerwise.solvers import Problem

Draw = Callable[[st.SearchStrategy[Any]], Any]


@st.composite
def problems(
    draw: Draw,
    n_budgets: int = 1,
    max_units: int = 5,
    max_levels: int = 4,
    real: bool = False,
    negative: bool = False,
    nested: int = 0,
    interactions: bool = False,
    reverse: bool = False,
) -> Problem:
    """Small whole numbers, so that ties, zero costs and tight budgets are common; or any real numbers.

    Args:
        draw: from hypothesis.
        n_budgets: how many resources, each with a budget.
        max_units: at most so many units.
        max_levels: at most so many levels.
        real: any real numbers.
        negative: losses below zero, too.
        nested: the greatest depth of nesting.
        interactions: pairs of units that lose more, or less, together.
        reverse: the least cost within a loss.
    """
    n_units, n_levels = draw(st.integers(1, max_units)), draw(st.integers(1, max_levels))
    cost: st.SearchStrategy[Any] = st.floats(0, 1e9) if real else st.integers(0, 8)
    loss: st.SearchStrategy[Any] = st.floats(0, 1e3)
    if not real:
        loss = st.integers(-6 if negative else 0, 12).map(lambda n: n / 4)
    level, unit = st.integers(0, n_levels - 1), st.integers(0, n_units - 1)

    def table(numbers: st.SearchStrategy[Any]) -> NDArray[np.float64]:
        row = st.lists(numbers, min_size=n_levels, max_size=n_levels)
        return np.array(draw(st.lists(row, min_size=n_units, max_size=n_units)), dtype=float)

    losses, costs = table(loss), {f"resource{index}": table(cost) for index in range(n_budgets)}
    missing = table(st.integers(0, 5)) == 0
    common = draw(level)
    missing[:, common] = False  # one level that all units have, so that any group has one
    losses[missing] = np.inf
    groups = [[0, n_units - 1]] if n_units > 2 and draw(st.booleans()) else []
    groups += [[1, n_units - 2]] if groups and nested > 1 and n_units > 4 and draw(st.booleans()) else []
    tables: dict[str, Any] = {
        "costs": costs,
        "losses": losses,
        "groups": groups,
        "fixed": {draw(unit): common} if draw(st.integers(0, 4)) == 0 else {},
        "nested": draw(_nesting(n_units, n_levels, groups, nested)) if nested else {},
        "interactions": draw(_interactions(n_units, n_levels)) if interactions else {},
    }

    def limit(amounts: NDArray[np.float64], reachable: tuple[float, float]) -> float:
        least, most = reachable
        some = np.where(np.isfinite(amounts), amounts, 0)[:, draw(level)].sum()  # often one that is met exactly
        return float(draw(st.sampled_from([least, some, most, (least + most) / 2, least * 0.5, some * 0.9])))

    loose = Problem(**tables)
    budgets = {resource: limit(amounts, loose.reachable(resource)) for resource, amounts in costs.items()}
    if not reverse:
        return Problem(**tables, budgets=budgets)
    if n_budgets == 1 or draw(st.booleans()):  # else also a limit on what is minimised
        del budgets["resource0"]
    max_loss = limit(losses, loose.reachable("loss"))
    return Problem(**tables, budgets=budgets, minimize="resource0", max_loss=max_loss)


@st.composite
def _nesting(
    draw: Draw, n_units: int, n_levels: int, groups: Sequence[Sequence[int]], depth: int
) -> Mapping[tuple[int, int], list[int]]:
    """A random forest, in which a unit is absent at any of its parent's levels; tied ones always together."""
    tied = {unit: group for group in groups for unit in group}
    sets: list[Sequence[int]] = [*groups, *([unit] for unit in range(n_units) if unit not in tied)]
    depths: dict[int, int] = {}
    nested: dict[tuple[int, int], list[int]] = {}
    for members in draw(st.permutations(sets)):
        parents = [unit for unit, below in depths.items() if below < depth]
        parent = draw(st.sampled_from([None, *parents, *parents]))
        depths |= dict.fromkeys(members, 0 if parent is None else depths[parent] + 1)
        if parent is None:
            continue
        levels = draw(st.lists(st.integers(0, n_levels - 1), min_size=1, max_size=n_levels, unique=True))
        for unit in members:  # in one and the same unit, or in tied ones
            above = draw(st.sampled_from(tied.get(parent, [parent])))
            for level in levels:
                nested.setdefault((above, level), []).append(unit)
    return nested


@st.composite
def _interactions(draw: Draw, n_units: int, n_levels: int) -> Mapping[tuple[tuple[int, int], tuple[int, int]], float]:
    place = st.tuples(st.integers(0, n_units - 1), st.integers(0, n_levels - 1))
    drawn = draw(st.lists(st.tuples(place, place), max_size=5))
    pairs = {(min(pair), max(pair)) for pair in drawn if pair[0][0] != pair[1][0]}
    return {pair: draw(st.integers(-8, 8)) / 4 for pair in sorted(pairs)}
