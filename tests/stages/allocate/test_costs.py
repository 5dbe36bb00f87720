"""Costs, budgets and names of allocations, counted by hand on a database of two units."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerwise.errors import InfeasibleBudget, NotFinite, UsageError
from layerwise.solvers import SOLVERS
from layerwise.stages.allocate.allocation import (
    Allocation,
    CostTable,
    Times,
    budget_text,
    check_database,
    load_allocations,
    load_times,
    save_allocations,
)
from layerwise.stages.apply.stage import pick
from layerwise.stages.levels.database import DatabaseIndex, write_index

REST = 1000


def level(name: str, bits: float, effective: float, size: int) -> dict[str, Any]:
    errors = {"weight_nmse": 0.5**bits, "output_error": 0.5**bits}
    costs = {"bits": bits, "effective_bits": effective, "size_bytes": size}
    return {"level": name, "recipe": {}, **costs, **errors, "status": "ok", "error": None}


def broken(name: str) -> dict[str, Any]:
    empty = dict.fromkeys(("recipe", "bits", "effective_bits", "size_bytes", "weight_nmse", "output_error"))
    return {"level": name, **empty, "status": "nan", "error": "a weight is NaN"}


def unit(name: str, shape: list[int], *levels: dict[str, Any], group: str | None = "0.qk") -> dict[str, Any]:
    return {"unit": name, "kind": name, "block": 0, "shape": shape, "group": group, "levels": list(levels)}


def database(folder: Path, *units: dict[str, Any]) -> DatabaseIndex:
    folder.mkdir(exist_ok=True)
    write_index(folder, units, rest_bytes=REST)
    return DatabaseIndex(folder)


@pytest.fixture
def two_units(tmp_path: Path) -> CostTable:
    """q has 100 weights and three levels, k has 300 and only the first and the third."""
    q = unit("q", [10, 10], level("2b", 2, 2.5, 32), level("4b", 4, 4.5, 57), level("8b", 8, 8.25, 104))
    k = unit("k", [10, 30], level("2b", 2, 2.5, 94), broken("4b"), level("8b", 8, 8.5, 319))
    return CostTable(database(tmp_path / "two", q, k))


def test_costs_are_absolute_and_a_level_that_was_not_made_costs_infinity(two_units: CostTable) -> None:
    inf = np.inf
    assert two_units.costs["bits"].tolist() == [[200, 400, 800], [600, inf, 2400]]
    assert two_units.costs["effective_bits"].tolist() == [[250, 450, 825], [750, inf, 2550]]
    assert two_units.costs["bytes"].tolist() == [[32, 57, 104], [94, inf, 319]]


def test_an_allocation_says_its_three_sizes_as_people_write_them(two_units: CostTable) -> None:
    allocation = two_units.allocation(np.array([1, 0]), solver="ilp", budget={"bits": 3.0, "bytes": 2000})
    assert allocation.levels == {"q": "4b", "k": "2b"}
    assert allocation.bits == (400 + 600) / 400
    assert allocation.effective_bits == (450 + 750) / 400
    assert allocation.bytes == REST + 57 + 94
    assert allocation.budget == "bits=3,bytes=2000"


def test_a_candidate_is_named_after_its_levels_and_its_database(two_units: CostTable, tmp_path: Path) -> None:
    ids = {two_units.candidate(genome) for genome in [(0, 0), (1, 0), (2, 2)]}
    assert len(ids) == 3
    assert all(len(name) == 12 and set(name) <= set("0123456789abcdef") for name in ids)
    assert two_units.candidate(np.array([1, 0])) == two_units.candidate((1, 0))
    again = database(tmp_path / "again", *two_units.units)
    assert CostTable(again).candidate((1, 0)) == two_units.candidate((1, 0))
    other = [*two_units.units[:1], unit("k", [10, 30], level("2b", 2, 2.5, 95))]
    assert CostTable(database(tmp_path / "other", *other)).candidate((0, 0)) != two_units.candidate((0, 0))


def test_allocations_of_another_database_are_refused(two_units: CostTable, tmp_path: Path) -> None:
    allocation = two_units.allocation([1, 0], solver="ilp", budget={"bits": 3})
    check_database([allocation], two_units.index)
    other = database(tmp_path / "other", *reversed(two_units.units))
    with pytest.raises(UsageError, match=f"{allocation.candidate} was made with another database"):
        check_database([allocation], other)


def test_allocations_come_back_as_they_were_saved(two_units: CostTable, tmp_path: Path) -> None:
    plain = two_units.allocation([1, 0], solver="ilp", budget={"bits": 3})
    saved = [replace(plain, kl=0.1 + 0.2, perplexity=None), plain]
    save_allocations(tmp_path, saved)
    assert load_allocations(tmp_path) == saved


def test_a_budget_is_written_as_briefly_as_it_was_typed() -> None:
    assert budget_text({"bits": 3.0}) == "bits=3"
    assert budget_text({"bits": 2.55, "bytes": 900_000_000}) == "bits=2.55,bytes=900000000"


# --- budgets ---


@pytest.mark.parametrize(
    ("resource", "least", "most"),
    [
        ("bits", 2.0, 8.0),
        ("effective_bits", 2.5, (825 + 2550) / 400),
        ("bytes", REST + 32 + 94, REST + 104 + 319),
    ],
)
def test_a_budget_out_of_reach_says_what_is_reachable_in_the_unit_it_was_given_in(
    two_units: CostTable, resource: str, least: float, most: float
) -> None:
    for amount, fits in ((least, (0, 0)), (most, (2, 2))):
        problem = two_units.problem({resource: amount}, tie=False, losses=None)
        assert problem.feasible(fits)
        assert problem.feasible([2, 2]) == (amount == most)
    with pytest.raises(InfeasibleBudget) as short:
        two_units.problem({resource: least * 0.99}, tie=False, losses=None)
    assert f"{resource} is below the least reachable {least:.6g}" in short.value.message
    assert short.value.reachable == pytest.approx(least)
    with pytest.raises(UsageError) as generous:
        two_units.problem({resource: most * 1.01}, tie=False, losses=None)
    assert f"is above the greatest reachable {most:.6g}" in generous.value.message
    assert f"{least:.6g} to {most:.6g} {resource}" in (generous.value.hint or "")


def test_budgets_that_only_fail_together_are_reported_in_the_same_units(tmp_path: Path) -> None:
    coarse, fine = level("4b", 4, 4.5, 60), level("2b-g2", 2, 10, 130)  # few bits, but a scale for every other weight
    table = CostTable(database(tmp_path / "odd", unit("a", [10, 10], coarse, fine), unit("b", [10, 10], coarse, fine)))
    budget = {"bits": 3.0, "effective_bits": 5.0}
    problem = table.problem(budget, tie=False, losses=[[1.0, 2.0], [1.0, 2.0]])
    with pytest.raises(InfeasibleBudget) as caught:
        SOLVERS["ilp"](problem)
    told = table.in_words(caught.value, budget)
    assert told.message == "no allocation is within bits=3,effective_bits=5: the least effective_bits found is 7.25"
    assert told.budget == 5.0


def test_ties_bind_fused_units_to_levels_that_all_of_them_have(two_units: CostTable) -> None:
    assert two_units.problem({"bits": 3}, tie=False, losses=None).groups == ()
    tied = two_units.problem({"bits": 3}, tie=True, losses=None)
    assert tied.groups == ((0, 1),)
    assert not tied.feasible([2, 0])
    assert tied.feasible([0, 0])


def test_units_of_no_group_or_alone_in_theirs_are_free(tmp_path: Path) -> None:
    two = (level("2b", 2, 2, 25), level("4b", 4, 4, 50))
    units = [unit("q", [10, 10], *two), unit("o", [10, 10], *two, group=None), unit("up", [10, 10], *two, group="0.up")]
    assert CostTable(database(tmp_path / "free", *units)).problem({"bits": 3}, tie=True, losses=None).groups == ()


def test_a_level_without_a_loss_cannot_be_chosen(two_units: CostTable) -> None:
    problem = two_units.problem({"bits": 3}, tie=False, losses=[[3.0, None, 1.0], [1.0, None, None]])
    assert problem.available.tolist() == [[True, False, True], [True, False, False]]


def test_a_unit_without_any_level_is_named_with_the_reason(tmp_path: Path) -> None:
    table = CostTable(
        database(tmp_path / "none", unit("q", [2, 2], level("2b", 2, 2, 1)), unit("k", [2, 2], broken("2b")))
    )
    with pytest.raises(NotFinite, match="unit k has no level to choose: a weight is NaN"):
        table.problem({"bits": 3}, tie=False, losses=None)


# --- milliseconds ---

REST_MS = 0.5
MS = [[0.2, 0.3, 0.25], [0.6, None, 0.7]]
"""4 bits are slower than 8, as without a kernel for them."""


@pytest.fixture
def timed(two_units: CostTable) -> CostTable:
    """The same two units with the times of their levels."""
    return CostTable(two_units.index, Times(MS, REST_MS))


def test_milliseconds_are_those_of_the_whole_model(timed: CostTable) -> None:
    allocation = timed.allocation([2, 0], solver="ilp", budget={"ms": 1.4})
    assert allocation.ms == pytest.approx(REST_MS + 0.25 + 0.6)
    assert allocation.budget == "ms=1.4"
    assert timed.describe([0, 2])["ms"] == pytest.approx(REST_MS + 0.2 + 0.7)


def test_without_measured_times_nothing_is_said_of_milliseconds_and_no_budget_taken(two_units: CostTable) -> None:
    assert two_units.allocation([1, 0], solver="ilp", budget={"bits": 3}).ms is None
    assert "ms" not in two_units.describe([1, 0])
    with pytest.raises(UsageError, match="a budget of ms needs measured times"):
        two_units.problem({"ms": 1.4}, tie=False, losses=None)


def test_a_budget_of_milliseconds_admits_exactly_what_fits_beside_the_rest(timed: CostTable) -> None:
    problem = timed.problem({"ms": REST_MS + 0.25 + 0.6}, tie=False, losses=None)
    assert [problem.feasible(genome) for genome in [(0, 0), (2, 0), (1, 0), (0, 2)]] == [True, True, False, False]


def test_milliseconds_out_of_reach_say_the_least_of_the_whole_model(timed: CostTable) -> None:
    with pytest.raises(InfeasibleBudget, match=r"1\.2 ms is below the least reachable 1\.3 \(short by 0\.1\)") as short:
        timed.problem({"ms": 1.2}, tie=False, losses=None)
    assert short.value.hint == "raise the budget or add a faster level to the menu"
    with pytest.raises(UsageError, match=r"above the greatest reachable 1\.5"):
        timed.problem({"ms": 1.6}, tie=False, losses=None)


def test_a_budget_of_milliseconds_and_one_of_bytes_bind_together(timed: CostTable) -> None:
    losses = [[9.0, 4.0, 0.0], [8.0, None, 0.0]]
    amounts = {"ms": REST_MS + 0.25 + 0.7, "bytes": REST + 57 + 319}
    alone = {name: SOLVERS["ilp"](timed.problem({name: amounts[name]}, tie=False, losses=losses)) for name in amounts}
    assert alone["ms"].choice.tolist() == [2, 2]
    assert alone["bytes"].choice.tolist() == [1, 2]
    both = SOLVERS["ilp"](timed.problem(amounts, tie=False, losses=losses))
    assert both.choice.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("resource", "least", "most"), [("ms", 1.3, 1.5), ("bytes", REST + 126, REST + 423), ("bits", 2.0, 8.0)]
)
def test_a_share_of_a_budget_lies_between_the_least_and_the_greatest_that_is_reachable(
    timed: CostTable, resource: str, least: float, most: float
) -> None:
    for share, expected in (("0%", least), ("100%", most), ("12.5%", least + (most - least) / 8)):
        budget = {"effective_bits": 8.0, resource: share}
        amounts = timed.amounts(budget, tie=False, losses=None)
        assert list(amounts) == ["effective_bits", resource]
        assert amounts == {"effective_bits": 8.0, resource: pytest.approx(expected)}
        timed.problem(amounts, tie=False, losses=None)
    assert timed.allocation([0, 0], solver="ilp", budget={resource: "12.5%"}).budget == f"{resource}=12.5%"


def test_a_share_is_of_what_tied_units_and_finite_losses_leave_reachable(timed: CostTable) -> None:
    tied = timed.amounts({"ms": "0%"}, tie=True, losses=None)
    assert tied["ms"] == pytest.approx(REST_MS + 0.2 + 0.6)
    finite = timed.amounts({"ms": "0%"}, tie=False, losses=[[None, 4.0, 0.0], [8.0, None, 0.0]])
    assert finite["ms"] == pytest.approx(REST_MS + 0.25 + 0.6)


def test_times_of_another_database_are_refused(timed: CostTable, tmp_path: Path) -> None:
    document = {"database": timed.index.digest, "ms": MS, "rest_ms": REST_MS}
    (tmp_path / "latency.json").write_text(json.dumps(document))
    assert load_times(tmp_path, timed.index) == Times(MS, REST_MS)
    (tmp_path / "latency.json").write_text(json.dumps({**document, "database": "0" * 64}))
    with pytest.raises(UsageError, match="the latencies are those of another database"):
        load_times(tmp_path, timed.index)


# --- picking one ---


def measured(*points: tuple[float, float | None]) -> list[Allocation]:
    return [
        Allocation(f"{n:012x}", "ilp", f"bits={bits:g}", {}, (), bits, bits, int(100 * bits), kl)
        for n, (bits, kl) in enumerate(points, 0xABC00)
    ]


BENT = measured((2, 1.0), (2.5, 0.3), (3, 0.05), (4, 0.04), (6, 0.039), (8, None), (5, 0.5))


@pytest.mark.parametrize(
    ("how", "bits"),
    [("knee", 3), ("best", 6), ("smallest", 2), ("bits=4", 4), ("bits=8", 8), ("0000000abc05", 8)],
)
def test_one_of_several_is_picked(how: str, bits: float) -> None:
    assert pick(BENT, how).bits == bits


def test_a_frontier_without_a_bend_gives_its_best() -> None:
    assert pick(measured((2, 1.0), (4, 0.5)), "knee").bits == 4
    assert pick(measured((3, 0.5)), "knee").bits == 3
    assert pick(measured((3, 0.5), (3, 0.5)), "smallest").bits == 3


@pytest.mark.parametrize("how", ["bits=7", "fff", "000", "kneee", ""])
def test_a_pick_that_fits_nothing_lists_what_there_is(how: str) -> None:
    with pytest.raises(UsageError, match=f"pick: '{how}' fits no allocation; there are bits=2 \\(0000000abc00\\)"):
        pick(BENT, how)


@pytest.mark.parametrize("how", ["knee", "best", "smallest"])
def test_nothing_is_best_when_nothing_was_finite(how: str) -> None:
    with pytest.raises(UsageError, match="no allocation has a finite KL"):
        pick(measured((2, None), (3, None)), how)
