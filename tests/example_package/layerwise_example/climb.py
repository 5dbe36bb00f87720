"""`climb`: stochastic hill climbing; an ask holds random neighbours of the best allocation so far.

The best of them becomes the next one if it is better. It is annealing at temperature zero; what it lacks is a way out
of a local optimum, which larger steps (`max_switches`) make up for in part.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import ArrayLike

from layerwise.errors import UsageError
from layerwise.solvers import Problem, Solution, Stop
from layerwise.solvers.parts import FIRST_STREAM, Batched, Clock, Course, Rounds, fresh


class Climb(Batched):
    """Hill climbing over the level switches of `Evolve`.

    Args:
        problem: any number of budgets; losses are not needed and not used.
        start: an allocation or a solver's solution to begin with; random steps up from the cheapest without one.
        seed: 0 or more; decides everything that is random.
        batch: neighbours of an ask.
        max_switches: the most level switches between neighbours.
        tokens_per_ask: how much data an ask evaluates on; None is all of it.
        total_tokens: how much data there is.
        stop: when to end. Patience counts asks without a new best.
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
        batch: int = 8,
        max_switches: int = 4,
        tokens_per_ask: int | None = None,
        total_tokens: int | None = None,
        stop: Stop = Stop(evaluations=1000),  # noqa: B008 (frozen)
        clock: Clock = time.monotonic,
    ) -> None:
        if max_switches < 1:
            raise UsageError(f"max_switches must be at least 1, found {max_switches}")
        self._rounds = Rounds(
            problem,
            start,
            Course(seed, total_tokens, stop, clock, tokens_per_ask),
            settings={"search": "climb", "batch": batch, "max_switches": max_switches},
            batch=batch,
        )
        self._batch, self._max_switches = batch, max_switches
        self._next()

    def tell(self, losses: Sequence[float]) -> None:
        """Take the fitness of the candidates last asked for, in their order; NaN or inf for one that failed."""
        self._rounds.take(losses)
        if not self.done:
            self._next()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on in another process, as plain JSON; also between `ask` and `tell`."""
        return self._rounds.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the search must have been made with the same arguments."""
        self._rounds.load_state_dict(state)

    def _next(self) -> None:
        rounds = self._rounds
        rounds.begin()
        rng, best = rounds.rng(FIRST_STREAM), rounds.incumbent.choice
        known = {rounds.key(best)}
        rounds.open(fresh(lambda: rounds.moves.mutated(best, rng, self._max_switches), self._batch, known, rounds.key))
