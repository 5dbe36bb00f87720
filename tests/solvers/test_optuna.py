import logging
import subprocess
import sys

import numpy as np
import pytest

from layerwise.solvers import NSGA2, TPE, Problem, Stop, greedy


@pytest.fixture
def tight_budget():
    """Twelve units whose budget nearly every random allocation exceeds."""
    rng = np.random.default_rng(0)
    bits = np.cumsum(rng.uniform(1, 2, (12, 4)), axis=1)
    losses = rng.lognormal(0, 1, (12, 1)) * 3.0 ** -np.arange(4)
    return Problem(costs={"bits": bits}, budgets={"bits": 30.0}, losses=losses)


@pytest.mark.parametrize("search", [TPE, NSGA2])
def test_under_a_tight_budget_proposals_are_repaired_and_the_search_still_learns(search, tight_budget):
    start = np.zeros(12, dtype=np.int64)
    made = search(tight_budget, start, stop=Stop(evaluations=160))
    while not made.done:
        ask = made.ask()
        assert all(tight_budget.feasible(choice) for choice in ask.candidates)
        made.tell([tight_budget.loss(choice) for choice in ask.candidates])
    least = greedy(tight_budget).lower_bound or greedy(tight_budget).loss
    assert made.best.loss - least < 0.5 * (tight_budget.loss(start) - least)


@pytest.mark.parametrize("search", [TPE, NSGA2])
def test_the_start_is_the_first_trial_and_nothing_is_proposed_twice(search, tight_budget):
    start = greedy(tight_budget)
    made = search(tight_budget, start, stop=Stop(evaluations=60))
    assert made.ask().candidates[0].tolist() == start.choice.tolist()
    asked = []
    while not made.done:
        asked += [choice.tobytes() for choice in made.ask().candidates]
        made.tell([1.0] * len(made.ask().candidates))
    assert len(set(asked)) == len(asked)


def test_optuna_says_nothing_and_its_log_level_is_left_alone(tight_budget, capfd):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        search = TPE(tight_budget, stop=Stop(evaluations=30))
        while not search.done:
            search.tell([1.0] * len(search.ask().candidates))
        assert optuna.logging.get_verbosity() == logging.INFO
    finally:
        optuna.logging.set_verbosity(optuna.logging.INFO)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_optuna_is_loaded_only_for_a_search_that_uses_it():
    script = (
        "import sys; from layerwise.solvers import Random, Problem; Random(Problem(costs={'bits': [[1.0, 2.0]]}));"
        "sys.exit('optuna' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
