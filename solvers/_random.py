"""Random search: the baseline that a search has to beat.

An allocation goes up from the cheapest one in random steps until nothing fits in the budgets any more. Nothing is
learnt on the way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import ArrayLike

from layerwise.solvers._incumbent import digest, fresh
from layerwise.solvers._ledger import Clock, Course
from layerwise.solvers._rounds import FIRST_STREAM, Batched, Rounds
from layerwise.solvers.problem import Problem, Solution
from layerwise.solvers.stopping import Stop


class Random(Batched):
    """Evaluate random allocations within the budgets; no allocation is asked for twice, except the best so far.

    Args:
        problem: any number of budgets; losses are not needed and not used.
        start: an allocation or a solver's solution, measured with the first batch.
        seed: 0 or more; decides everything that is random, the draws of tokens included.
        batch: candidates of an ask.
        tokens_per_ask: how much data an ask evaluates on; None is all of it.
        total_tokens: how much data there is.
        stop: when to end; it also ends when `MOST_TRIES` random allocations in a row are known. Patience counts asks.
        clock: for `Stop.seconds`.
    Raises:
        InfeasibleBudget: no allocation is within the budgets.
        UsageError: settings that do not fit together, or a start outside the budgets.
    """

    def __init__(
        self,
        problem: Problem,
        start: Solution | ArrayLike | None = None,
        seed: int = 0,
        *,
        batch: int = 16,
        tokens_per_ask: int | None = None,
        total_tokens: int | None = None,
        stop: Stop = Stop(evaluations=1000),
        clock: Clock = time.monotonic,
    ) -> None:
        self._rounds = Rounds(
            problem,
            start,
            Course(seed, total_tokens, stop, clock, tokens_per_ask),
            settings={"search": "random", "batch": batch},
            batch=batch,
        )
        self._batch = batch
        self._known = {digest(self._rounds.plain, self._rounds.incumbent.choice)}
        self._next()

    def tell(self, losses: Sequence[float]) -> None:
        """Take the fitness of the candidates last asked for, in their order; NaN or inf for one that failed."""
        self._rounds.take(losses)
        if not self.done:
            self._next()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on in another process, as plain JSON; also between `ask` and `tell`."""
        return {**self._rounds.state_dict(), "known": sorted(self._known)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the search must have been made with the same arguments."""
        self._rounds.load_state_dict(state)
        self._known = set(state["known"])

    def _next(self) -> None:
        rounds = self._rounds
        rounds.begin()
        rng = rounds.rng(FIRST_STREAM)
        rounds.open(
            fresh(
                lambda: rounds.moves.filled(rounds.floor, rng),
                self._batch,
                self._known,
                lambda choice: digest(rounds.plain, choice),
            )
        )
