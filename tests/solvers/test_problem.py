import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import InfeasibleBudget, InvalidProblem, UsageError
from layerwise.solvers import Problem, Solution, branch

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
        ({"levels": ["2b", "2b"]}, ["two levels are named 2b"]),
        ({"costs": {"loss": BITS}}, ["no resource can be named loss"]),
        ({"costs": {"bits": with_entry(BITS, 0, 0, -1.0) - 4}}, ["at 1 more place)"]),
        ({"groups": [["q", "k"]]}, ["a group", "no unit is named k"]),
        ({"groups": [[True, 1]]}, ["index or a name", "True"]),
        ({"fixed": {"q": "8b"}}, ["fixed", "no level is named 8b"]),
        ({"fixed": {2: 0}}, ["fixed names unit 2", "0 to 1"]),
        ({"fixed": {"q": 0}, "losses": [[np.inf, 1], [1, 1]]}, ["q is fixed at 2b, which it does not have"]),
        ({"fixed": {"q": 0, "o": 1}, "groups": [[0, 1]]}, ["q, o", "no level in common"]),
        ({"nested": {"q": ["o"]}}, ["nested", "'q' is not a (unit, level)"]),
        ({"nested": {("q", 0): ["o", "o"]}}, ["o is nested in q at 2b and in q at 2b"]),
        ({"nested": {("q", 0): ["q"]}}, ["q is nested in q: a circle"]),
        ({"nested": {("q", 0): ["o"], ("o", 1): ["q"]}}, ["o is nested in q is nested in o: a circle"]),
        ({"nested": {("q", 0): ["o"]}, "groups": [["q", "o"]]}, ["o is tied to q, which it is nested in"]),
        ({"interactions": {("q", "o"): 1.0}}, ["interactions", "'q' is not a (unit, level)"]),
        ({"interactions": {"qo": 1.0}}, ["'qo' is not a pair"]),
        ({"interactions": {(("q", 0), ("q", 1)): 1.0}}, ["q at 2b and q at 4b", "same unit"]),
        ({"interactions": {(("q", 0), ("o", 1)): 1.0, ((1, 1), (0, 0)): 1.0}}, ["q at 2b and o at 4b", "twice"]),
        ({"interactions": {(("q", 0), ("o", 1)): math.nan}}, ["q at 2b and o at 4b", "is NaN"]),
        ({"minimize": "ms"}, ["ms cannot be minimised", "bits"]),
        ({"minimize": "bits"}, ["needs losses"]),
        ({"losses": BITS, "max_loss": 1.0}, ["limits nothing"]),
        ({"losses": BITS, "minimize": "bits", "max_loss": math.nan}, ["max_loss is NaN"]),
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
    tied = tied_units.plain()
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
    tied = problem.plain()
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


def block():
    """Two layers inside a block that can be dropped, and a layer outside, tied to nothing."""
    return Problem(
        costs={"bits": [[1.0, 0.0], [4.0, 2.0], [4.0, 2.0], [6.0, 3.0]]},
        losses=[[0.0, 3.0], [1.0, 2.0], [1.0, 4.0], [1.0, 8.0]],
        units=["block", "q", "k", "head"],
        levels=["keep", "drop"],
        nested={("block", "drop"): ["q", "k"]},
        interactions={(("q", 1), ("k", 1)): 10.0, (("block", 1), ("head", 1)): -2.0, (("k", 0), ("head", 0)): 0.5},
    )


def test_absent_units_cost_nothing_lose_nothing_and_do_not_interact():
    problem = block()
    assert problem.loss([0, 1, 1, 0]) == 0.0 + 2.0 + 4.0 + 1.0 + 10.0
    assert problem.loss([1, 1, 1, 0]) == 3.0 + 1.0
    assert problem.loss([1, 0, 0, 1]) == 3.0 + 8.0 - 2.0
    assert problem.cost([1, 0, 0, 1]) == {"bits": 3.0}
    assert problem.present([1, 0, 0, 1]).tolist() == [True, False, False, True]
    assert problem.named([1, 0, 0, 1]) == {"block": "drop", "head": "drop"}
    assert problem.reachable("bits") == (3.0, 15.0)
    assert problem.outer.tolist() == [0, 3]
    assert not problem.separable


