import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from layerwise.errors import InfeasibleBudget
from layerwise.solvers import Problem, lagrange
from layerwise.solvers._hull import climb
from layerwise.solvers._lagrange import Lagrangian


def lp_optimum(problem):
    """Optimum of the linear relaxation of a plain problem by scipy's HiGHS: a share of every level, absent ones too."""
    n_units, n_levels = problem.shape
    usable = problem.available.ravel()
    rows = np.repeat(np.eye(n_units), n_levels, axis=1)
    wanted = np.ones(n_units)
    for unit in {unit for unit, _ in problem.nested}:  # nested ones are as present as their parent's levels keep them
        removed = {level: problem.nested.get((unit, level), ()) for level in range(n_levels)}
        for child in {child for children in removed.values() for child in children}:
            kept = [level for level, children in removed.items() if child not in children]
            rows[child, [unit * n_levels + level for level in kept]], wanted[child] = -1, 0
    limits = np.array(list(problem.limits.values()))
    scale = np.where(limits == 0, 1.0, np.abs(limits))
    costs = np.array([np.where(usable, problem.costs[resource].ravel(), 0) for resource in problem.limits])
    answer = linprog(
        np.where(usable, problem.losses.ravel(), 0),
        costs / scale[:, None] if len(limits) else None,
        limits / scale if len(limits) else None,
        rows,
        wanted,
        bounds=[(0, float(here)) for here in usable],
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    return answer.fun


def within_reach(problem, data):
    """The same with costs that are no whole numbers, of which the bound could make use, and wide enough budgets."""
    rng = np.random.default_rng(0)
    costs = {name: table * rng.uniform(0.999, 1.0, table.shape) for name, table in problem.costs.items()}
    some = [data.draw(st.sampled_from(np.flatnonzero(levels).tolist())) for levels in problem.available]
    spent = problem.variant(costs=costs).cost(some)
    return problem.variant(costs=costs, budgets={name: max(spent[name], b) for name, b in problem.budgets.items()})


@pytest.mark.parametrize("nested", [0, 1, 3])
@pytest.mark.parametrize("n_budgets", [1, 2, 3])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_bound_is_the_optimum_of_the_linear_relaxation(n_budgets, nested, problems, data):
    drawn = data.draw(problems(n_budgets=n_budgets, nested=nested, negative=True))
    problem = within_reach(drawn.plain(), data)
    optimum = lp_optimum(problem)
    relaxed = Lagrangian(problem)
    prices = relaxed.best_prices()
    largest = np.abs(problem.losses[problem.available]).max()
    assert (prices >= 0).all()
    assert relaxed.bound(prices) == pytest.approx(optimum, rel=1e-7, abs=1e-7 * largest)


def test_a_price_on_one_limit_is_not_enough_where_the_mixture_breaks_another():
    """At the best price of "b" alone two allocations are equally good; one is within "a", their mixture is not."""
    costs = {"a": [[4.0, 2.5], [2.0, 1.5]], "b": [[1.5, 3.5], [0.0, 3.0]]}
    problem = Problem(costs=costs, losses=[[6.0, 8.0], [8.5, 1.5]], budgets={"a": 4.75, "b": 4.75})
    relaxed = Lagrangian(problem)
    assert relaxed.bound(relaxed.best_prices()) == pytest.approx(lp_optimum(problem), rel=1e-7)
    assert lp_optimum(problem) == pytest.approx(10.9642857)


@pytest.mark.parametrize(("n_budgets", "n_units"), [(1, 200), (2, 200), (3, 60)])
def test_the_bound_of_many_layers_is_that_of_the_relaxation(n_budgets, n_units, random_tables):
    problem = random_tables(n_units, 6, seed=4, n_budgets=n_budgets)
    solution = lagrange(problem)
    assert solution.lower_bound == pytest.approx(lp_optimum(problem), rel=1e-7)
    assert solution.lower_bound <= solution.loss <= solution.lower_bound * 1.1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(prices=st.lists(st.floats(0, 1e6), min_size=2, max_size=2), data=st.data())
def test_any_prices_give_a_lower_bound(prices, problems, brute_force, data):
    problem = data.draw(problems(n_budgets=2, nested=3, max_units=4, max_levels=3)).plain()
    optimum = brute_force(problem)
    assume(optimum is not None)
    relaxed = Lagrangian(problem)
    rounding = 1e-13 * max(prices) * problem.shape[0] * 10
    assert relaxed.bound(np.array(prices)) <= optimum + 1e-9 + rounding


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_with_one_budget_the_gap_is_at_most_one_step_up_a_hull(problems, data):
    problem = data.draw(problems())
    plain = problem.plain()
    try:
        solution = lagrange(problem)
    except InfeasibleBudget:
        return
    gains = climb(plain.costs["resource0"], plain.losses).gain
    assert solution.loss - solution.lower_bound <= gains.max(initial=0.0) + 1e-9


def test_a_price_beyond_all_numbers_still_gives_a_bound():
    costs = {"ms": [[1e9, 0.0], [1e9, 1e-9]]}
    losses = [[0.0, 1e-300], [0.0, 3e-301]]
    solution = lagrange(Problem(costs=costs, losses=losses, minimize="ms", max_loss=5e-301))
    assert (solution.choice.tolist(), solution.objective) == ([0, 1], 1e9)
    assert 0.0 <= solution.lower_bound <= 1e9
