"""What a search of one's own is made of: the parts that ours share, under names that stay.

A search that asks for one batch at a time derives from `Batched` and keeps its course in `Rounds`, which has the
incumbent, the books, the stop rules, the asking and the closing round; `Rounds.moves` has random level switches that
keep the budgets. `tests/example_package` of the repository has such a search, `_anneal.py` and `_random.py` are others.
"""

from layerwise.solvers._incumbent import Measured, best_of, fresh
from layerwise.solvers._ledger import Clock, Course
from layerwise.solvers._rounds import FIRST_STREAM, Batched, Rounds

__all__ = ["FIRST_STREAM", "Batched", "Clock", "Course", "Measured", "Rounds", "best_of", "fresh"]