def model():
    """A block with an attention and an MLP that can be dropped or narrowed, with a linear layer or two in each."""
    keep = [0.0, 0.0, 0.0]
    layer = [3.0, 2.0, 1.0]
    return Problem(
        costs={"bits": [keep, keep, layer, layer, keep, [np.inf, 2.0, 1.0]]},
        losses=[[0.0, 5.0, np.inf], [0.0, 2.0, 1.0], *[[0.0, 1.0, 2.0]] * 2, [0.0, 2.0, 1.0], [np.inf, 1.0, 2.0]],
        units=["block", "attention", "qkv", "out", "mlp", "up"],
        levels=["keep", "drop", "narrow"],
        nested={
            ("attention", "drop"): ["qkv", "out"],
            ("attention", "narrow"): ["out"],
            ("mlp", "drop"): ["up"],
            ("mlp", "narrow"): ["up"],
            ("block", "drop"): ["attention", "mlp"],
        },
    )


@pytest.mark.parametrize(
    ("choice", "present", "loss", "bits"),
    [
        ([0, 0, 1, 2, 0, 1], ["block", "attention", "qkv", "out", "mlp", "up"], 1.0 + 2.0 + 1.0, 2.0 + 1.0 + 2.0),
        ([0, 2, 1, 2, 2, 1], ["block", "attention", "qkv", "mlp"], 1.0 + 1.0 + 1.0, 2.0),
        ([0, 1, 1, 2, 0, 2], ["block", "attention", "mlp", "up"], 2.0 + 2.0, 1.0),
        ([1, 0, 1, 2, 0, 2], ["block"], 5.0, 0.0),
        ([1, 2, 1, 2, 1, 2], ["block"], 5.0, 0.0),
    ],
)
def test_a_unit_is_absent_with_what_it_is_nested_in_or_at_its_levels(choice, present, loss, bits):
    problem = model()
    assert list(problem.named(choice)) == present
    assert (problem.loss(choice), problem.cost(choice)) == (loss, {"bits": bits})
    assert problem.feasible(choice)


def test_allocations_that_differ_in_absent_units_have_one_canonical_form():
    problem = model()
    for choice in ([1, 0, 1, 2, 0, 2], [1, 2, 1, 2, 1, 2], [1, 1, 0, 0, 1, 1]):
        assert problem.canonical(choice).tolist() == [1, 0, 0, 0, 0, 1]  # the last one has no level 0
        assert problem.solution(choice).choice.tolist() == [1, 0, 0, 0, 0, 1]
    assert problem.canonical([0, 2, 1, 2, 0, 2]).tolist() == [0, 2, 1, 0, 0, 2]


def test_tied_units_that_are_absent_have_the_lowest_level_that_all_of_them_have():
    problem = Problem(costs={"bits": [[1.0, 1.0], [1.0, 2.0], [np.inf, 2.0]]}, nested={(0, 1): [1, 2]}, groups=[[1, 2]])
    assert problem.canonical([1, 0, 0]).tolist() == [1, 1, 1]
    assert problem.plain().canonical([1, 0]).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nested": {("block", 1): ["mlp"], ("mlp", 1): ["up"], ("up", 0): ["block"]}}, "is nested in .*: a circle"),
        ({"nested": {("block", 1): ["up"], ("mlp", 1): ["up"]}}, "up is nested in block at drop and in mlp at drop"),
        ({"groups": [["block", "up"]]}, "up is tied to block, which it is nested in"),
        ({"groups": [["qkv", "out"]]}, "qkv, out are not nested in the same place"),  # one stays in narrow attention
        ({"groups": [["qkv", "up"]]}, "qkv, up are not nested in the same place"),
    ],
)
def test_what_is_no_forest_or_ties_units_that_are_not_absent_together_is_refused(change, message):
    with pytest.raises(InvalidProblem, match=message):
        dataclasses.replace(model(), **change)


def test_ties_of_units_that_are_absent_together_are_kept_at_any_depth():
    tied = dataclasses.replace(model(), groups=[["attention", "mlp"]])
    with pytest.raises(InvalidProblem, match="qkv, up"):
        dataclasses.replace(tied, groups=[["attention", "mlp"], ["qkv", "up"]])
    both = dataclasses.replace(tied, groups=[["attention", "mlp"], ["out", "up"]])  # in tied units, at the same levels
    plain = both.plain()
    assert plain.units == ("block", "attention+mlp", "qkv", "out+up")
    assert plain.nested == {(0, 1): (1,), (1, 1): (2, 3), (1, 2): (3,)}


