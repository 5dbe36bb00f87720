"""Solvers and searches by their names: the library's, then those of other packages.

A solver joins through the entry point group `layerwise.solvers`: a function of a `Problem` that gives a `Solution`. A
search joins through `layerwise.searches`: a class, or function, that is called as `make(problem, start, seed,
total_tokens=..., stop=...)` and speaks `layerwise.solvers.Search`; of `SETTINGS` in `stage.py` it gets those that it
has an argument for. `layerwise.testing` says what both must fulfil.
"""

from __future__ import annotations

from collections.abc import Callable

from layerwise.solvers import SEARCHES, SOLVERS, Problem, Search, Solution
from layerwise.stages.registry import lookup, names

SOLVER_GROUP = "layerwise.solvers"
SEARCH_GROUP = "layerwise.searches"


def solver_names() -> list[str]:
    """Every separable solver."""
    return names(SOLVERS, SOLVER_GROUP)


def search_names() -> list[str]:
    """Every search."""
    return names(SEARCHES, SEARCH_GROUP)


def is_search(name: str) -> bool:
    """Whether the method of that name measures candidates."""
    return name in search_names()


def find_solver(name: str) -> Callable[[Problem], Solution]:
    """The separable solver of that name.

    Raises:
        UsageError: nobody offers it; names the nearest known one.
    """
    solver: Callable[[Problem], Solution] = lookup(name, SOLVERS, group=SOLVER_GROUP, kind="solver")
    return solver


def find_search(name: str) -> Callable[..., Search]:
    """What makes the search of that name.

    Raises:
        UsageError: nobody offers it; names the nearest known one.
    """
    search: Callable[..., Search] = lookup(name, SEARCHES, group=SEARCH_GROUP, kind="search")
    return search
