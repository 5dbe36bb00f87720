import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from layerwise.errors import InfeasibleBudget
from layerwise.solvers import Problem, ilp, lp

FORMS = [
    {},
    {"n_budgets": 2},
    {"nested": 3},
    {"interactions": True},
    {"n_budgets": 2, "nested": 3, "interactions": True},
    {"n_budgets": 2, "nested": 3, "reverse": True},
]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_bound_is_really_below_and_the_allocation_within_the_limits(form, problems, brute_force, data):
    problem = data.draw(problems(max_units=4, max_levels=3, negative=True, **form))
    optimum = brute_force(problem)
    if optimum is None:
        with pytest.raises(InfeasibleBudget, match="short by"):
            lp(problem)
        return
    solution = lp(problem)
    assert problem.feasible(solution.choice)
    assert solution.lower_bound <= optimum
    assert solution.status == "feasible" or solution.objective == pytest.approx(optimum, rel=1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_bound_is_really_below_on_real_numbers_of_any_size(problems, brute_force, data):
    problem = data.draw(problems(n_budgets=2, max_units=4, max_levels=3, real=True))
    optimum = brute_force(problem)
    if optimum is not None:
        solution = lp(problem)
        assert solution.lower_bound <= optimum * (1 + 1e-12)
        assert problem.feasible(solution.choice)


@pytest.mark.parametrize("n_budgets", [1, 2])
def test_the_bound_is_the_optimum_of_the_relaxation(n_budgets, random_tables):
    for seed in range(3):
        problem = random_tables(40, 5, seed, n_budgets=n_budgets)
        relaxation = linprog(
            problem.losses.ravel(),
            A_ub=[problem.costs[resource].ravel() for resource in problem.budgets],
            b_ub=list(problem.limits.values()),
            A_eq=np.kron(np.eye(40), np.ones(5)),
            b_eq=np.ones(40),
        )
        solution = lp(problem)
        assert solution.lower_bound == pytest.approx(relaxation.fun, rel=1e-9)
        assert solution.lower_bound <= ilp(problem).loss <= solution.loss * (1 + 1e-12)
        assert solution.gap < 0.05


def test_where_the_relaxation_is_whole_it_is_the_optimum():
    tables = {"costs": {"bits": np.array([[1.0, 2.0], [1.0, 2.0]])}, "losses": np.array([[5.0, 1.0], [3.0, 2.0]])}
    solution = lp(Problem(**tables, budgets={"bits": 3.0 / (1 + 1e-9)}))
    assert (solution.choice.tolist(), solution.loss, solution.status) == ([1, 0], 4.0, "optimal")


def test_what_only_the_relaxation_can_keep_is_infeasible():
    crossed = {"ms": np.array([[0.0, 2.0]]), "bytes": np.array([[2.0, 0.0]])}
    with pytest.raises(InfeasibleBudget, match=r"within 1 ms, the least reachable bytes is 2.*short by 1"):
        lp(Problem(costs=crossed, budgets={"ms": 1.0, "bytes": 1.0}, losses=np.zeros((1, 2))))