def test_an_absent_unit_needs_no_available_level():
    problem = Problem(costs={"bits": [[1.0, 0.0], [np.inf, 2.0]]}, nested={(0, 1): [1]})
    assert problem.feasible([1, 0])
    assert not problem.feasible([0, 0])


def test_a_fixed_unit_has_no_other_level():
    problem = Problem(costs={"bits": BITS}, losses=BITS, **NAMES, fixed={"o": "4b"})
    assert problem.fixed == {1: 1}
    assert problem.available.tolist() == [[True, True], [False, True]]
    assert problem.reachable("bits") == (8.0, 10.0)
    assert not problem.feasible([0, 0])


def test_units_and_levels_go_by_name_or_by_index():
    named = block()
    indexed = Problem(
        costs=named.costs,
        losses=named.losses,
        nested={(0, 1): [1, 2]},
        interactions={((2, 1), (1, 1)): 10.0, ((0, 1), (3, 1)): -2.0, ((2, 0), (3, 0)): 0.5},
    )
    assert (named.nested, named.interactions) == (indexed.nested, indexed.interactions)


def test_interactions_of_tied_units_become_losses_of_their_set():
    problem = dataclasses.replace(block(), groups=[["q", "k"]])
    plain = problem.plain()
    assert plain.units == ("block", "q+k", "head")
    assert plain.losses.tolist() == [[0.0, 3.0], [2.0, 16.0], [1.0, 8.0]]
    assert plain.nested == {(0, 1): (1,)}
    assert plain.interactions == {((0, 1), (2, 1)): -2.0, ((1, 0), (2, 0)): 0.5}


def test_the_reverse_form_is_the_same_question_with_losses_and_costs_exchanged():
    problem = dataclasses.replace(block(), interactions={}, minimize="bits", max_loss=8.0, budgets={"bits": 12.0})
    plain = problem.plain()
    assert (plain.minimize, plain.groups, plain.max_loss) == ("loss", (), math.inf)
    assert plain.losses.tolist() == problem.costs["bits"].tolist()
    assert plain.costs["loss"].tolist() == problem.losses.tolist()
    assert plain.budgets == {"bits": 12.0, "loss": 8.0}
    for choice in np.ndindex(2, 2, 2, 2):
        assert plain.feasible(choice) == problem.feasible(choice)
        assert plain.loss(choice) == problem.cost(choice)["bits"]
    with pytest.raises(UsageError, match="not separable when units interact"):
        dataclasses.replace(block(), minimize="bits", max_loss=8.0).plain()


def test_a_loss_out_of_reach_is_named_in_the_reverse_form_and_in_its_plain_problem():
    problem = dataclasses.replace(block(), interactions={}, minimize="bits", max_loss=2.5)
    for asked in (problem, problem.plain()):
        with pytest.raises(InfeasibleBudget, match=r"max_loss 2\.5 is below the least reachable 3 \(short by 0\.5\)"):
            asked.check_budgets()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_sums_are_those_of_the_definition_whatever_binds_the_units(problems, sums, data):
    problem = data.draw(problems(n_budgets=2, nested=3, interactions=True, negative=True))
    levels = st.integers(0, problem.shape[1] - 1)
    choice = problem.expand(data.draw(st.lists(levels, min_size=len(problem.plain().units), max_size=5)))
    expected = sums(problem, choice.tolist())
    assert {**problem.cost(choice), "loss": problem.loss(choice)} == expected
    plain = problem.plain()
    folded = problem.fold(choice)
    assert {**plain.cost(folded), "loss": plain.loss(folded)} == pytest.approx(expected)
    assert problem.expand(plain.present(folded)).tolist() == problem.present(choice).tolist()
    assert plain.feasible(folded) == problem.feasible(choice)


def test_a_problem_comes_back_from_its_frame_and_its_arrow_table():
    problem = Problem(
        costs={"bits": with_entry(BITS, 0, 1, np.inf), "ms": BITS}, losses=BITS / 8, budgets={"ms": 9.0}, **NAMES
    )
    for table in (problem.to_frame(), problem.to_arrow()):
        copy = Problem.from_frame(table, budgets={"ms": 9.0}, fixed={"o": "4b"})
        assert (copy.units, copy.levels, list(copy.costs)) == (("q", "o"), ("2b", "4b"), ["bits", "ms"])
        assert copy.available.tolist() == [[True, False], [False, True]]
        assert copy.loss([0, 1]) == problem.loss([0, 1])
        assert copy.cost([0, 1]) == problem.cost([0, 1])
        assert (copy.budgets, copy.fixed) == ({"ms": 9.0}, {1: 1})


