"""Random problems, and oracles that share no code with the solvers: plain enumeration and scipy's MILP."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from layerwise.solvers import Problem

TOLERANCE = 1e-9  # relative, on budgets: what Problem documents


def _within(problem: Problem, choice: tuple[int, ...]) -> bool:
    tied = all(len({choice[unit] for unit in group}) == 1 for group in problem.groups)
    return tied and all(
        math.fsum(table[unit, level] for unit, level in enumerate(choice))
        <= problem.budgets.get(resource, math.inf) * (1 + TOLERANCE)
        for resource, table in problem.costs.items()
    )


def _brute_force(problem: Problem) -> float | None:
    n_units, n_levels = problem.shape
    losses = [
        math.fsum(problem.losses[unit, level] for unit, level in enumerate(choice))
        for choice in itertools.product(range(n_levels), repeat=n_units)
        if _within(problem, choice)
    ]
    return min((loss for loss in losses if math.isfinite(loss)), default=None)


def _milp_optimum(problem: Problem) -> float | None:
    n_units, n_levels = problem.shape
    usable = problem.available.ravel()
    rows = [LinearConstraint(np.kron(np.eye(n_units), np.ones(n_levels)), 1, 1)]
    for resource, budget in problem.budgets.items():
        costs = np.where(usable, problem.costs[resource].ravel(), 0.0)
        rows.append(LinearConstraint(costs[None, :], -np.inf, budget * (1 + TOLERANCE)))
    for group in problem.groups:
        for first, second in itertools.pairwise(group):
            same = np.zeros((n_levels, n_units, n_levels))
            for level in range(n_levels):
                same[level, first, level], same[level, second, level] = 1, -1
            rows.append(LinearConstraint(same.reshape(n_levels, -1), 0, 0))
    losses = np.where(usable, problem.losses.ravel(), 0.0)
    answer = milp(
        losses,
        constraints=rows,
        integrality=np.ones(losses.size),
        bounds=Bounds(0, usable.astype(float)),
        options={"mip_rel_gap": 0},
    )
    if answer.x is None:
        return None
    choice = answer.x.reshape(n_units, n_levels).argmax(axis=1)
    return math.fsum(problem.losses[np.arange(n_units), choice])


@st.composite
def _problems(draw, n_budgets=1, max_units=5, max_levels=4, real=False):
    """Small whole numbers, so that ties, zero costs and tight budgets are common; or any real numbers."""
    n_units, n_levels = draw(st.integers(1, max_units)), draw(st.integers(1, max_levels))
    cost = st.floats(0, 1e9) if real else st.integers(0, 8)
    loss = st.floats(0, 1e3) if real else st.integers(0, 12).map(lambda n: n / 4)

    def table(numbers):
        row = st.lists(numbers, min_size=n_levels, max_size=n_levels)
        return np.array(draw(st.lists(row, min_size=n_units, max_size=n_units)), dtype=float)

    losses, costs = table(loss), {f"resource{index}": table(cost) for index in range(n_budgets)}
    missing = table(st.integers(0, 5)) == 0
    missing[:, draw(st.integers(0, n_levels - 1))] = False  # one level that all units have, so that any group has one
    losses[missing] = np.inf
    groups = [[0, n_units - 1]] if n_units > 2 and draw(st.booleans()) else []
    problem = Problem(costs=costs, losses=losses, groups=groups)
    budgets = {}
    for resource, amounts in costs.items():
        least, most = problem.reachable(resource)
        some = amounts[:, draw(st.integers(0, n_levels - 1))].sum()  # often a budget that is met exactly
        budgets[resource] = draw(st.sampled_from([least, some, most, (least + most) / 2, least * 0.5, some * 0.9]))
    return Problem(costs=costs, losses=losses, groups=groups, budgets=budgets)


@pytest.fixture(scope="session")
def problems() -> Callable[..., st.SearchStrategy[Problem]]:
    return _problems


@pytest.fixture(scope="session")
def brute_force() -> Callable[[Problem], float | None]:
    """The least loss of any allocation within the budgets, None if there is none; by enumeration."""
    return _brute_force


@pytest.fixture(scope="session")
def milp_optimum() -> Callable[[Problem], float | None]:
    """The same by scipy's MILP, with ties as equations between the units."""
    return _milp_optimum


@pytest.fixture(scope="session")
def random_tables() -> Callable[..., Problem]:
    """Real-valued tables like a model's: layers of some sizes, costs that rise and losses that fall by level."""

    def make(n_units: int, n_levels: int, seed: int, budget: float = 0.4, n_budgets: int = 1) -> Problem:
        rng = np.random.default_rng(seed)
        sizes = rng.choice([1.0, 3.0, 3.5], n_units)[:, None]
        bits = np.arange(2, 2 + n_levels)
        costs = {
            f"resource{index}": sizes * bits * rng.uniform(0.9, 1.1, (n_units, n_levels)) for index in range(n_budgets)
        }
        losses = rng.lognormal(0, 1, n_units)[:, None] * 4.0**-bits * rng.uniform(0.7, 1.3, (n_units, n_levels))
        problem = Problem(costs=costs, losses=losses)
        ends = {resource: problem.reachable(resource) for resource in costs}
        return Problem(
            costs=costs, losses=losses, budgets={r: low + budget * (high - low) for r, (low, high) in ends.items()}
        )

    return make


@pytest.fixture
def tied_units() -> Problem:
    """Two attention projections that must share a level, and a third unit; the shared level costs and hurts twice."""
    return Problem(
        costs={"bits": np.array([[2.0, 4.0], [2.0, 4.0], [3.0, 6.0]])},
        losses=np.array([[5.0, 1.0], [0.5, 0.25], [4.0, 1.0]]),
        budgets={"bits": 11.0},
        groups=[[0, 1]],
        units=["q", "k", "o"],
        levels=["2b", "4b"],
    )
