"""Ranks and multiples against plain enumeration of everything that the budget allows."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from layerwise.errors import InfeasibleBudget, InvalidProblem, LayerwiseError, NotFinite, UsageError
from layerwise.solvers import energy_rank, round_to_multiples, water_filling

SPECTRUM = st.lists(st.integers(0, 6).map(lambda n: n / 2), max_size=4)


@st.composite
def rank_problems(draw, equal_costs=False):
    spectra = draw(st.lists(SPECTRUM, min_size=1, max_size=3))
    number = st.integers(1, 5).map(float)
    costs = [draw(number)] * len(spectra) if equal_costs else [draw(number) for _ in spectra]
    weights = [draw(st.sampled_from([0.0, 1.0, 2.5])) for _ in spectra]
    return spectra, draw(st.integers(0, 30).map(float)), costs, weights


def error_of(ranks: tuple[int, ...], spectra: list[list[float]], weights: list[float]) -> float:
    dropped = [sorted(s, reverse=True)[rank:] for rank, s in zip(ranks, spectra, strict=True)]
    return sum(weight * sum(value**2 for value in values) for weight, values in zip(weights, dropped, strict=True))


def least_error(spectra: list[list[float]], budget: float, costs: list[float], weights: list[float]) -> float:
    every = itertools.product(*(range(len(s) + 1) for s in spectra))
    affordable = (r for r in every if sum(c * n for c, n in zip(costs, r, strict=True)) <= budget)
    return min(error_of(ranks, spectra, weights) for ranks in affordable)


@given(rank_problems())
def test_the_error_is_above_the_optimum_by_less_than_the_first_value_that_did_not_fit(problem) -> None:
    spectra, budget, costs, weights = problem
    found = water_filling(*problem)
    ranks = tuple(found.ranks.tolist())
    optimum = least_error(*problem)
    assert found.cost == sum(c * n for c, n in zip(costs, ranks, strict=True)) <= budget
    assert found.error == pytest.approx(error_of(ranks, spectra, weights), abs=1e-12)
    assert found.lower_bound <= optimum + 1e-7  # the budget itself is widened by 1e-9
    assert optimum <= found.error + 1e-12
    assert found.error <= optimum + found.threshold * max(costs)
    assert found.error == pytest.approx(optimum) or found.error < optimum + found.threshold * max(costs)


@given(rank_problems(equal_costs=True))
def test_equal_costs_make_it_optimal(problem) -> None:
    assert water_filling(*problem).error == pytest.approx(least_error(*problem), abs=1e-12)


@given(rank_problems())
def test_the_lower_bound_is_the_linear_program(problem) -> None:
    spectra, budget, costs, weights = problem
    gains = [w * value**2 for w, s in zip(weights, spectra, strict=True) for value in s]
    if not gains:
        return
    each = [cost for cost, s in zip(costs, spectra, strict=True) for _ in s]
    answer = linprog([-gain for gain in gains], A_ub=[each], b_ub=[budget], bounds=(0, 1))
    assert water_filling(*problem).lower_bound == pytest.approx(sum(gains) + answer.fun, abs=1e-6)


@given(rank_problems())
def test_the_threshold_parts_what_is_kept_from_what_is_dropped(problem) -> None:
    spectra, _, costs, weights = problem
    found = water_filling(*problem)
    for rank, spectrum, cost, weight in zip(found.ranks, spectra, costs, weights, strict=True):
        wins = [weight * value**2 / cost for value in sorted(spectrum, reverse=True)]
        assert all(win <= found.threshold for win in wins[rank:])
        assert rank >= sum(win > found.threshold for win in wins)


@given(rank_problems(), st.integers(0, 5))
def test_more_budget_never_raises_the_bound(problem, more: int) -> None:
    spectra, budget, costs, weights = problem
    more_found = water_filling(spectra, budget + more, costs, weights)
    assert more_found.lower_bound <= water_filling(*problem).lower_bound + 1e-9


def test_reverse_water_filling_of_two_layers_with_factors() -> None:
    wide, square = [4.0, 2.0, 1.0], [3.0, 3.0, 0.5]
    found = water_filling([wide, square], budget=60, costs=[4 + 16, 4 + 4])
    # Wins per cost: 16/20, 4/20, 1/20 and 9/8, 9/8, 0.25/8. Two of the square matrix, one and two of the wide one: 56.
    assert found.ranks.tolist() == [2, 2]
    assert (found.cost, found.error, found.threshold) == (56, 1.25, 1 / 20)
    assert found.lower_bound == pytest.approx(1.25 - 4 / 20)


def test_room_under_the_budget_is_filled_with_cheaper_ranks() -> None:
    found = water_filling([[10.0], [1.0, 1.0, 1.0]], budget=5, costs=[6.0, 2.0])
    assert found.ranks.tolist() == [0, 2]
    assert found.threshold == pytest.approx(100 / 6)
    assert found.error == 101


def test_the_edges_of_the_budget() -> None:
    spectra = [[2.0, 1.0, 0.0], [0.0, 0.0]]
    nothing, everything = water_filling(spectra, 0), water_filling(spectra, math.inf)
    assert (nothing.ranks.tolist(), nothing.error, nothing.lower_bound) == ([0, 0], 5, 5)
    assert (everything.ranks.tolist(), everything.error, everything.threshold) == ([2, 0], 0, 0)
    assert water_filling(spectra, 0.3, costs=0.1).ranks.tolist() == [2, 0]
    assert water_filling([], 5).ranks.shape == (0,)
    assert water_filling([[], [1.0]], 5).ranks.tolist() == [0, 1]
    with pytest.raises(InfeasibleBudget, match="below the least reachable 0"):
        water_filling(spectra, -1)


def test_equal_values_go_to_the_first_matrix() -> None:
    assert water_filling([[1.0, 1.0], [1.0, 1.0]], 3).ranks.tolist() == [2, 1]


def test_ranks_move_with_their_matrices() -> None:
    rng = np.random.default_rng(0)
    spectra = [rng.lognormal(size=size) for size in (30, 50, 40)]
    costs, order = np.array([3.0, 5.0, 4.0]), [2, 0, 1]
    ranks = water_filling(spectra, 200, costs).ranks
    assert water_filling([spectra[i] for i in order], 200, costs[order]).ranks.tolist() == ranks[order].tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"singular_values": [[1.0], [2.0, math.nan]]},
            NotFinite,
            "singular values of k must be numbers, found nan at 1",
        ),
        ({"singular_values": [[math.inf], [1.0]]}, NotFinite, "singular values of q must be finite, found inf at 0"),
        ({"singular_values": [[1.0], [-1.0]]}, UsageError, "singular values of k must be at least 0, found -1 at 0"),
        ({"singular_values": [[1.0], [[1.0]]]}, UsageError, r"of k are an array \(rank,\), found shape \(1, 1\)"),
        ({"costs": [1.0, 0.0]}, UsageError, "costs must be above 0, found 0 at k"),
        ({"costs": [1.0]}, UsageError, r"one number or one for each of 2, found shape \(1,\)"),
        ({"weights": [math.nan, 1.0]}, NotFinite, "weights must be numbers, found nan at q"),
        ({"budget": math.nan}, UsageError, "the budget is NaN"),
        ({"units": ["q", "q"]}, InvalidProblem, "two units are named q"),
    ],
)
def test_water_filling_says_where_a_mistake_stands(arguments, error: type[LayerwiseError], message: str) -> None:
    fine = {"singular_values": [[1.0], [2.0]], "budget": 1, "units": ["q", "k"]}
    with pytest.raises(error, match=message):
        water_filling(**{**fine, **arguments})


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(0, 100))
def test_the_energy_rank_is_the_first_that_keeps_the_share(values: list[int], percent: int) -> None:
    squares = sorted((value**2 for value in values), reverse=True)
    enough = [rank for rank in range(len(values) + 1) if 100 * sum(squares[:rank]) >= percent * sum(squares)]
    assert energy_rank(values, percent / 100) == enough[0]


def test_the_whole_energy_needs_every_value_however_small() -> None:
    assert energy_rank([1.0, 1e-12, 0.0], 1.0) == 2
    assert energy_rank([1.0, 1e-12, 0.0], 0.999) == 1
    assert energy_rank([math.sqrt(55), math.sqrt(45)], 0.55) == 1  # although 100 - 0.55 * 100 is rounded below 45
    assert energy_rank([0.0, 0.0], 1.0) == energy_rank([], 0.5) == energy_rank([3.0], 0.0) == 0


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_is_between_zero_and_one(share: float) -> None:
    with pytest.raises(UsageError, match="a share is between 0 and 1"):
        energy_rank([1.0], share)


def test_a_spectrum_that_is_not_known_has_no_energy_rank() -> None:
    with pytest.raises(NotFinite, match="the singular values of the matrix must be numbers, found nan at 1"):
        energy_rank([1.0, math.nan], 0.5)


@st.composite
def roundings(draw, equal_steps=False):
    n_units = draw(st.integers(1, 4))

    def each(number):
        return np.array([draw(number) for _ in range(n_units)], dtype=float)

    values = each(st.integers(0, 40).map(lambda n: n / 2))
    multiples = each(st.just(4.0) if equal_steps else st.sampled_from([1, 2, 4, 8]))
    costs = each(st.just(3.0) if equal_steps else st.integers(1, 4))
    minimum, room = each(st.integers(0, 9)), each(st.integers(8, 24))
    budget = draw(st.sampled_from([None, math.inf]) | st.integers(0, 200).map(float))
    return values, multiples, {"budget": budget, "costs": costs, "minimum": minimum, "maximum": minimum + room}


def choices(multiples: np.ndarray, minimum: np.ndarray, maximum: np.ndarray) -> np.ndarray:
    """Every multiple within the bounds, for all units."""
    each = [
        [k for k in range(0, 64, int(m)) if low <= k <= high]
        for m, low, high in zip(multiples, minimum, maximum, strict=True)
    ]
    return np.array(list(itertools.product(*each)), dtype=float)


def targets_of(values: np.ndarray, least: np.ndarray, greatest: np.ndarray, costs: np.ndarray, budget: float | None):
    """The targets within bounds, and the greatest common factor within the budget: units at their least drop out."""
    targets = np.clip(values, least, greatest)
    if budget is None or costs @ targets <= budget:
        return targets
    held = np.zeros(len(values), dtype=bool)
    while (costs * targets)[~held].sum() > 0:
        factor = (budget - (costs * least)[held].sum()) / (costs * targets)[~held].sum()
        below = ~held & (factor * targets < least)
        if not below.any():
            return np.where(held, least, factor * targets)
        held |= below
    return least


def check_rounding(values, multiples, options, allowed_steps: float) -> None:
    """Bounds and budget hold, and no rounding of the same cost is nearer by more than so many of the dearest step."""
    budget, costs = options["budget"], options["costs"]
    every = choices(multiples, options["minimum"], options["maximum"])
    least, greatest = every.min(axis=0), every.max(axis=0)
    if budget is not None and costs @ least > budget:
        with pytest.raises(InfeasibleBudget, match=f"budget {budget:g} cost is below the least reachable"):
            round_to_multiples(values, multiples, **options)
        return
    found = round_to_multiples(values, multiples, **options)
    targets = targets_of(values, least, greatest, costs, budget)
    cost, asked = costs @ found, costs @ targets
    assert found.dtype == np.int64
    assert (found % multiples == 0).all()
    assert (found >= least).all() and (found <= greatest).all()
    assert (np.abs(found - targets) < multiples + 1e-6).all()
    assert cost <= (asked if budget is None else budget) * (1 + 1e-9)
    alike = every[np.isclose(every @ costs, cost)]
    nearest = (np.abs(alike - targets) @ costs).min()
    assert np.abs(found - targets) @ costs <= nearest + allowed_steps * (costs * multiples).max() + 1e-6
    up = found < targets - 1e-6  # those that could still go up: none of them fits
    assert (cost + (costs * multiples)[up] > min(asked, math.inf if budget is None else budget)).all()


@given(roundings())
def test_no_rounding_of_the_same_cost_is_nearer_by_two_steps(rounding) -> None:
    check_rounding(*rounding, allowed_steps=2)


@given(roundings(equal_steps=True))
def test_with_equal_steps_no_rounding_of_the_same_cost_is_nearer_at_all(rounding) -> None:
    check_rounding(*rounding, allowed_steps=0)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8), st.integers(1, 40))
def test_seats_are_those_of_hamilton(votes: list[int], seats: int) -> None:
    if sum(votes) == 0:
        return
    quotas = [vote * seats / sum(votes) for vote in votes]
    found = round_to_multiples(quotas, 1)
    assert found.sum() == seats
    # Exact remainders: vote * seats modulo all votes. Whoever got the extra seat has at least as much as who did not.
    remainders = [vote * seats % sum(votes) for vote in votes]
    extra = [bool(n > vote * seats // sum(votes)) for n, vote in zip(found, votes, strict=True)]
    got = [r for r, up in zip(remainders, extra, strict=True) if up]
    assert all(r <= min(got, default=math.inf) for r, up in zip(remainders, extra, strict=True) if not up)


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=8), st.sampled_from([1, 8, 64]))
def test_without_a_limit_halves_go_up_and_the_sum_stays_near_that_of_the_targets(
    values: list[float], multiple: int
) -> None:
    nearest = [math.floor(Fraction(value) / multiple + Fraction(1, 2)) * multiple for value in values]
    found = round_to_multiples(values, multiple, budget=math.inf)
    assert (found >= nearest).all()
    assert found.sum() > sum(values) - multiple - 1e-4
    if sum(nearest) > sum(values):
        assert found.tolist() == nearest


def test_halves_go_up_where_the_budget_has_room() -> None:
    assert round_to_multiples([4, 12], 8, budget=24).tolist() == [8, 16]
    assert round_to_multiples([4, 12], 8, budget=23).tolist() == [8, 8]


def test_targets_that_are_multiples_stay() -> None:
    assert round_to_multiples([0, 8, 64], 8).tolist() == [0, 8, 64]
    assert round_to_multiples([0.1 * 240], 8).tolist() == [24]  # 24.000000000000004
    assert round_to_multiples([23.999999999999996], 8).tolist() == [24]
    assert round_to_multiples([], 8).tolist() == []


def test_the_room_that_rounding_down_leaves_is_used() -> None:
    assert round_to_multiples([11, 11, 11], 8).tolist() == [16, 8, 8]
    assert round_to_multiples([11, 12, 13], 8, costs=[2, 2, 1]).tolist() == [8, 8, 16]
    assert round_to_multiples([70, 70], [64, 8]).tolist() == [64, 72]


def test_a_smaller_budget_shrinks_all_targets_alike_down_to_their_minimum() -> None:
    assert round_to_multiples([64, 128, 256], 8, budget=224).tolist() == [32, 64, 128]
    assert round_to_multiples([64, 128, 256], 8, budget=224, minimum=[48, 0, 0]).tolist() == [48, 56, 120]


def test_minima_above_the_budget_name_the_dearest_units() -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        round_to_multiples([8, 8], 8, budget=20, costs=[1, 2], minimum=5, units=["q", "k"])
    assert caught.value.message == (
        "budget 20 cost is below the least reachable 24 (short by 4); the dearest minima: k 16, q 8"
    )
    assert (caught.value.budget, caught.value.reachable) == (20, 24)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"values": [1.0, math.nan]}, NotFinite, "values must be numbers, found nan at k"),
        ({"values": [math.inf, 1.0]}, NotFinite, "values must be finite, found inf at q"),
        ({"values": [1.0, -2.0]}, UsageError, "values must be at least 0, found -2 at k"),
        ({"values": 3.0}, UsageError, r"values are an array \(units,\), found shape \(\)"),
        ({"multiple": [8, 0]}, UsageError, "multiples must be above 0, found 0 at k"),
        ({"multiple": 2.5}, UsageError, "multiples must be whole, found 2.5 at q"),
        ({"costs": [0, 1]}, UsageError, "costs must be above 0, found 0 at q"),
        ({"minimum": 9, "maximum": [16, 15]}, InvalidProblem, "k has no multiple of 8 between 9 and 15"),
        ({"maximum": math.nan}, NotFinite, "maximum must be numbers, found nan at q"),
        ({"budget": math.nan}, UsageError, "the budget is NaN"),
    ],
)
def test_rounding_says_where_a_mistake_stands(arguments, error: type[LayerwiseError], message: str) -> None:
    fine = {"values": [8.0, 9.0], "multiple": 8, "units": ["q", "k"]}
    with pytest.raises(error, match=message):
        round_to_multiples(**{**fine, **arguments})
