import numpy as np
import pytest

from layerwise.errors import UsageError
from layerwise.solvers import Problem, Random, Stop


@pytest.fixture
def nineteen_allocations():
    """Four equal units with levels of cost 0, 1 and 2, and a budget of 4, which 19 allocations use up."""
    return Problem(costs={"bits": np.tile([0.0, 1.0, 2.0], (4, 1))}, budgets={"bits": 4.0})


def test_allocations_use_the_budget_up_and_are_all_found_once(nineteen_allocations):
    search = Random(nineteen_allocations, stop=Stop())
    asked = []
    while not search.done:
        asked += [choice.tolist() for choice in search.ask().candidates]
        search.tell([float(choice @ [1, 2, 3, 4]) for choice in search.ask().candidates])
    assert sorted(asked) == [list(levels) for levels in np.ndindex(3, 3, 3, 3) if sum(levels) == 4]
    assert search.best.choice.tolist() == [2, 2, 0, 0]


def test_a_batch_of_none_is_refused(nineteen_allocations):
    with pytest.raises(UsageError, match="at least 1 candidate"):
        Random(nineteen_allocations, batch=0)
