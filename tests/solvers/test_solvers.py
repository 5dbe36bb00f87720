"""Every solver of the table keeps what `layerwise.testing` says that solvers promise, and what only ours promise."""

import subprocess
import sys

import pytest

from layerwise.solvers import SOLVERS, dp, greedy, ilp, uniform
from layerwise.testing import Promise, solver_promises
from layerwise.testing.solvers import INTERACTING, Claims

CLAIMS = {
    "uniform": Claims(incomplete=True, without_losses=True),
    "even": Claims(incomplete=True, without_losses=True),
    "bisect": Claims(incomplete=True),
    "greedy": Claims(refuses=INTERACTING),
    "lagrange": Claims(refuses=INTERACTING),
    "lp": Claims(refuses={"reverse with interactions"}),
    "dp": Claims(refuses={"several budgets", "reverse with budgets", *INTERACTING}, exact=True),
    "ilp": Claims(refuses={"reverse with interactions"}, exact=True),
    "branch": Claims(refuses={"reverse with interactions"}, exact=True),
    "brute": Claims(exact=True),
}
TOO_LARGE_FOR_BRUTE = ("a tighter budget", "the order of the units", "one catastrophic level")


def promises() -> list[Promise]:
    every = [promise for name, claims in CLAIMS.items() for promise in solver_promises(name, claims)]
    return [p for p in every if not (p.of == "solver brute" and p.text.startswith(TOO_LARGE_FOR_BRUTE))]


def test_every_solver_of_the_table_is_tried_here():
    assert set(CLAIMS) == set(SOLVERS)


@pytest.mark.parametrize("promise", promises(), ids=str)
def test_a_solver_keeps_its_promises(promise):
    promise()


def test_greedy_lies_between_uniform_and_the_optimum_on_tables_like_a_models(random_tables):
    for seed in range(5):
        problem = random_tables(40, 5, seed)
        assert ilp(problem).loss * (1 - 1e-9) <= greedy(problem).loss <= uniform(problem).loss


@pytest.mark.parametrize("seed", range(3))
def test_exact_solvers_agree_to_nine_digits_on_56_layers_with_5_levels(seed, random_tables, milp_optimum):
    problem = random_tables(56, 5, seed)
    optimum = milp_optimum(problem)
    assert ilp(problem).loss == pytest.approx(optimum, rel=1e-9)
    assert ilp(problem, backend="CBC").loss == pytest.approx(optimum, rel=1e-9)
    assert dp(problem).loss == pytest.approx(optimum, rel=1e-9)


def test_importing_the_solvers_loads_nothing_heavy():
    heavy = ["torch", "ray", "transformers", "pulp", "scipy", "optuna", "pandas"]
    code = f"import sys, layerwise.solvers; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
