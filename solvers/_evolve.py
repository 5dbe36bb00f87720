"""Evolutionary search over whole allocations: EvoPress.

One parent, many offspring. Every generation mutates the parent by level switches that keep the budgets (`_moves.py`),
ranks the offspring on a few tokens, keeps the best, ranks those on more, and so on; in the last round the parent takes
part, and only a better one replaces it. Losses of the problem are not used: what counts is the measured fitness,
because a sum of layer errors is not a safe objective for language models.

Against the published program: units may differ in size and budgets may be several (see `_moves.py`); the two units of a
switch are different ones, where EvoPress lets a switch undo itself; a tie keeps the parent; what was measured on all of
the data is not born again, so that a parent without better neighbours nearby is given remoter ones; losses of different
draws are never compared, so a search whose last round sees a sample only ends with one more round on all the data,
between its start and its last parents (`_incumbent.py`).

Every generation has a random generator of its own, made from the seed and its number. A search that was stopped, saved,
loaded and continued therefore takes the same course as one that never stopped.

Left out: several parents, and crossover; EvoPress found one parent enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.solvers._ilp import any_feasible
from layerwise.solvers._incumbent import (
    FINALISTS,
    Incumbent,
    Measured,
    as_choice,
    best_of,
    digest,
    distinct,
    fresh,
    given_start,
)
from layerwise.solvers._ledger import Clock, Course, check_identity, identity, told
from layerwise.solvers._moves import Moves
from layerwise.solvers._uniform import uniform
from layerwise.solvers.presets import find_preset
from layerwise.solvers.problem import Choice, Problem, Solution
from layerwise.solvers.search import Ask
from layerwise.solvers.stopping import Stop

_MUTATION, _DRAW = 0, 1  # the two random streams of a generation


@dataclass(frozen=True)
class _Settings:
    generations: int
    offspring: int
    survivors: tuple[int, ...]
    tokens: tuple[int | None, ...]
    max_switches: int
    initially_generated: int
    initial_tokens: int | None

    def __post_init__(self) -> None:
        if not self.survivors or len(self.survivors) != len(self.tokens):
            raise UsageError(f"survivors {self.survivors} and tokens {self.tokens} must name the same rounds")
        if self.survivors[-1] != 1:
            raise UsageError(f"the last round must leave one survivor, found {self.survivors[-1]}")
        least = {"generations": 0, "offspring": 1, "max_switches": 1, "initially_generated": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UsageError(f"{name} must be at least {bound}, found {getattr(self, name)}")
        if min(self.survivors) < 1:
            raise UsageError(f"every round must leave at least one survivor, found {self.survivors}")

    @property
    def closes(self) -> bool:
        """True if even the last round sees only a part of the data, so that a closing round is needed."""
        return self.tokens[-1] is not None

    def rounds_to_come(self) -> list[tuple[int, int | None]]:
        """The rounds of one full generation and the closing round, as (candidates, tokens of each)."""
        sizes = [self.offspring, *self.survivors[:-1]]
        sizes[-1] += 1  # the parent
        return [*zip(sizes, self.tokens, strict=True), *([(FINALISTS, None)] if self.closes else [])]


class Evolve:
    """EvoPress: search for the allocation with the least measured loss within the budgets.

        search = Evolve(problem, seed=0)
        while not search.done:
            search.tell(evaluate(search.ask()))
        search.best

    Args:
        problem: any number of budgets; losses are not needed and not used.
        start: an allocation or a solver's solution to begin with, within the budgets. Without one, the uniform level,
            if nothing more fits in the budgets; otherwise `initially_generated` allocations that go up from it at
            random until the budgets are used, the best of which on `initial_tokens` is the start.
        seed: 0 or more; decides everything that is random, the draws of tokens included.
        preset: a name in `PRESETS`, for all that is not given here; "evopress-quantization" without.
        generations: how many at most.
        offspring: mutants per generation. There are fewer where the parent has fewer neighbours.
        survivors: how many each selection round keeps; the last keeps 1.
        tokens: how much data each round evaluates on; None is all of it.
        max_switches: the most level switches between parent and offspring.
        initially_generated: see `start`.
        initial_tokens: see `start`; by default as in the first round.
        total_tokens: how much data there is. Rounds that ask for as much or more become "all of it".
        stop: when to end before the last generation. Patience counts generations without a better parent.
        clock: for `Stop.seconds`.
    Raises:
        InfeasibleBudget: no allocation is within the budgets.
        UsageError: settings that do not fit together, or a start outside the budgets.
    Source: Sieberling et al., EvoPress, arXiv:2410.14649, algorithm 1.
    """

    def __init__(
        self,
        problem: Problem,
        start: Solution | ArrayLike | None = None,
        seed: int = 0,
        preset: str | None = None,
        *,
        generations: int | None = None,
        offspring: int | None = None,
        survivors: Sequence[int] | None = None,
        tokens: Sequence[int | None] | None = None,
        max_switches: int | None = None,
        initially_generated: int | None = None,
        initial_tokens: int | None = None,
        total_tokens: int | None = None,
        stop: Stop = Stop(),
        clock: Clock = time.monotonic,
    ) -> None:
        base = find_preset(preset or "evopress-quantization")
        generations = base.generations if generations is None else generations
        if generations is None:
            raise UsageError(f"preset {preset} leaves generations to you", hint="see depth_generations")

        given = given_start(problem, start)
        rounds = base.tokens if tokens is None else tuple(tokens)
        self._course = Course(seed, total_tokens, stop, clock)
        self._ledger = ledger = self._course.ledger()
        self._settings = _Settings(
            generations=generations,
            offspring=base.offspring if offspring is None else offspring,
            survivors=base.survivors if survivors is None else tuple(survivors),
            tokens=tuple(ledger.amount(wanted) for wanted in rounds),
            max_switches=base.max_switches if max_switches is None else max_switches,
            initially_generated=base.initially_generated if initially_generated is None else initially_generated,
            initial_tokens=ledger.amount((rounds or (None,))[0] if initial_tokens is None else initial_tokens),
        )
        self._problem, self._plain = problem, problem.plain()
        self._moves = Moves(self._plain)
        shared = {"total_tokens": total_tokens, "stop": asdict(stop)}
        everything = {"search": "evolve", "seed": seed, **asdict(self._settings), **shared}
        self._identity = identity(self._plain, given, everything)
        self._phase: Literal["start", "select", "close", "done"] = "start"
        self._generation = self._round = 0
        self._parent = Incumbent(self._plain, self._floor() if given is None else given)
        self._pool: list[Choice] = []
        self._settled: set[str] = set()  # what was measured on all of the data, as digests
        if given is None and self._moves.can_rise(self._parent.choice):
            self._pool = self._random_fills()
        if not self._pool:
            self._next_generation()

    @property
    def done(self) -> bool:
        """True when there is nothing left to ask."""
        return self._phase == "done"

    @property
    def generations(self) -> int:
        """How many generations it takes at most."""
        return self._settings.generations

    @property
    def evaluations(self) -> int:
        """How many candidates were evaluated so far, one in several rounds counted several times."""
        return self._ledger.evaluations

    @property
    def evaluated_tokens(self) -> int | None:
        """How many tokens these evaluations took; None once all data was used and `total_tokens` is not known."""
        return self._ledger.tokens

    @property
    def best(self) -> Solution:
        """The parent. Its loss is the last one measured: at the end on all the data, before that on the last draw.

        None where nothing was measured yet, or every evaluation failed.
        """
        return self._parent.solution(self._problem)

    def ask(self) -> Ask:
        """The candidates to evaluate next; the same answer until `tell` is called."""
        if self.done:
            raise UsageError("the search is done; there is nothing left to evaluate")
        draws = self._rng(_DRAW).integers(2**32, size=len(self._settings.tokens) + 1)
        return Ask(
            candidates=tuple(self._problem.canonical(self._problem.expand(own)) for own in self._candidates()),
            tokens=self._tokens(),
            draw=int(draws[self._round]),
            generation=self._generation,
            round=self._round,
        )

    def tell(self, losses: Sequence[float]) -> None:
        """Take the fitness of the candidates last asked for, in their order.

        Lower is better. NaN or inf says that a candidate failed: it ranks last and never becomes the parent.
        """
        if self.done:
            raise UsageError("the search is done; there is nothing left to tell")
        candidates, tokens = self._candidates(), self._tokens()
        values = told(losses, len(candidates))
        self._ledger.enter(len(values), tokens)
        measured = list(zip(candidates, values, strict=True))
        if tokens is None:
            self._settled.update(digest(self._plain, candidate) for candidate in candidates)
        if self._phase == "select":
            self._select(measured)
            return
        self._parent.adopt(*(best_of(measured) or (candidates[0], math.nan)), complete=tokens is None)
        if self._phase == "start":
            self._next_generation()
        else:
            self._phase, self._pool = "done", []

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on in another process, as plain JSON; also between `ask` and `tell`."""
        return {
            "version": 1,
            "identity": self._identity,
            "phase": self._phase,
            "generation": self._generation,
            "round": self._round,
            "parent": self._parent.state_dict(),
            "ledger": self._ledger.state_dict(),
            "settled": sorted(self._settled),
            "pool": [candidate.tolist() for candidate in self._pool],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            UsageError: the state belongs to a search with another problem, start or settings.
        """
        check_identity(state, self._identity)
        self._phase, self._generation, self._round = state["phase"], state["generation"], state["round"]
        self._parent.load_state_dict(state["parent"])
        self._ledger.load_state_dict(state["ledger"])
        self._settled = set(state["settled"])
        self._pool = [as_choice(levels) for levels in state["pool"]]

    def _candidates(self) -> list[Choice]:
        """What is being asked for, in plain units: the pool, with the parent last in the last round."""
        return [*self._pool, self._parent.choice] if self._phase == "select" and self._in_last_round() else self._pool

    def _in_last_round(self) -> bool:
        return self._round == len(self._settings.tokens) - 1

    def _tokens(self) -> int | None:
        if self._phase == "start":
            return self._settings.initial_tokens
        return self._settings.tokens[self._round] if self._phase == "select" else None

    def _select(self, measured: list[Measured]) -> None:
        """Keep the best for the next round or, after the last one, as parent."""
        if self._in_last_round():
            *offspring, (_, own) = measured
            better = self._parent.defend(own, offspring, complete=self._tokens() is None)
            self._ledger.stale = 0 if better else self._ledger.stale + 1
            self._next_generation()
            return
        ranked = sorted((pair for pair in measured if not math.isnan(pair[1])), key=lambda pair: pair[1])
        self._pool = [choice for choice, _ in ranked[: self._settings.survivors[self._round]]]
        self._round += 1
        if not self._pool:
            self._ledger.stale += 1
            self._next_generation()

    def _next_generation(self) -> None:
        """Begin the next generation that has offspring; without one, close the search."""
        self._phase, self._round = "select", 0
        while not self._exhausted():
            self._generation += 1
            self._pool = self._offspring()
            if self._pool:
                return
            self._ledger.stale += 1
        self._close()

    def _exhausted(self) -> bool:
        if self._generation >= self._settings.generations or self._ledger.over(self._parent.complete_loss):
            return True
        return not self._ledger.affords(self._settings.rounds_to_come())

    def _close(self) -> None:
        """Compare the start with the last parents on all the data, unless every last round has done so."""
        if self._parent.complete:
            self._phase, self._pool = "done", []
            return
        self._phase, self._round = "close", len(self._settings.tokens)
        self._pool = self._parent.finalists()

    def _floor(self) -> Choice:
        """What random fills go up from: the uniform level or, where no common level fits, a mixture that does."""
        try:
            return self._plain.with_cheapest_absent(self._problem.fold(uniform(self._problem).choice))
        except InfeasibleBudget:
            return self._problem.fold(any_feasible(self._problem))

    def _random_fills(self) -> list[Choice]:
        rng, wanted = self._rng(_MUTATION), self._settings.initially_generated
        return distinct(self._plain, [self._moves.filled(self._parent.choice, rng) for _ in range(wanted)])

    def _offspring(self) -> list[Choice]:
        """Mutants of the parent, none like it, like another, or like one that was measured on all of the data."""
        rng, parent = self._rng(_MUTATION), self._parent.choice
        return fresh(
            lambda: self._moves.mutated(parent, rng, self._settings.max_switches),
            self._settings.offspring,
            {digest(self._plain, parent), *self._settled},
            lambda mutant: digest(self._plain, mutant),
        )

    def _rng(self, purpose: int) -> np.random.Generator:
        return self._course.rng(self._generation, purpose)
