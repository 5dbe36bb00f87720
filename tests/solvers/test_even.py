"""Removing at even distances: by hand, and against every other way to spread as many."""

import itertools

import numpy as np
import pytest

from layerwise.errors import InfeasibleBudget
from layerwise.solvers import Problem, even
from layerwise.solvers._even import spaced


def depth(n: int, left: float) -> Problem:
    """n blocks that may be dropped (level 1), each with a layer inside of two bytes."""
    costs = np.array([[1.0, 0.0]] * n + [[0.0, np.inf]] * n)
    other = np.array([[0.0, 0.0]] * n + [[2.0, np.inf]] * n)
    nested = {(block, 1): [n + block] for block in range(n)}
    return Problem(costs={"depth": costs, "bytes": other}, budgets={"depth": left}, nested=nested)


@pytest.mark.parametrize(
    ("left", "gone"), [(12, []), (11.5, [6]), (10, [3, 9]), (9, [2, 6, 10]), (8, [1, 4, 7, 10]), (0, list(range(12)))]
)
def test_as_few_as_must_go_stand_at_even_distances(left: float, gone: list[int]) -> None:
    solution = even(depth(12, left))
    assert [block for block in range(12) if solution.choice[block]] == gone
    assert solution.cost == {"depth": 12 - len(gone), "bytes": 2 * (12 - len(gone))}


@pytest.mark.parametrize("total", range(1, 14))
def test_no_other_choice_keeps_a_greater_least_distance_from_neighbours_and_ends(total: int) -> None:
    def least(places: tuple[int, ...]) -> int:
        # The ends count half: a stretch of two is left before the first that goes where others are four apart.
        inner = [2 * (b - a) for a, b in itertools.pairwise(places)]
        return min([*inner, 2 * (2 * places[0] + 1), 2 * (2 * (total - 1 - places[-1]) + 1)])

    for count in range(1, total + 1):
        found = tuple(spaced(total, count))
        assert len(set(found)) == count
        best = max(map(least, itertools.combinations(range(total), count)))
        assert least(found) >= best - 4  # rounding moves each by less than one place


def test_what_cannot_fit_tells_of_the_shortage_when_nothing_goes() -> None:
    problem = Problem(costs={"bytes": np.array([[3.0], [4.0]])}, budgets={"bytes": 5.0})
    with pytest.raises(InfeasibleBudget, match="short by 2"):
        even(problem)
