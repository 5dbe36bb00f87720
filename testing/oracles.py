"""Answers of allocation problems that share no code with the solvers: plain enumeration, and scipy's MILP."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from layerwise.solvers import Problem

TOLERANCE = 1e-9
"""Relative, on limits: what `Problem` documents."""


def absent(problem: Problem, choice: Sequence[int]) -> set[int]:
    """By definition: what a unit removes at its level or, if it is absent itself, at any, until nothing is added."""
    found: set[int] = set()
    while True:
        gone = [inside for (unit, level), inside in problem.nested.items() if unit in found or choice[unit] == level]
        if found.issuperset(more := {child for inside in gone for child in inside}):
            return found
        found |= more


def sums(problem: Problem, choice: Sequence[int]) -> dict[str, float]:
    """Loss and costs of an allocation by definition; `inf` if a present unit lacks its level."""
    assert problem.losses is not None
    gone = absent(problem, choice)
    here = [(unit, level) for unit, level in enumerate(choice) if unit not in gone]
    together = [loss for (a, b), loss in problem.interactions.items() if a in here and b in here]
    found = {resource: math.fsum(table[place] for place in here) for resource, table in problem.costs.items()}
    losses = problem.losses
    return {**found, "loss": math.fsum([*(losses[place] for place in here), *together])}


def limits(problem: Problem) -> dict[str, float]:
    """Every limit with its tolerance, that on the loss included."""
    given = {**problem.budgets, "loss": problem.max_loss}
    return {resource: limit + abs(limit) * TOLERANCE for resource, limit in given.items() if limit < math.inf}


def brute_force(problem: Problem) -> float | None:
    """The least objective of any allocation within the limits, None if there is none; by enumeration."""
    n_units, n_levels = problem.shape
    objectives = []
    for choice in itertools.product(range(n_levels), repeat=n_units):
        tied = all(len({choice[unit] for unit in group}) == 1 for group in problem.groups)
        found = sums(problem, choice)
        if tied and all(found[resource] <= limit for resource, limit in limits(problem).items()):
            objectives.append(found[problem.minimize])
    return min((objective for objective in objectives if math.isfinite(objective)), default=None)


def milp_optimum(problem: Problem) -> float | None:
    """The same by scipy's MILP, with ties as equations between the units and products as extra variables."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    assert problem.losses is not None
    n_units, n_levels = problem.shape
    n_switches, n_pairs = n_units * n_levels, len(problem.interactions)
    usable = problem.available.ravel()
    tables = {
        name: np.where(usable, table.ravel(), 0.0) for name, table in {**problem.costs, "loss": problem.losses}.items()
    }

    def at(place: tuple[int, int]) -> int:
        return place[0] * n_levels + place[1]

    def row(entries: Iterable[tuple[int, float]], low: float, high: float) -> Any:
        coefficients = np.zeros(n_switches + n_pairs)
        for index, value in entries:
            coefficients[index] += value
        return LinearConstraint(coefficients[None, :], low, high)

    removed: dict[int, set[int]] = {child: set() for child in range(n_units)}
    parents = {child: unit for (unit, _), inside in problem.nested.items() for child in inside}
    for (_, level), inside in problem.nested.items():
        for child in inside:
            removed[child].add(level)
    rows = []
    for unit in range(n_units):  # present if its parent is at a level that keeps it
        kept = set(range(n_levels)) - removed[unit] if unit in parents else set()
        chosen = [(at((unit, level)), 1.0) for level in range(n_levels)]
        outer = float(unit not in parents)
        rows.append(row([*chosen, *((at((parents[unit], level)), -1.0) for level in kept)], outer, outer))
    for group in problem.groups:
        for (first, second), level in itertools.product(itertools.pairwise(group), range(n_levels)):
            rows.append(row([(at((first, level)), 1), (at((second, level)), -1)], 0, 0))
    together = list(enumerate(problem.interactions.items(), start=n_switches))
    for y, ((a, b), _) in together:  # y = x_a x_b
        rows += [row([(y, 1), (at(a), -1)], -np.inf, 0), row([(y, 1), (at(b), -1)], -np.inf, 0)]
        rows.append(row([(at(a), 1), (at(b), 1), (y, -1)], -np.inf, 1))
    added: dict[str, list[tuple[int, float]]] = {
        name: list(enumerate(table.tolist())) for name, table in tables.items()
    }
    added["loss"] += [(y, loss) for y, (_, loss) in together]
    rows += [row(added[resource], -np.inf, limit) for resource, limit in limits(problem).items()]
    answer = milp(
        row(added[problem.minimize], 0, 0).A[0],
        constraints=rows,
        integrality=np.ones(n_switches + n_pairs),
        bounds=Bounds(0, np.concatenate([usable, np.ones(n_pairs)])),
        options={"mip_rel_gap": 0},
    )
    if answer.x is None:
        return None
    choice = answer.x[:n_switches].reshape(n_units, n_levels).argmax(axis=1).tolist()
    return sums(problem, choice)[problem.minimize]
