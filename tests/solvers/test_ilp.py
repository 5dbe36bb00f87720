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


BINDING = [
    {"nested": 3},
    {"interactions": True},
    {"n_budgets": 2, "nested": 3, "interactions": True},
    {"n_budgets": 2, "nested": 3, "reverse": True},
]


@pytest.mark.parametrize(("backend", "examples"), [("HiGHS", 60), ("CBC", 6)])
@pytest.mark.parametrize("binding", BINDING)
def test_whatever_binds_units_it_finds_the_optimum_of_enumeration_and_of_another_solver(
    backend, examples, binding, problems, brute_force, milp_optimum
):
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(problem=problems(max_units=5, max_levels=3, negative=True, **binding))
    def check(problem):
        optimum = brute_force(problem)
        assert milp_optimum(problem) == (None if optimum is None else pytest.approx(optimum, rel=1e-9, abs=1e-9))
        if optimum is None:
            with pytest.raises(InfeasibleBudget):
                ilp(problem, backend=backend)
        else:
            solution = ilp(problem, backend=backend)
            assert solution.objective == pytest.approx(optimum, rel=1e-9, abs=1e-9)
            assert solution.status == "optimal"

    check()


def test_absent_units_cost_nothing_and_stand_at_their_lowest_level():
    block = np.array([[0.0, 0.0], [9.0, 4.0], [5.0, 3.0]])
    losses = np.array([[0.0, 6.0], [1.0, 3.0], [2.0, 4.0]])
    problem = Problem(
        costs={"bits": block},
        budgets={"bits": 6.0},
        losses=losses,
        units=["block", "q", "k"],
        levels=["keep", "drop"],
        nested={("block", "drop"): ["q", "k"]},
    )
    solution = ilp(problem)
    assert (solution.choice.tolist(), solution.loss, solution.cost) == ([1, 0, 0], 6.0, {"bits": 0.0})
    assert problem.named(solution.choice) == {"block": "drop"}


def test_an_interaction_decides_between_levels_of_equal_loss():
    tables = {"costs": {"bits": np.ones((2, 2))}, "losses": np.ones((2, 2))}
    for loss, choices in [(1.0, ([0, 1], [1, 0], [1, 1])), (-1.0, ([0, 0],))]:
        solution = ilp(Problem(**tables, interactions={((0, 0), (1, 0)): loss}))
        assert solution.choice.tolist() in choices
        assert solution.loss == 2.0 + min(0.0, loss)


def test_the_reverse_form_names_the_loss_that_is_out_of_reach_under_the_budgets():
    tables = {"ms": np.array([[1.0, 3.0]] * 2), "bytes": np.array([[8.0, 2.0]] * 2)}
    losses = np.array([[0.0, 4.0]] * 2)
    problem = Problem(costs=tables, budgets={"bytes": 10.0}, losses=losses, minimize="ms", max_loss=3.0)
    with pytest.raises(InfeasibleBudget, match=r"within 10 bytes, the least reachable loss is 4.*short by 1") as caught:
        ilp(problem)
    assert (caught.value.resource, caught.value.budget, caught.value.reachable) == ("loss", 3.0, 4.0)


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


@pytest.mark.parametrize("smallest", [5e-324, 1e-310, 1e-250])
def test_losses_next_to_nothing_are_told_apart(smallest):
    losses = np.array([[2.0, 1.0], [3.0, 1.0]]) * smallest
    problem = Problem(costs={"bits": [[1.0, 2.0], [1.0, 2.0]]}, budgets={"bits": 3.0}, losses=losses)
    assert ilp(problem).choice.tolist() == [0, 1]
