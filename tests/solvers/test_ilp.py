import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import InfeasibleBudget, LayerwiseError, UsageError
from layerwise.solvers import Problem, any_feasible, ilp


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_several_budgets_are_solved_like_by_enumeration_and_by_another_solver(
    problems, brute_force, milp_optimum, data
):
    problem = data.draw(problems(n_budgets=data.draw(st.integers(2, 3))))
    optimum = brute_force(problem)
    assert milp_optimum(problem) == (None if optimum is None else pytest.approx(optimum, rel=1e-9))
    if optimum is None:
        with pytest.raises(InfeasibleBudget):
            ilp(problem)
        with pytest.raises(InfeasibleBudget):
            any_feasible(problem)
        return
    solution = ilp(problem)
    assert solution.loss == pytest.approx(optimum, rel=1e-9)
    assert solution.status == "optimal"
    assert problem.feasible(solution.choice)
    assert problem.feasible(any_feasible(problem))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_cbc_finds_the_same_optimum(problems, brute_force, data):
    problem = data.draw(problems(n_budgets=2))
    optimum = brute_force(problem)
    if optimum is None:
        with pytest.raises(InfeasibleBudget):
            ilp(problem, backend="CBC")
    else:
        assert ilp(problem, backend="CBC").loss == pytest.approx(optimum, rel=1e-9)


def test_budgets_that_are_only_jointly_infeasible_say_so():
    fast_or_small = {"ms": np.array([[1.0, 3.0]] * 2), "bytes": np.array([[8.0, 2.0]] * 2)}
    problem = Problem(costs=fast_or_small, losses=np.zeros((2, 2)), budgets={"ms": 4.0, "bytes": 6.0})
    with pytest.raises(InfeasibleBudget, match="only jointly infeasible: within 4 ms") as caught:
        ilp(problem)
    assert (caught.value.resource, caught.value.budget, caught.value.reachable) == ("bytes", 6.0, 10.0)
    assert ilp(Problem(costs=fast_or_small, losses=np.zeros((2, 2)), budgets={"ms": 4.0, "bytes": 10.0}))


@pytest.mark.parametrize("backend", ["HiGHS", "CBC"])
def test_a_budget_missed_by_a_millionth_is_missed(backend):
    losses = np.array([[2.0, 0.0], [2.0, 1.0]])
    costs = np.array([[0.0, 1.0], [0.0, 1.0]]) * 1e6
    exact = Problem(costs={"bits": costs}, budgets={"bits": 1e6}, losses=losses)
    missed = Problem(costs={"bits": costs}, budgets={"bits": 1e6 * (1 - 3e-9)}, losses=losses)
    assert ilp(exact, backend=backend).choice.tolist() == [1, 0]
    assert ilp(missed, backend=backend).choice.tolist() == [0, 0]


def test_no_time_is_an_error_or_an_honest_answer(random_tables):
    problem = random_tables(60, 5, seed=0, n_budgets=3)
    try:
        solution = ilp(problem, time_limit=0.0)
    except LayerwiseError as error:
        assert "in time" in error.message
    else:
        assert solution.status == "time_limit"
        assert problem.feasible(solution.choice)


def test_an_unknown_backend_is_refused(tied_units):
    with pytest.raises(UsageError, match="Gurobi"):
        ilp(tied_units, backend="Gurobi")


def test_solving_prints_nothing(capfd, tied_units):
    for backend in ("HiGHS", "CBC"):
        ilp(tied_units, backend=backend)
    assert capfd.readouterr() == ("", "")
