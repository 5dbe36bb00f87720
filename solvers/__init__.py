"""Budget allocation and search: plain functions over numpy, usable without the rest of layerwise.

    from layerwise.solvers import Problem, branch

    problem = Problem(costs={"bits": bits}, budgets={"bits": 3.0 * n_weights}, losses=losses)  # arrays (units, levels)
    solution = branch(problem)  # solution.choice, .loss, .gap

Solvers take a `Problem` whose loss is known from tables and return a `Solution`. Searches take one whose loss has to be
measured, and speak ask and tell (`search.py`). `README.md` beside this file says which to use when. Neither torch nor
Ray is ever loaded; scipy, PuLP, Optuna and pandas only when they are needed.
"""

from collections.abc import Callable

from layerwise.errors import InfeasibleBudget, InvalidProblem
from layerwise.solvers._anneal import Anneal
from layerwise.solvers._bisect import bisect
from layerwise.solvers._branch import branch
from layerwise.solvers._brute import brute
from layerwise.solvers._dp import dp
from layerwise.solvers._even import even
from layerwise.solvers._evolve import Evolve
from layerwise.solvers._frontier import Frontier, frontier
from layerwise.solvers._genetic import Genetic
from layerwise.solvers._greedy import greedy
from layerwise.solvers._ilp import any_feasible, ilp
from layerwise.solvers._lagrange import lagrange
from layerwise.solvers._lp import lp
from layerwise.solvers._optuna import NSGA2, TPE
from layerwise.solvers._random import Random
from layerwise.solvers._uniform import uniform
from layerwise.solvers.pareto import (
    Comparison,
    compare,
    crowding_distance,
    hypervolume,
    knee,
    non_dominated,
    non_dominated_ranks,
)
from layerwise.solvers.presets import PRESETS, Preset, depth_generations
from layerwise.solvers.problem import Choice, Problem, Solution
from layerwise.solvers.ranks import Ranks, energy_rank, round_to_multiples, water_filling
from layerwise.solvers.search import Ask, Search
from layerwise.solvers.stopping import Stop

SOLVERS: dict[str, Callable[[Problem], Solution]] = {
    "uniform": uniform,
    "even": even,
    "greedy": greedy,
    "lagrange": lagrange,
    "ilp": ilp,
    "dp": dp,
    "branch": branch,
    "lp": lp,
    "bisect": bisect,
    "brute": brute,
}
"""Solvers of separable problems by name. Each also has options of its own, all with defaults."""

SEARCHES: dict[str, Callable[..., Search]] = {
    "evolve": Evolve,
    "genetic": Genetic,
    "anneal": Anneal,
    "random": Random,
    "tpe": TPE,
    "nsga2": NSGA2,
}
"""Searches over measured allocations by name; made from a problem, a start, a seed, and options with defaults."""

__all__ = [
    "NSGA2",
    "PRESETS",
    "SEARCHES",
    "SOLVERS",
    "TPE",
    "Anneal",
    "Ask",
    "Choice",
    "Comparison",
    "Evolve",
    "Frontier",
    "Genetic",
    "InfeasibleBudget",
    "InvalidProblem",
    "Preset",
    "Problem",
    "Random",
    "Ranks",
    "Search",
    "Solution",
    "Stop",
    "any_feasible",
    "bisect",
    "branch",
    "brute",
    "compare",
    "crowding_distance",
    "depth_generations",
    "dp",
    "energy_rank",
    "even",
    "frontier",
    "greedy",
    "hypervolume",
    "ilp",
    "knee",
    "lagrange",
    "lp",
    "non_dominated",
    "non_dominated_ranks",
    "round_to_multiples",
    "uniform",
    "water_filling",
]
