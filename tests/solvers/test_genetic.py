import itertools

import numpy as np
import pytest

from layerwise.errors import UsageError
from layerwise.solvers import NSGA2, Genetic, Problem, Stop

SEARCHES = [Genetic, NSGA2]


@pytest.fixture
def small_menu():
    """Five units with three levels: 243 allocations, few enough to know every trade-off."""
    rng = np.random.default_rng(0)
    costs = np.cumsum(rng.uniform(1, 3, (5, 3)), axis=1)
    losses = np.sort(rng.uniform(0, 1, (5, 3)), axis=1)[:, ::-1]
    return Problem(costs={"bytes": costs, "ms": costs[:, ::-1]}, budgets={"bytes": 24.0}, losses=losses)


def run(search, problem):
    measured = []
    while not search.done:
        ask = search.ask()
        measured += ask.candidates
        search.tell([problem.loss(choice) for choice in ask.candidates])
    return measured


def beaten(point, points):
    return any(all(a <= b for a, b in zip(p, point, strict=True)) and p != point for p in points)


def points_of(problem, choices):
    return [(problem.loss(choice), problem.cost(choice)["bytes"]) for choice in choices]


@pytest.mark.parametrize("search", SEARCHES)
def test_the_archive_is_what_nothing_measured_beats(search, small_menu):
    made = search(small_menu, objectives=("loss", "bytes"), population=8, stop=Stop(evaluations=100))
    measured = set(points_of(small_menu, run(made, small_menu)))
    front = {point for point in measured if not beaten(point, measured)}
    assert [(s.loss, s.cost["bytes"]) for s in made.archive] == sorted(front)
    assert made.archive[0].loss == made.best.loss


def test_the_whole_front_of_a_small_problem_is_found(small_menu):
    every = [choice for choice in itertools.product(range(3), repeat=5) if small_menu.feasible(choice)]
    points = points_of(small_menu, every)
    front = {point for point in points if not beaten(point, points)}
    for seed in range(3):
        search = Genetic(
            small_menu, seed=seed, objectives=("loss", "bytes"), population=40, stop=Stop(evaluations=2000)
        )
        run(search, small_menu)
        assert {(s.loss, s.cost["bytes"]) for s in search.archive} == front


def test_with_the_loss_alone_the_optimum_is_found_and_the_archive_is_it(small_menu):
    every = [choice for choice in itertools.product(range(3), repeat=5) if small_menu.feasible(choice)]
    best = min(small_menu.loss(choice) for choice in every)
    search = Genetic(small_menu, population=16, stop=Stop(evaluations=400))
    run(search, small_menu)
    assert search.best.loss == pytest.approx(best, rel=1e-12)
    assert [solution.loss for solution in search.archive] == [search.best.loss]


@pytest.mark.parametrize("search", SEARCHES)
def test_on_samples_the_archive_ends_with_finalists_measured_on_all_of_the_data(search, small_menu):
    made = search(small_menu, objectives=("loss", "ms"), population=6, tokens_per_ask=8, stop=Stop(evaluations=60))
    while not made.done:
        closing = made.ask()
        made.tell([small_menu.loss(choice) * (1 if closing.tokens is None else 7) for choice in closing.candidates])
    assert closing.tokens is None
    asked = {choice.tobytes() for choice in closing.candidates}
    assert all(s.choice.tobytes() in asked and s.loss == small_menu.loss(s.choice) for s in made.archive)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    "wrong", [{"objectives": ("loss", "joules")}, {"objectives": ("bytes",)}, {"objectives": ("loss", "loss")},
              {"population": 1}]
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(search, small_menu, wrong):
    with pytest.raises(UsageError):
        search(small_menu, **wrong)
