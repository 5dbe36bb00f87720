"""Every search of the table keeps what `layerwise.testing` says that searches promise."""

import math

import pytest

from layerwise.errors import UsageError
from layerwise.solvers import SEARCHES, Stop
from layerwise.testing import search_promises
from layerwise.testing.searches import Short

SHORT = {
    "evolve": Short(
        {"generations": 6, "offspring": 6, "survivors": (3, 1), "tokens": (64, 256), "initially_generated": 4},
        {"tokens": (None, None), "initial_tokens": None},
        {"generations": 3},
    ),
    "genetic": Short({"population": 6, "tokens_per_ask": 64, "stop": Stop(evaluations=80)}),
    "anneal": Short({"batch": 3, "tokens_per_ask": 64, "stop": Stop(evaluations=50)}),
    "random": Short({"batch": 4, "tokens_per_ask": 64, "stop": Stop(evaluations=50)}, remembers=True),
    "tpe": Short({"batch": 3, "tokens_per_ask": 64, "stop": Stop(evaluations=50), "random_trials": 8}, remembers=True),
    "nsga2": Short({"population": 4, "tokens_per_ask": 64, "stop": Stop(evaluations=40)}, remembers=True),
}


def test_every_search_of_the_table_is_tried_here():
    assert set(SHORT) == set(SEARCHES)


@pytest.mark.parametrize(
    "promise", [promise for name, short in SHORT.items() for promise in search_promises(name, short)], ids=str
)
def test_a_search_keeps_its_promises(promise):
    promise()


@pytest.mark.parametrize(
    "wrong",
    [
        {"evaluations": 0}, {"tokens": 0}, {"patience": 0}, {"seconds": -1.0}, {"seconds": math.nan},
        {"gap": 0.1}, {"lower_bound": 1.0}, {"gap": -0.1, "lower_bound": 1.0}, {"gap": 0.1, "lower_bound": math.inf},
    ],
)  # fmt: skip
def test_rules_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match="stop"):
        Stop(**wrong)
