"""Simulated annealing: a walk that also takes steps for the worse, ever fewer of them as it cools.

From an allocation of loss E, a neighbour of loss E' is accepted if E' < E, and otherwise with probability
exp(-(E' - E) / T). The temperature starts at the spread of the losses around the start, so that a usual step for the
worse is accepted about every third time, and falls by a constant factor from ask to ask.

An ask holds several neighbours of the same allocation, and the best of them is the one proposed; with `batch=1` that is
the sequential algorithm. Larger batches cool in fewer, more expensive and greedier steps.

Left out: restarts, and other schedules than the geometric one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from layerwise.errors import UsageError
from layerwise.solvers._incumbent import Measured, as_choice, best_of, fresh
from layerwise.solvers._ledger import Clock, Course
from layerwise.solvers._rounds import FIRST_STREAM, Batched, Rounds
from layerwise.solvers.problem import Choice, Problem, Solution
from layerwise.solvers.stopping import Stop

_MUTATION, _ACCEPTANCE = FIRST_STREAM, FIRST_STREAM + 1


class Anneal(Batched):
    """Simulated annealing over the level switches of `Evolve`.

    Args:
        problem: any number of budgets; losses are not needed and not used.
        start: an allocation or a solver's solution to begin with; random steps up from the cheapest without one.
        seed: 0 or more; decides everything that is random, the draws of tokens included.
        batch: neighbours of an ask; the best of them is proposed. With a sample of the data the current allocation
            and the best so far are measured beside them.
        temperature: the first one, in units of the loss. Without one, the standard deviation of the losses of the
            first ask, the start among them.
        cooling: what the temperature is multiplied with after every ask; the default is a guess.
        max_switches: the most level switches between neighbours.
        tokens_per_ask: how much data an ask evaluates on; None is all of it.
        total_tokens: how much data there is.
        stop: when to end. Patience counts asks without a new best.
        clock: for `Stop.seconds`.
    Raises:
        InfeasibleBudget: no allocation is within the budgets.
        UsageError: settings that do not fit together, or a start outside the budgets.
    Source: Kirkpatrick, Gelatt and Vecchi, Optimization by simulated annealing, Science 220 (1983).
    """

    def __init__(
        self,
        problem: Problem,
        start: Solution | ArrayLike | None = None,
        seed: int = 0,
        *,
        batch: int = 4,
        temperature: float | None = None,
        cooling: float = 0.98,
        max_switches: int = 3,
        tokens_per_ask: int | None = None,
        total_tokens: int | None = None,
        stop: Stop = Stop(evaluations=1000),
        clock: Clock = time.monotonic,
    ) -> None:
        if temperature is not None and not 0 <= temperature < math.inf:
            raise UsageError(f"temperature must be a finite number of at least 0, found {temperature}")
        if not 0 < cooling <= 1:
            raise UsageError(f"cooling must be above 0 and at most 1, found {cooling}")
        if max_switches < 1:
            raise UsageError(f"max_switches must be at least 1, found {max_switches}")
        self._rounds = Rounds(
            problem,
            start,
            Course(seed, total_tokens, stop, clock, tokens_per_ask),
            settings={
                "search": "anneal",
                "batch": batch,
                "temperature": temperature,
                "cooling": cooling,
                "max_switches": max_switches,
            },
            batch=batch,
        )
        self._batch, self._temperature = batch, temperature
        self._cooling, self._max_switches = cooling, max_switches
        self._current: Choice = self._rounds.incumbent.choice
        self._neighbours = 0  # how many of the candidates asked for are; they stand first
        self._loss = math.nan  # of the current one, on the tokens of the last ask
        self._next()

    def tell(self, losses: Sequence[float]) -> None:
        """Take the fitness of the candidates last asked for, in their order; NaN or inf for one that failed."""
        measured = self._rounds.take(losses)
        if not self.done:
            self._step(measured)
            self._next()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on in another process, as plain JSON; also between `ask` and `tell`."""
        return {
            **self._rounds.state_dict(),
            "current": self._current.tolist(),
            "neighbours": self._neighbours,
            "loss": None if math.isnan(self._loss) else self._loss,
            "temperature": self._temperature,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the search must have been made with the same arguments."""
        self._rounds.load_state_dict(state)
        self._current, self._neighbours = as_choice(state["current"]), state["neighbours"]
        self._temperature = state["temperature"]
        self._loss = math.nan if state["loss"] is None else state["loss"]

    def _step(self, measured: Sequence[Measured]) -> None:
        """Accept or refuse the best neighbour, and cool down."""
        here = self._rounds.key(self._current)
        self._loss = next((loss for choice, loss in measured if self._rounds.key(choice) == here), self._loss)
        if self._temperature is None:
            finite = [loss for _, loss in measured if not math.isnan(loss)]
            self._temperature = float(np.std(finite)) if finite else None
        proposed = best_of(measured[: self._neighbours])
        if proposed is not None and self._accepts(proposed[1]):
            self._current, self._loss = proposed
        if self._temperature is not None:
            self._temperature *= self._cooling

    def _accepts(self, loss: float) -> bool:
        if math.isnan(self._loss) or loss < self._loss:
            return True
        worse = loss - self._loss
        if not self._temperature:
            return False
        return bool(self._rounds.rng(_ACCEPTANCE).random() < math.exp(-worse / self._temperature))

    def _next(self) -> None:
        rounds = self._rounds
        rounds.begin()
        rng = rounds.rng(_MUTATION)
        neighbours = fresh(
            lambda: rounds.moves.mutated(self._current, rng, self._max_switches),
            self._batch,
            {rounds.key(self._current)},
            rounds.key,
        )
        self._neighbours = len(neighbours)
        beside = [self._current] if neighbours and rounds.tokens is not None else []
        rounds.open([*neighbours, *beside])
