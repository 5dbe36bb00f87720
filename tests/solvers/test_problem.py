import dataclasses
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import InfeasibleBudget, InvalidProblem, UsageError
from layerwise.solvers import Problem, Solution

BITS = np.array([[2.0, 4.0], [3.0, 6.0]])
NAMES = {"units": ["q", "o"], "levels": ["2b", "4b"]}


def with_entry(table, unit, level, value):
    changed = table.copy()
    changed[unit, level] = value
    return changed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"costs": {}}, ["at least one resource"]),
        ({"costs": {"bits": BITS[0]}}, ["bits", "(2,)"]),
        ({"costs": {"bits": np.zeros((0, 2))}}, ["at least one of each"]),
        ({"costs": {"bits": [[1, 2], [3]]}}, ["bits", "not a table"]),
        ({"costs": {"bits": with_entry(BITS, 1, 0, np.nan)}}, ["bits", "NaN", "o", "2b"]),
        ({"costs": {"bits": with_entry(BITS, 0, 1, -1.0)}}, ["bits", "negative", "q", "4b"]),
        ({"costs": {"bits": BITS, "ms": np.ones((2, 3))}}, ["(2, 2)", "(2, 3)"]),
        ({"losses": with_entry(BITS, 1, 1, np.nan)}, ["loss", "NaN", "o", "4b"]),
        ({"losses": with_entry(BITS, 1, 1, -np.inf)}, ["-inf", "o", "4b"]),
        ({"losses": np.ones((3, 2))}, ["losses (3, 2)"]),
        ({"losses": np.full((2, 2), np.inf)}, ["q", "no available level"]),
        ({"budgets": {"ms": 1.0}}, ["ms", "bits only"]),
        ({"budgets": {"bits": math.nan}}, ["bits", "NaN"]),
        ({"groups": [[0, 1], [1]]}, ["o", "more than one group"]),
        ({"groups": [[0, 0]]}, ["q", "more than one group"]),
        ({"groups": [[0, 2]]}, ["unit 2"]),
        ({"groups": [[0, 1]], "losses": [[np.inf, 1], [1, np.inf]]}, ["q, o", "no level in common"]),
        ({"units": ["q"]}, ["1 unit names for 2 units"]),
        ({"units": ["q", "q"]}, ["two units are named q"]),
    ],
)
def test_a_problem_that_does_not_fit_together_says_where(arguments, words):
    with pytest.raises(InvalidProblem) as caught:
        Problem(**{"costs": {"bits": BITS}, **NAMES, **arguments})
    assert all(word in caught.value.message for word in words), caught.value.message


def test_inf_in_any_table_makes_the_level_unavailable_in_all():
    problem = Problem(costs={"bits": with_entry(BITS, 0, 0, np.inf), "ms": BITS}, losses=with_entry(BITS, 1, 1, np.inf))
    assert problem.available.tolist() == [[False, True], [True, False]]
    assert problem.reachable("ms") == (4.0 + 3.0, 4.0 + 3.0)
    assert problem.loss([0, 0]) == math.inf
    assert not problem.feasible([0, 0])
    assert problem.feasible([1, 0])


def test_building_a_problem_copies_its_tables_and_seals_the_copies():
    losses = BITS.copy()
    problem = Problem(costs={"bits": BITS}, losses=losses)
    losses[0, 0] = 99.0
    assert problem.loss([0, 0]) == 2.0 + 3.0
    with pytest.raises(ValueError, match="read-only"):
        problem.losses[0, 0] = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.losses = None


def test_tied_units_become_one_with_summed_costs_and_losses(tied_units):
    tied = tied_units.tied()
    assert tied.units == ("q+k", "o")
    assert tied.groups == ()
    assert tied.costs["bits"].tolist() == [[4.0, 8.0], [3.0, 6.0]]
    assert tied.losses.tolist() == [[5.5, 1.25], [4.0, 1.0]]
    assert tied_units.expand([1, 0]).tolist() == [1, 1, 0]
    assert tied_units.fold([1, 1, 0]).tolist() == [1, 0]
    assert tied_units.feasible([1, 1, 0])
    assert not tied_units.feasible([1, 0, 0])
    with pytest.raises(UsageError, match="q, k"):
        tied_units.fold([1, 0, 0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_folding_and_expanding_keep_loss_cost_and_reach(problems, data):
    problem = data.draw(problems())
    tied = problem.tied()
    choice = np.array(data.draw(st.lists(st.integers(0, tied.shape[1] - 1), min_size=len(tied.units), max_size=8)))
    choice = choice[: len(tied.units)]
    whole = problem.expand(choice)
    assert problem.fold(whole).tolist() == choice.tolist()
    assert problem.loss(whole) == pytest.approx(tied.loss(choice), rel=1e-12)
    assert problem.cost(whole) == pytest.approx(tied.cost(choice), rel=1e-12)
    assert problem.reachable("resource0") == tied.reachable("resource0")


def test_an_allocation_of_the_wrong_form_is_refused(tied_units):
    for choice in ([0, 0], [0, 0, 2], [0, 0, -1], [0.0, 0.0, 0.0]):
        with pytest.raises(UsageError, match="allocation"):
            tied_units.feasible(choice)


def test_a_budget_that_was_printed_and_typed_in_again_still_holds():
    costs = np.array([[0.1], [0.2], [1e9 / 3]])
    total = math.fsum(costs.ravel())
    for budget, fits in [(total, True), (float(f"{total:.12g}"), True), (total * (1 - 1e-8), False)]:
        assert Problem(costs={"bits": costs}, budgets={"bits": budget}).feasible([0, 0, 0]) == fits


def test_every_budget_that_is_out_of_reach_is_named_with_its_shortfall():
    problem = Problem(costs={"bits": BITS, "ms": BITS, "bytes": BITS}, budgets={"bits": 4.0, "ms": 5.0, "bytes": 2.0})
    with pytest.raises(InfeasibleBudget) as caught:
        problem.check_budgets()
    error = caught.value
    assert (error.resource, error.budget, error.reachable) == ("bits", 4.0, 5.0)
    assert "4 bits is below the least reachable 5 (short by 1)" in error.message
    assert "2 bytes is below the least reachable 5 (short by 3)" in error.message
    assert " ms " not in error.message


def test_a_negative_budget_is_short_and_an_infinite_one_is_no_limit():
    free = Problem(costs={"bits": np.zeros((2, 1))}, budgets={"bits": -1.0})
    with pytest.raises(InfeasibleBudget):
        free.check_budgets()
    assert Problem(costs={"bits": BITS}, budgets={"bits": math.inf}).limits == {}


def test_a_problem_survives_pickling(tied_units):
    copy = pickle.loads(pickle.dumps(tied_units))
    assert copy.loss([1, 1, 0]) == tied_units.loss([1, 1, 0])
    assert copy.units == tied_units.units


def test_the_gap_is_relative_to_the_loss_and_never_negative():
    choice = np.zeros(1, dtype=np.int64)
    assert Solution(choice, 4.0, {}, lower_bound=3.0).gap == 0.25
    assert Solution(choice, 4.0, {}, lower_bound=4.0 + 1e-15).gap == 0.0
    assert Solution(choice, 0.0, {}, lower_bound=0.0).gap == 0.0
    assert Solution(choice, 4.0, {}).gap is None
    assert Solution(choice, None, {}, lower_bound=1.0).gap is None
