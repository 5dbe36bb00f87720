import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from layerwise.errors import InfeasibleBudget
from layerwise.solvers import Problem, any_feasible
from layerwise.solvers._incumbent import given_start
from layerwise.solvers._moves import Moves


class Recorded(Moves):
    """Moves that keep a record of every single step: allocation before, allocation after."""

    def __init__(self, problem):
        super().__init__(problem)
        self.steps = []

    def _step(self, choice, ladder, allowed, rng):
        before = choice.copy()
        unit = super()._step(choice, ladder, allowed, rng)
        self.steps.append((before, choice.copy()))
        return unit


@pytest.fixture
def depth():
    """Eight blocks of three levels with two layers each; the last level of a block drops it and its layers."""
    n_blocks = 8
    blocks = np.tile([1.0, 2.0, 0.0], (n_blocks, 1))
    layers = np.tile([2.0, 3.0, 4.0], (2 * n_blocks, 1))
    nested = {(block, 2): [n_blocks + 2 * block, n_blocks + 2 * block + 1] for block in range(n_blocks)}
    return Problem(costs={"bits": np.concatenate([blocks, layers])}, budgets={"bits": 40.0}, nested=nested)


def walk(moves, start, seed, n_moves=40, max_switches=3):
    """The allocations that a search would see, each reached from the one before."""
    rng, choice = np.random.default_rng(seed), start
    for index in range(n_moves):
        moved = moves.filled(choice, rng) if index % 5 == 0 else moves.mutated(choice, rng, max_switches)
        if moved is not None:
            yield moved
            choice = moved


def started(data, problems, **kind):
    problem = data.draw(problems(max_levels=3, **kind))
    try:
        start = problem.fold(any_feasible(problem))
    except InfeasibleBudget:
        assume(False)
    return problem.plain(), start


@pytest.mark.parametrize("kind", [{"nested": 3}, {"nested": 3, "n_budgets": 2}, {"n_budgets": 2, "real": True}])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 9))
def test_no_candidate_leaves_the_budgets(kind, data, seed, problems):
    problem, start = started(data, problems, **kind)
    before = start.copy()
    assert all(problem.feasible(choice) for choice in walk(Moves(problem), start, seed))
    assert start.tolist() == before.tolist()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 9))
def test_a_step_moves_one_unit_that_is_present(data, seed, problems):
    problem, start = started(data, problems, nested=3)
    moves = Recorded(problem)
    for _ in walk(moves, start, seed):
        pass
    for before, after in moves.steps:
        moved = np.flatnonzero(before != after)
        assert len(moved) <= 1
        assert problem.present(before)[moved].all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 9))
def test_after_filling_nothing_present_can_rise(data, seed, problems, sums):
    problem, start = started(data, problems, nested=3)
    moves = Moves(problem)
    filled = moves.filled(start, np.random.default_rng(seed))
    assert not moves.can_rise(filled)
    assert moves.filled(filled, np.random.default_rng(seed)).tolist() == filled.tolist()
    assert sums(problem, filled.tolist())["resource0"] >= sums(problem, start.tolist())["resource0"] - 1e-9


def test_blocks_are_dropped_and_come_back(depth):
    start = any_feasible(depth)
    assert start[:8].tolist() == [2] * 8
    seen = np.array([choice[:8] == 2 for choice in walk(Moves(depth), start, seed=0, n_moves=200)])
    dropped = np.diff(seen.astype(int), axis=0)
    assert (dropped == 1).any(axis=0).all() and (dropped == -1).any(axis=0).all()


def test_a_block_is_on_the_ladder_with_the_least_that_its_layers_cost():
    """Without its layer the block costs 3; with it 1, and the layer at least 5. So the way up leads to the latter."""
    problem = Problem(costs={"bits": [[1.0, 3.0], [5.0, 6.0]]}, budgets={"bits": 6.0}, nested={(0, 1): [1]})
    moves = Moves(problem)
    assert moves.filled(np.array([1, 0]), np.random.default_rng(0)).tolist() == [0, 0]


def test_filling_keeps_a_block_whose_attention_could_be_dropped_too():
    """To keep the block costs as little as to drop it, as long as the attention inside is dropped."""
    costs = [[0.0, 0.0], [0.0, 0.0], [2.0, 4.0]]
    problem = Problem(costs={"bits": costs}, budgets={"bits": 4.0}, nested={(0, 1): [1], (1, 1): [2]})
    for start in ([1, 0, 0], [0, 1, 0]):
        assert Moves(problem).filled(np.array(start), np.random.default_rng(0)).tolist() == [0, 0, 1]


def test_a_layer_that_comes_back_with_its_block_keeps_its_level_and_pays_for_it():
    problem = Problem(costs={"bits": [[1.0, 0.0], [2.0, 4.0]]}, budgets={"bits": 4.0}, nested={(0, 1): [1]})
    moves = Moves(problem)
    assert moves.can_rise(np.array([1, 0]))
    assert not moves.can_rise(np.array([1, 1]))  # the layer would be back at 4 bits


def test_from_a_start_whose_absent_layer_stands_at_a_level_that_it_lacks_all_candidates_are_available():
    problem = Problem(
        costs={"bits": [[0.0, 1.0], [1.0, 2.0]]}, losses=[[1.0, 0.0], [np.inf, 1.0]], nested={(0, 0): [1]}
    )
    start = given_start(problem, [0, 0])
    assert start.tolist() == [0, 1]
    assert all(problem.feasible(choice) for choice in walk(Moves(problem), start, seed=0))


def test_exchanges_that_differ_by_less_than_rounding_do_not_add_up_beyond_the_budget():
    small = 1e-9 * (1 + 1e-4 * np.arange(2000))
    large = np.where(np.arange(2000) == 0, 1e4, 0.0)
    start = (np.arange(2000) < 1000).astype(int)
    costs = np.stack([large, large + small], axis=1)
    spent = costs[np.arange(2000), start].sum()
    problem = Problem(costs={"bytes": costs}, budgets={"bytes": spent / (1 + 1e-9)})
    for choice in walk(Moves(problem), start, seed=0, n_moves=300):
        assert problem.cost(choice)["bytes"] <= problem.limits["bytes"] * (1 + 1.001e-12)


def test_without_budgets_and_nesting_everything_rises():
    moves = Moves(Problem(costs={"bits": [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]}))
    assert moves.filled(np.array([0, 2]), np.random.default_rng(0)).tolist() == [2, 0]
