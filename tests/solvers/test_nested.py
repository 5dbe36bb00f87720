import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.solvers import Problem
from layerwise.solvers._hull import climb
from layerwise.solvers._nested import flattened


@pytest.fixture
def block_of_two():
    """A block that keeps or drops two layers, and a unit beside it."""
    return Problem(
        costs={"bits": [[1.0, 0.0], [2.0, 4.0], [2.0, 4.0], [3.0, 6.0]]},
        losses=[[0.0, 9.0], [3.0, 1.0], [2.0, 1.5], [4.0, 1.0]],
        units=["block", "q", "k", "o"],
        levels=["keep or 2b", "drop or 4b"],
        nested={("block", "drop or 4b"): ["q", "k"]},
    )


def test_a_block_becomes_one_unit_whose_levels_are_the_hull_of_its_allocations(block_of_two):
    flat = flattened(block_of_two)
    assert flat.problem.units == ("block", "o")
    assert flat.meaning[0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 0]]
    assert flat.problem.costs["bits"].tolist() == [[5.0, 7.0, 9.0, 0.0], [3.0, 6.0, np.inf, np.inf]]
    assert flat.problem.losses.tolist() == [[5.0, 3.0, 2.5, 9.0], [4.0, 1.0, np.inf, np.inf]]
    assert flat.expand(np.array([1, 1])).tolist() == [0, 1, 0, 1]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_flat_allocation_has_the_sums_of_the_nested_one_that_it_stands_for(problems, sums, data):
    problem = data.draw(problems(max_units=5, max_levels=3, n_budgets=2, nested=3, negative=True)).plain()
    flat = flattened(problem)
    drawn = [data.draw(st.sampled_from(np.flatnonzero(levels).tolist())) for levels in flat.problem.available]
    choice = np.array(drawn)
    true = sums(problem, flat.expand(choice).tolist())
    assert {**flat.problem.cost(choice), "loss": flat.problem.loss(choice)} == pytest.approx(true)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_allocation_of_a_block_lies_below_the_flat_hull(problems, sums, data):
    problem = data.draw(problems(max_units=5, max_levels=3, nested=3, negative=True)).plain()
    flat = flattened(problem).problem
    steps = climb(flat.costs["resource0"], flat.losses)
    rows = np.arange(flat.shape[0])
    costs = np.append(0.0, np.cumsum(steps.cost)) + flat.costs["resource0"][rows, steps.start].sum()
    losses = flat.losses[rows, steps.start].sum() - np.append(0.0, np.cumsum(steps.gain))
    choice = [data.draw(st.sampled_from(np.flatnonzero(levels).tolist())) for levels in problem.available]
    true = sums(problem, choice)
    assert true["resource0"] >= costs[0] - 1e-9
    assert true["loss"] >= np.interp(true["resource0"], costs, losses) - 1e-9
