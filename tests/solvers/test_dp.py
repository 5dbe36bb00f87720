import numpy as np
import pytest

from layerwise.errors import UsageError
from layerwise.solvers import Problem, dp, ilp


def test_of_equal_losses_the_cheaper_allocation_is_taken():
    costs, losses = np.array([[3.0, 2.0, 1.0], [1.0, 1.0, 2.0]]), np.array([[1.0, 1.0, 2.0], [4.0, 4.0, 4.0]])
    assert dp(Problem(costs={"bits": costs}, budgets={"bits": 9.0}, losses=losses)).choice.tolist() == [1, 0]


def test_several_budgets_are_refused(random_tables):
    with pytest.raises(UsageError, match="one budget, found resource0, resource1"):
        dp(random_tables(4, 3, seed=0, n_budgets=2))


def test_costs_without_a_budget_do_not_count(random_tables):
    two = random_tables(10, 4, seed=0, n_budgets=2)
    one = Problem(costs=two.costs, budgets={"resource1": two.budgets["resource1"]}, losses=two.losses)
    assert dp(one).loss == pytest.approx(ilp(one).loss, rel=1e-9)


@pytest.mark.parametrize("max_states", [1, 10, 100, 1000])
def test_too_many_states_give_a_feasible_answer_between_true_bounds(max_states, random_tables):
    for seed in range(3):
        problem = random_tables(40, 5, seed)
        exact, rough = dp(problem), dp(problem, max_states=max_states)
        assert (exact.status, rough.status) == ("optimal", "feasible")
        assert problem.feasible(rough.choice)
        assert rough.lower_bound * (1 - 1e-9) <= exact.loss <= rough.loss * (1 + 1e-9)
        assert rough.gap == pytest.approx((rough.loss - rough.lower_bound) / rough.loss)


def test_the_rounded_answer_is_as_good_as_the_optimum_of_a_budget_smaller_by_a_step_per_unit(random_tables):
    problem, max_states = random_tables(40, 5, seed=0), 200
    room = problem.budgets["resource0"] - problem.reachable("resource0")[0]
    smaller = problem.budgets["resource0"] - 40 * room / max_states
    tight = Problem(costs=problem.costs, losses=problem.losses, budgets={"resource0": smaller})
    assert dp(problem, max_states=max_states).loss <= dp(tight).loss * (1 + 1e-9)


def test_equal_layers_need_no_more_states_than_multiples_of_their_cost():
    rng = np.random.default_rng(0)
    costs = np.tile(np.arange(5.0) * 4096, (200, 1))
    problem = Problem(costs={"bits": costs}, budgets={"bits": 400 * 4096.0}, losses=rng.random((200, 5)))
    assert dp(problem, max_states=401).status == "optimal"


def test_max_states_must_be_positive(tied_units):
    with pytest.raises(UsageError, match="max_states"):
        dp(tied_units, max_states=0)
