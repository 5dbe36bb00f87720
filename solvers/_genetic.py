"""A genetic algorithm with several objectives: NSGA-II.

A population of allocations; parents are drawn by binary tournaments and mixed unit by unit, levels mutate, children
that leave the budgets are repaired (`_repair.py`), and of parents and children together the better half lives on: front
after front of the non-dominated, and of the last front that still fits those that stand far from others. With the loss
as its only objective that is a plain genetic algorithm which keeps the best half.

With the loss alone, what a child leaves of the budgets is spent in random steps up. With costs among the objectives it
is not, because a cheaper allocation is then worth something of its own.

Where an ask sees a sample of the data, the parents are measured again beside their children, so that only losses of
the same tokens are compared; that doubles the evaluations.

Left out: constrained domination (nothing outside the budgets is ever measured).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerwise.errors import UsageError
from layerwise.solvers._archive import Archive
from layerwise.solvers._incumbent import Measured, as_choice, fresh
from layerwise.solvers._ledger import Clock, Course
from layerwise.solvers._repair import repaired
from layerwise.solvers._rounds import FIRST_STREAM, Batched, Rounds
from layerwise.solvers.pareto import crowding_distance, non_dominated_ranks
from layerwise.solvers.problem import LOSS, Choice, Problem, Solution
from layerwise.solvers.stopping import Stop

_CROSSOVER = 0.9
"""Share of children with two parents (Deb et al., section V). One unit of each child mutates on average."""


class Genetic(Batched):
    """NSGA-II: search for allocations that no other one beats in every objective.

    Args:
        problem: any number of budgets; losses are not needed and not used.
        start: an allocation or a solver's solution that joins the first population.
        seed: 0 or more; decides everything that is random, the draws of tokens included.
        objectives: "loss", and any resources of the problem.
        population: how many live on from generation to generation; as many are born.
        tokens_per_ask: how much data an ask evaluates on; None is all of it.
        total_tokens: how much data there is.
        stop: when to end. Patience counts generations without a lower loss.
        clock: for `Stop.seconds`.
    Raises:
        InfeasibleBudget: no allocation is within the budgets.
        UsageError: settings that do not fit together, or a start outside the budgets.
    Source: Deb, Pratap, Agarwal and Meyarivan, A fast and elitist multiobjective genetic algorithm: NSGA-II,
        IEEE Transactions on Evolutionary Computation 6 (2002).
    """

    def __init__(
        self,
        problem: Problem,
        start: Solution | ArrayLike | None = None,
        seed: int = 0,
        *,
        objectives: Sequence[str] = (LOSS,),
        population: int = 32,
        tokens_per_ask: int | None = None,
        total_tokens: int | None = None,
        stop: Stop = Stop(evaluations=2000),
        clock: Clock = time.monotonic,
    ) -> None:
        if population < 2:
            raise UsageError(f"population must be at least 2, found {population}")
        self._rounds = Rounds(
            problem,
            start,
            Course(seed, total_tokens, stop, clock, tokens_per_ask),
            settings={"search": "genetic", "objectives": list(objectives), "population": population},
            batch=population,
            more_finalists=population,
        )
        self._archive = Archive(self._rounds.plain, objectives)
        self._size, self._only_loss = population, tuple(objectives) == (LOSS,)
        self._population: list[Measured] = []
        self._next()

    @property
    def archive(self) -> list[Solution]:
        """Measured allocations that no other one beats in every objective, the least loss first.

        With all of the data in every ask, of all that were measured. Otherwise of the last population on its sample,
        and at the end of the finalists on all of the data.
        """
        return self._rounds.solutions(self._archive.front)

    def tell(self, losses: Sequence[float]) -> None:
        """Take the fitness of the candidates last asked for, in their order; NaN or inf for one that failed."""
        measured = self._rounds.take(losses)
        comparable = self._rounds.tokens is None
        self._archive.take(measured, comparable)
        if not self.done:
            self._population = self._selected([*self._population, *measured] if comparable else measured)
            self._next()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on in another process, as plain JSON; also between `ask` and `tell`."""
        return {
            **self._rounds.state_dict(),
            "population": [{"choice": choice.tolist(), "loss": loss} for choice, loss in self._population],
            "archive": self._archive.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the search must have been made with the same arguments."""
        self._rounds.load_state_dict(state)
        self._population = [(as_choice(entry["choice"]), entry["loss"]) for entry in state["population"]]
        self._archive.load_state_dict(state["archive"])

    def _next(self) -> None:
        rounds = self._rounds
        rounds.begin()
        rng = rounds.rng(FIRST_STREAM)
        parents = [choice for choice, _ in self._population]
        known = {rounds.key(choice) for choice in [*parents, rounds.incumbent.choice]}
        standing = _standing(self._archive.points(self._population))
        children = fresh(
            lambda: self._child(parents, standing, rng) if parents else self._any(rng),
            self._size - (not parents),  # the incumbent joins the first
            known,
            rounds.key,
        )
        beside = parents if children and rounds.tokens is not None else []
        rounds.open([*children, *beside], finalists=[choice for choice, _ in self._archive.front][: self._size])

    def _any(self, rng: np.random.Generator) -> Choice:
        """A random allocation: filled up for the loss alone, else from anywhere within the budgets."""
        rounds = self._rounds
        if self._only_loss:
            return rounds.moves.filled(rounds.floor, rng)
        return repaired(rounds.plain, _mutated(rounds.plain, rounds.floor, 1.0, rng), rounds.floor, rng)

    def _child(
        self, parents: Sequence[Choice], standing: Sequence[tuple[int, float]], rng: np.random.Generator
    ) -> Choice:
        first, second = (_tournament(standing, rng) for _ in range(2))
        child = parents[first].copy()
        if rng.random() < _CROSSOVER:
            child = np.where(rng.random(len(child)) < 0.5, child, parents[second])
        child = _mutated(self._rounds.plain, child, 1 / len(child), rng)
        child = repaired(self._rounds.plain, child, parents[first], rng)
        return self._rounds.moves.filled(child, rng) if self._only_loss else child

    def _selected(self, measured: Sequence[Measured]) -> list[Measured]:
        """Those that live on; of equals, the one that stands first. The old population, if all of them failed."""
        rounds = self._rounds
        of = {rounds.key(choice): (choice, loss) for choice, loss in reversed(measured) if not math.isnan(loss)}
        alive = list(of.values())[::-1]
        standing = _standing(self._archive.points(alive))
        order = sorted(range(len(alive)), key=standing.__getitem__)
        return [alive[index] for index in order[: self._size]] or self._population


def _tournament(standing: Sequence[tuple[int, float]], rng: np.random.Generator) -> int:
    """The better of two at random, the first of them if they are equal."""
    first, second = (int(index) for index in rng.integers(len(standing), size=2))
    return second if standing[second] < standing[first] else first


def _mutated(problem: Problem, choice: Choice, rate: float, rng: np.random.Generator) -> Choice:
    """With the probability `rate` for each unit, another of its levels."""
    mutant = choice.copy()
    for unit in np.flatnonzero(rng.random(len(choice)) < rate):
        others = np.flatnonzero(problem.available[unit])
        others = others[others != choice[unit]]
        if len(others):
            mutant[unit] = rng.choice(others)
    return mutant


def _standing(points: NDArray[np.float64]) -> list[tuple[int, float]]:
    """For each of (candidates, objectives): its front, counted from 0, and minus its crowding distance. Less is better.

    The crowding distance is that within the front.
    """
    fronts, crowding = non_dominated_ranks(points), np.zeros(len(points))
    for front in np.unique(fronts):
        inside = fronts == front
        crowding[inside] = crowding_distance(points[inside])
    return list(zip(fronts.tolist(), (-crowding).tolist(), strict=True))
