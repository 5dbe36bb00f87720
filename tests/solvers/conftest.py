"""Random problems and the oracles for them, as fixtures; `layerwise.testing` has them for everybody."""

from collections.abc import Callable

import pytest
from hypothesis import strategies as st

from layerwise.solvers import Problem
from layerwise.testing import oracles, random_problems
from layerwise.testing import problems as examples


@pytest.fixture(scope="session")
def problems() -> Callable[..., st.SearchStrategy[Problem]]:
    return random_problems.problems


@pytest.fixture(scope="session")
def brute_force() -> Callable[[Problem], float | None]:
    return oracles.brute_force


@pytest.fixture(scope="session")
def sums() -> Callable[..., dict[str, float]]:
    return oracles.sums


@pytest.fixture(scope="session")
def milp_optimum() -> Callable[[Problem], float | None]:
    return oracles.milp_optimum


@pytest.fixture(scope="session")
def random_tables() -> Callable[..., Problem]:
    return examples.random_tables


@pytest.fixture
def tied_units() -> Problem:
    return examples.tied_units()