def test_columns_may_have_other_names_and_losses_may_be_missing():
    frame = Problem(costs={"bits": BITS}, **NAMES).to_frame().rename(columns={"unit": "layer", "level": "recipe"})
    copy = Problem.from_frame(frame, unit="layer", level="recipe", loss=None, costs=["bits"])
    assert copy.losses is None
    assert np.array_equal(copy.costs["bits"], BITS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda frame: frame.drop(columns="unit"), ["no column unit", "level, bits, loss"]),
        (lambda frame: frame.drop(columns="loss"), ["no column loss"]),
        (lambda frame: frame.iloc[[0, 1, 1]], ["two rows for q at 4b"]),
        (lambda frame: frame.assign(loss=[1.0, None, 1.0, 1.0]), ["loss is null for q at 4b"]),
        (lambda frame: frame.assign(bits=[1.0, 1.0, None, 1.0]), ["bits is null for o at 2b"]),
    ],
)
def test_a_frame_that_does_not_fit_says_where(change, words):
    frame = Problem(costs={"bits": BITS}, losses=BITS, **NAMES).to_frame()
    with pytest.raises(InvalidProblem) as caught:
        Problem.from_frame(change(frame))
    assert all(word in caught.value.message for word in words), caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"costs": np.ones((2, 2))}, "costs are tables by resource, found ndarray"),
        ({"budgets": 7}, "budgets are numbers by resource, found 7"),
        ({"groups": ["ab"]}, r"a group: 'ab' is not a list of units"),
        ({"nested": {("a", 0): "b"}}, r"nested: 'b' is not a list of units"),
    ],
)
def test_likely_slips_of_the_keyboard_are_refused_and_named(change, message):
    arguments = {"costs": {"bits": np.ones((2, 2))}, "units": ["a", "b"]} | change
    with pytest.raises(InvalidProblem, match=message):
        Problem(**arguments)


def test_a_solution_may_stand_where_its_choice_may():
    problem = Problem(costs={"bits": [[1, 2]]}, losses=[[1, 0]], units=["a"], levels=["low", "high"])
    solution = problem.solution([1])
    assert problem.named(solution) == {"a": "high"}
    assert (problem.loss(solution), problem.cost(solution), problem.feasible(solution)) == (0.0, {"bits": 2.0}, True)


@pytest.mark.parametrize("budget", ["90MB", None, True, [1]])
def test_a_budget_that_is_no_number_is_told(budget: Any) -> None:
    with pytest.raises(InvalidProblem, match=r"the bytes budget is no number but .*\nhint: give it in the unit"):
        Problem({"bytes": np.ones((1, 1))}, {"bytes": budget})


@pytest.mark.parametrize(
    "given",
    [
        {"budgets": {"bytes": 10**400}},
        {"budgets": {"bytes": -(10**400)}},
        {"losses": [[10**400, 1.0], [2.0, 0.0]]},
        {"costs": {"bytes": [[10**400, 2.0], [1.0, 2.0]]}},
        {"budgets": {}, "minimize": "bytes", "max_loss": 10**400},
        {"budgets": {}, "minimize": "bytes", "max_loss": "1"},
        {"budgets": {}, "minimize": "bytes", "max_loss": None},
        {"interactions": {((0, 0), (1, 1)): 10**400}},
        {"interactions": {((0, 0), (1, 1)): None}},
    ],
)
def test_what_no_float_can_hold_is_told_wherever_a_number_is_given(given: dict[str, Any]) -> None:
    sound = {"costs": {"bytes": [[1.0, 2.0], [1.0, 2.0]]}, "budgets": {"bytes": 3}, "losses": [[3.0, 1.0], [2.0, 0.0]]}
    Problem(**sound)
    with pytest.raises(InvalidProblem, match=r"no number but|beyond what a float can hold|too large"):
        Problem(**{**sound, **given})


def test_large_amounts_are_told_digit_by_digit() -> None:
    problem = Problem({"bytes": np.full((1, 1), 123_456_789.0)}, {"bytes": -1}, np.ones((1, 1)))
    with pytest.raises(InfeasibleBudget, match="budget -1 bytes is below the least reachable 123,456,789"):
        branch(problem)
