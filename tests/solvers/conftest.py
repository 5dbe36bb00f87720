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


def _absent(problem: Problem, choice) -> set[int]:
    """By definition: what a unit removes at its level or, if it is absent itself, at any, until nothing is added."""
    absent: set[int] = set()
    while True:
        gone = [inside for (u, level), inside in problem.nested.items() if u in absent or choice[u] == level]
        if absent.issuperset(more := {child for inside in gone for child in inside}):
            return absent
        absent |= more


def _sums(problem: Problem, choice) -> dict[str, float]:
    """Loss and costs of an allocation by definition; `inf` if a present unit lacks its level."""
    absent = _absent(problem, choice)
    here = [(unit, level) for unit, level in enumerate(choice) if unit not in absent]
    together = [loss for (a, b), loss in problem.interactions.items() if a in here and b in here]
    sums = {resource: math.fsum(table[place] for place in here) for resource, table in problem.costs.items()}
    return {**sums, "loss": math.fsum([*(problem.losses[place] for place in here), *together])}


def _limits(problem: Problem) -> dict[str, float]:
    limits = {**problem.budgets, "loss": problem.max_loss}
    return {resource: limit + abs(limit) * TOLERANCE for resource, limit in limits.items() if limit < math.inf}


def _brute_force(problem: Problem) -> float | None:
    n_units, n_levels = problem.shape
    objectives = []
    for choice in itertools.product(range(n_levels), repeat=n_units):
        tied = all(len({choice[unit] for unit in group}) == 1 for group in problem.groups)
        sums = _sums(problem, choice)
        if tied and all(sums[resource] <= limit for resource, limit in _limits(problem).items()):
            objectives.append(sums[problem.minimize])
    return min((objective for objective in objectives if math.isfinite(objective)), default=None)


def _milp_optimum(problem: Problem) -> float | None:
    n_units, n_levels = problem.shape
    n_switches, n_pairs = n_units * n_levels, len(problem.interactions)
    usable = problem.available.ravel()
    tables = {**problem.costs, "loss": problem.losses}
    tables = {name: np.where(usable, table.ravel(), 0.0) for name, table in tables.items()}

    def at(place):
        return place[0] * n_levels + place[1]

    def row(entries, low, high):
        coefficients = np.zeros(n_switches + n_pairs)
        for index, value in entries:
            coefficients[index] += value
        return LinearConstraint(coefficients[None, :], low, high)

    removed = {child: set() for child in range(n_units)}
    parents = {child: unit for (unit, _), inside in problem.nested.items() for child in inside}
    for (_, level), inside in problem.nested.items():
        for child in inside:
            removed[child].add(level)
    rows = []
    for unit in range(n_units):  # present if its parent is at a level that keeps it
        kept = set(range(n_levels)) - removed[unit] if unit in parents else []
        chosen = [(at((unit, level)), 1) for level in range(n_levels)]
        rows.append(row([*chosen, *((at((parents[unit], level)), -1) for level in kept)], *[unit not in parents] * 2))
    for group in problem.groups:
        for (first, second), level in itertools.product(itertools.pairwise(group), range(n_levels)):
            rows.append(row([(at((first, level)), 1), (at((second, level)), -1)], 0, 0))
    together = list(enumerate(problem.interactions.items(), start=n_switches))
    for y, ((a, b), _) in together:  # y = x_a x_b
        rows += [row([(y, 1), (at(a), -1)], -np.inf, 0), row([(y, 1), (at(b), -1)], -np.inf, 0)]
        rows.append(row([(at(a), 1), (at(b), 1), (y, -1)], -np.inf, 1))
    added = {name: [*enumerate(table)] for name, table in tables.items()}
    added["loss"] += [(y, loss) for y, (_, loss) in together]
    rows += [row(added[resource], -np.inf, limit) for resource, limit in _limits(problem).items()]
    answer = milp(
        row(added[problem.minimize], 0, 0).A[0],
        constraints=rows,
        integrality=np.ones(n_switches + n_pairs),
        bounds=Bounds(0, np.concatenate([usable, np.ones(n_pairs)])),
        options={"mip_rel_gap": 0},
    )
    if answer.x is None:
        return None
    return _sums(problem, answer.x[:n_switches].reshape(n_units, n_levels).argmax(axis=1).tolist())[problem.minimize]


@st.composite
def _problems(
    draw,
    n_budgets=1,
    max_units=5,
    max_levels=4,
    real=False,
    negative=False,
    nested=0,
    interactions=False,
    reverse=False,
):
    """Small whole numbers, so that ties, zero costs and tight budgets are common; or any real numbers.

    `nested` is the greatest depth.
    """
    n_units, n_levels = draw(st.integers(1, max_units)), draw(st.integers(1, max_levels))
    cost = st.floats(0, 1e9) if real else st.integers(0, 8)
    loss = st.floats(0, 1e3) if real else st.integers(-6 if negative else 0, 12).map(lambda n: n / 4)
    level, unit = st.integers(0, n_levels - 1), st.integers(0, n_units - 1)

    def table(numbers):
        row = st.lists(numbers, min_size=n_levels, max_size=n_levels)
        return np.array(draw(st.lists(row, min_size=n_units, max_size=n_units)), dtype=float)

    losses, costs = table(loss), {f"resource{index}": table(cost) for index in range(n_budgets)}
    missing = table(st.integers(0, 5)) == 0
    common = draw(level)
    missing[:, common] = False  # one level that all units have, so that any group has one
    losses[missing] = np.inf
    groups = [[0, n_units - 1]] if n_units > 2 and draw(st.booleans()) else []
    groups += [[1, n_units - 2]] if groups and nested > 1 and n_units > 4 and draw(st.booleans()) else []
    binding = {
        "groups": groups,
        "fixed": {draw(unit): common} if draw(st.integers(0, 4)) == 0 else {},
        "nested": draw(_nesting(n_units, n_levels, groups, nested)) if nested else {},
        "interactions": draw(_interactions(n_units, n_levels)) if interactions else {},
    }
    tables = {"costs": costs, "losses": losses, **binding}

    def limit(amounts, reachable):
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
def _nesting(draw, n_units, n_levels, groups, depth):
    """A random forest, in which a unit is absent at any of its parent's levels; tied ones always together."""
    tied = {unit: group for group in groups for unit in group}
    sets = [*groups, *([unit] for unit in range(n_units) if unit not in tied)]
    depths, nested = {}, {}
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
def _interactions(draw, n_units, n_levels):
    place = st.tuples(st.integers(0, n_units - 1), st.integers(0, n_levels - 1))
    pairs = draw(st.lists(st.tuples(place, place), max_size=5))
    pairs = {tuple(sorted(pair)) for pair in pairs if pair[0][0] != pair[1][0]}
    return {pair: draw(st.integers(-8, 8)) / 4 for pair in sorted(pairs)}


@pytest.fixture(scope="session")
def problems() -> Callable[..., st.SearchStrategy[Problem]]:
    return _problems


@pytest.fixture(scope="session")
def brute_force() -> Callable[[Problem], float | None]:
    """The least objective of any allocation within the limits, None if there is none; by enumeration."""
    return _brute_force


@pytest.fixture(scope="session")
def sums() -> Callable[..., dict[str, float]]:
    """Loss and costs of an allocation, by definition."""
    return _sums


@pytest.fixture(scope="session")
def milp_optimum() -> Callable[[Problem], float | None]:
    """The same by scipy's MILP, with ties as equations between the units and products as extra variables."""
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
