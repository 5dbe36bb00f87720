"""Budget allocation and search: plain functions over numpy, usable without the rest of layerwise.

    from layerwise.solvers import Problem, ilp

    problem = Problem(costs={"bits": bits}, budgets={"bits": 3.0 * n_weights}, losses=losses)  # arrays (units, levels)
    solution = ilp(problem)

Solvers take a `Problem` whose loss is a sum of table entries and return a `Solution`. Searches take one whose loss has
to be measured, and speak ask and tell (`search.py`). Neither torch nor Ray is ever loaded, PuLP only when it is needed.
"""

from collections.abc import Callable

from layerwise.solvers._dp import dp
from layerwise.solvers._evolve import Evolve
from layerwise.solvers._greedy import greedy
from layerwise.solvers._ilp import any_feasible, ilp
from layerwise.solvers._uniform import uniform
from layerwise.solvers.presets import PRESETS, Preset, depth_generations
from layerwise.solvers.problem import Choice, Problem, Solution
from layerwise.solvers.search import Ask, Search

SOLVERS: dict[str, Callable[[Problem], Solution]] = {"uniform": uniform, "greedy": greedy, "ilp": ilp, "dp": dp}
"""Solvers of separable problems by name. Each also has options of its own, all with defaults."""

SEARCHES: dict[str, Callable[..., Search]] = {"evolve": Evolve}
"""Searches over measured allocations by name; each is made from a problem, a start and a seed."""

__all__ = [
    "PRESETS",
    "SEARCHES",
    "SOLVERS",
    "Ask",
    "Choice",
    "Evolve",
    "Preset",
    "Problem",
    "Search",
    "Solution",
    "any_feasible",
    "depth_generations",
    "dp",
    "greedy",
    "ilp",
    "uniform",
]
