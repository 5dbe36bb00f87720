import numpy as np
import pytest

from layerwise.errors import InfeasibleBudget
from layerwise.solvers import Problem, uniform

SIZES = np.array([[1.0], [3.0]])
BITS = SIZES * np.array([2, 3, 4])


@pytest.mark.parametrize(("average", "level"), [(2.0, 0), (2.99, 0), (3.0, 1), (3.7, 1), (4.0, 2), (9.0, 2)])
def test_a_budget_between_two_levels_stays_at_the_lower(average, level):
    solution = uniform(Problem(costs={"bits": BITS}, budgets={"bits": average * 4}))
    assert solution.choice.tolist() == [level, level]
    assert solution.loss is None


def test_levels_need_not_stand_in_the_order_of_their_cost():
    shuffled = Problem(costs={"bits": BITS[:, [2, 0, 1]]}, budgets={"bits": 3.0 * 4})
    assert uniform(shuffled).choice.tolist() == [2, 2]


def test_of_levels_of_the_same_cost_the_better_one_is_taken_and_the_first_if_unknown():
    twice = {"costs": {"bits": np.repeat(BITS, 2, axis=1)}, "budgets": {"bits": 3.0 * 4}}
    assert uniform(Problem(**twice)).choice.tolist() == [2, 2]
    losses = np.array([[9, 8, 7, 6, 5, 4.0]] * 2)
    assert uniform(Problem(**twice, losses=losses)).choice.tolist() == [3, 3]


def test_a_unit_without_the_common_level_takes_the_nearest_cheaper_one_it_has():
    costs = np.repeat(np.array([[2.0, 3.0, 4.0]]), 3, axis=0)
    costs[1, 2] = np.inf
    costs[2, :2] = np.inf  # has the dearest level only
    problem = Problem(costs={"bits": costs}, budgets={"bits": 11.0})
    assert uniform(problem).choice.tolist() == [2, 1, 2]
    assert uniform(Problem(costs={"bits": costs}, budgets={"bits": 10.0})).choice.tolist() == [1, 1, 2]


def test_all_budgets_count():
    ms = np.array([[1.0, 5.0, 2.0]] * 2)
    problem = Problem(costs={"bits": BITS, "ms": ms}, budgets={"bits": 16.0, "ms": 3.0})
    assert uniform(problem).choice.tolist() == [0, 0]
    assert uniform(Problem(costs=problem.costs, budgets={"bits": 16.0, "ms": 4.0})).choice.tolist() == [2, 2]


def test_tied_units_count_together(tied_units):
    assert uniform(tied_units).choice.tolist() == [0, 0, 0]


def test_where_only_a_mixture_fits_the_nearest_common_level_is_named():
    crossed = Problem(costs={"ms": [[1.0, 4.0], [4.0, 1.5]]}, budgets={"ms": 3.0}, levels=["int4", "int8"])
    with pytest.raises(InfeasibleBudget, match=r"int4 comes nearest and needs 5 ms.*short by 2") as caught:
        uniform(crossed)
    assert caught.value.reachable == 5.0


def test_blocks_stay_while_their_layers_have_the_common_level():
    costs = np.array([[0.0, 0.0, np.inf, np.inf], [np.inf, np.inf, 2.0, 4.0], [np.inf, np.inf, 2.0, 4.0]])
    names = {"units": ["block", "q", "k"], "levels": ["drop", "keep", "2b", "4b"]}
    for budget, named in [
        (8.0, {"block": "keep", "q": "4b", "k": "4b"}),
        (4.0, {"block": "keep", "q": "2b", "k": "2b"}),
        (1.0, {"block": "drop"}),
    ]:
        nested = {("block", "drop"): ["q", "k"]}
        problem = Problem(costs={"bits": costs}, budgets={"bits": budget}, nested=nested, **names)
        assert problem.named(uniform(problem).choice) == named


def test_the_reverse_form_takes_the_cheapest_common_level_within_the_loss():
    losses = np.array([[4.0, 2.0, 1.0]] * 2)
    pair = {((0, 0), (1, 0)): -5.0}
    for max_loss, interactions, level in [(9.0, {}, 0), (4.0, {}, 1), (4.0, pair, 0), (2.0, {}, 2)]:
        problem = Problem(
            costs={"bits": BITS}, losses=losses, interactions=interactions, minimize="bits", max_loss=max_loss
        )
        assert uniform(problem).choice.tolist() == [level, level]


def test_the_loss_that_no_common_level_reaches_is_named():
    losses = np.array([[0.0, 5.0, 5.0], [5.0, 0.0, 5.0]])
    problem = Problem(costs={"bits": BITS}, losses=losses, minimize="bits", max_loss=3.0)
    with pytest.raises(InfeasibleBudget, match=r"level 0 comes nearest and needs 5 loss.*short by 2") as caught:
        uniform(problem)
    assert (caught.value.resource, caught.value.budget, caught.value.reachable) == ("loss", 3.0, 5.0)
