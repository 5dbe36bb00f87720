"""Conformance suites: what compressors, encodings, statistics, solvers, searches and stages promise, ours and those of
other packages alike.

    from layerwise.testing import check_compressor

    def test_ternary_keeps_its_promises():
        check_compressor("ternary", [{"group_size": [-1, 7]}])

Each `check_...` raises AssertionError with a sentence that says which promise is broken. Beside it stands a list of the
same promises, to parametrise over (`promises.py`). Names are those of our tables or of entry points, so a package is
tested as it is found once it is installed.

The suites of solvers and searches draw random problems with hypothesis (`pip install layerwise[testing]`); nothing else
needs a test framework, and neither torch nor hypothesis is loaded before a promise is checked.
"""

from layerwise.testing.compressors import check_compressor, compressor_promises
from layerwise.testing.encodings import check_encoding, encoding_promises
from layerwise.testing.promises import Promise
from layerwise.testing.searches import check_search, search_promises
from layerwise.testing.solvers import check_solver, solver_promises
from layerwise.testing.stages import Bench, check_stage, stage_promises
from layerwise.testing.statistics import check_statistic, statistic_promises

__all__ = [
    "Bench",
    "Promise",
    "check_compressor",
    "check_encoding",
    "check_search",
    "check_solver",
    "check_stage",
    "check_statistic",
    "compressor_promises",
    "encoding_promises",
    "search_promises",
    "solver_promises",
    "stage_promises",
    "statistic_promises",
]
