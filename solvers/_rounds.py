"""The course of a search that asks for one batch at a time: rounds on common tokens, then a closing round if needed.

Every round shares its tokens and its draw. Where a round sees all of the data, the incumbent keeps its loss; where it
sees a sample, the incumbent is measured again beside the batch, because losses of different draws cannot be compared,
and a closing round on all of the data has the last word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from numpy.typing import ArrayLike

from layerwise.errors import UsageError
from layerwise.solvers._ilp import any_feasible
from layerwise.solvers._incumbent import (
    FINALISTS,
    Incumbent,
    Measured,
    as_choice,
    best_of,
    distinct,
    given_start,
    key,
)
from layerwise.solvers._ledger import Course, check_identity, identity, told
from layerwise.solvers._moves import Moves
from layerwise.solvers.problem import Choice, Problem, Solution
from layerwise.solvers.search import Ask

_DRAW, _START = 0, 1  # random streams of a round; those of the searches count from 2

FIRST_STREAM = 2


class Rounds:
    """What searches of this kind have in common: incumbent, books, stop rules, the asking and the closing round.

    Attributes:
        plain: the problem in plain units, in which everything but `ask` and `best` speaks.
        moves: its random moves.
        floor: the allocation near the cheapest that random fills go up from.
        incumbent: the best so far; at first the start or, without one, a random fill.
        number: the round that is asked for, from 0.
        tokens: how much data a round sees, None for all.

    Args:
        problem, start: those of the search.
        course: its seed, data and stop rules.
        settings: its name and all other arguments, as plain JSON.
        batch: how many candidates it means to ask for at a time.
        more_finalists: how many it may add to those that the closing round compares.
    """

    def __init__(
        self,
        problem: Problem,
        start: Solution | ArrayLike | None,
        course: Course,
        *,
        settings: Mapping[str, Any],
        batch: int,
        more_finalists: int = 0,
    ) -> None:
        if batch < 1:
            raise UsageError(f"a search needs at least 1 candidate at a time, found {batch}")
        given = given_start(problem, start)
        self.plain = problem.plain()
        self.moves = Moves(self.plain)
        self.floor = problem.fold(any_feasible(problem))
        self.ledger = course.ledger()
        self.tokens = self.ledger.amount(course.tokens_per_ask)
        self._problem, self._course, self._batch = problem, course, batch
        shared = {"tokens": self.tokens, "total": course.total_tokens, "stop": asdict(course.stop)}
        self._identity = identity(self.plain, given, {**settings, "seed": course.seed, **shared})
        self.number = -1
        first = self.moves.filled(self.floor, self.rng(_START)) if given is None else given
        self.incumbent = Incumbent(self.plain, first)
        self._phase: Literal["search", "close", "done"] = "search"
        self._asked: list[Choice] = []
        self._closing = FINALISTS + more_finalists

    @property
    def done(self) -> bool:
        return self._phase == "done"

    @property
    def best(self) -> Solution:
        return self.incumbent.solution(self._problem)

    @property
    def limit(self) -> int | None:
        """How many full rounds the evaluations allow for, None if they are not limited."""
        evaluations = self._course.stop.evaluations
        return None if evaluations is None else max(1, evaluations // self._batch)

    def rng(self, purpose: int) -> Any:
        """The random generator of this round for one purpose."""
        return self._course.rng(self.number + 1, purpose)

    def key(self, choice: Choice) -> bytes:
        return key(self.plain, choice)

    def solutions(self, measured: Sequence[Measured]) -> list[Solution]:
        """Measured candidates in the units of the problem as it was given."""
        return [replace(self._problem.solution(self._problem.expand(choice)), loss=loss) for choice, loss in measured]

    def begin(self) -> None:
        """Count the next round, so that its random generators are its own."""
        self.number += 1

    def open(self, batch: Sequence[Choice], finalists: Sequence[Choice] = ()) -> None:
        """Ask for these, or close the search if there are none or a stop rule says so.

        Args:
            batch: candidates within the budgets.
            finalists: what the closing round compares besides the start and the last incumbents.
        """
        asked = distinct(self.plain, [*batch, *([self.incumbent.choice] if self._measures_incumbent else [])])
        closing = [(self._closing, None)] if self.tokens is not None else []
        spent = not self.ledger.affords([(len(asked), self.tokens), *closing])
        if self.number and (not batch or spent or self.ledger.over(self.incumbent.complete_loss)):
            self._close(finalists)
        else:
            self._asked = asked

    def ask(self) -> Ask:
        if self.done:
            raise UsageError("the search is done; there is nothing left to evaluate")
        closing = self._phase == "close"
        return Ask(
            candidates=tuple(self._problem.canonical(self._problem.expand(candidate)) for candidate in self._asked),
            tokens=None if closing else self.tokens,
            draw=int(self.rng(_DRAW).integers(2**32, size=2)[int(closing)]),
            generation=self.number,
            round=int(closing),
        )

    def take(self, losses: Sequence[float]) -> list[Measured]:
        """The candidates with their losses, after the books and the incumbent have been brought up to date."""
        if self.done:
            raise UsageError("the search is done; there is nothing left to tell")
        values = told(losses, len(self._asked))
        tokens = self.tokens if self._phase == "search" else None
        self.ledger.enter(len(values), tokens)
        measured = list(zip(self._asked, values, strict=True))
        if self._phase == "close":
            self.incumbent.adopt(*(best_of(measured) or (self.incumbent.choice, math.nan)), complete=True)
            self._phase, self._asked = "done", []
            return measured
        better = self.incumbent.defend(self._own(measured), measured, complete=tokens is None)
        self.ledger.stale = 0 if better else self.ledger.stale + 1
        return measured

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "identity": self._identity,
            "phase": self._phase,
            "number": self.number,
            "asked": [choice.tolist() for choice in self._asked],
            "incumbent": self.incumbent.state_dict(),
            "ledger": self.ledger.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_identity(state, self._identity)
        self._phase, self.number = state["phase"], state["number"]
        self._asked = [as_choice(levels) for levels in state["asked"]]
        self.incumbent.load_state_dict(state["incumbent"])
        self.ledger.load_state_dict(state["ledger"])

    @property
    def _measures_incumbent(self) -> bool:
        return self.number == 0 or self.tokens is not None

    def _own(self, measured: Sequence[Measured]) -> float:
        """The incumbent's loss on the tokens of this round, NaN if it failed."""
        if self._measures_incumbent:
            own = self.key(self.incumbent.choice)
            return next(loss for choice, loss in measured if self.key(choice) == own)
        return math.nan if self.incumbent.loss is None else self.incumbent.loss

    def _close(self, finalists: Sequence[Choice]) -> None:
        if self.tokens is None:
            self._phase, self._asked = "done", []
            return
        self.number -= 1  # the round that was begun is not asked for
        self._phase = "close"
        self._asked = distinct(self.plain, [*self.incumbent.finalists(), *finalists])


class Batched:
    """The part of a search that is the same for all that keep their course in `Rounds`."""

    _rounds: Rounds

    @property
    def done(self) -> bool:
        """True when there is nothing left to ask."""
        return self._rounds.done

    @property
    def best(self) -> Solution:
        """The best allocation so far. Its loss is the last one measured: at the end on all of the data.

        None where nothing was measured yet, or that evaluation failed.
        """
        return self._rounds.best

    @property
    def generations(self) -> int | None:
        """How many full asks its evaluations allow for, None if they are not limited."""
        return self._rounds.limit

    @property
    def evaluations(self) -> int:
        """How many candidates were evaluated so far, one in several rounds counted several times."""
        return self._rounds.ledger.evaluations

    @property
    def evaluated_tokens(self) -> int | None:
        """How many tokens these evaluations took; None once all data was used and `total_tokens` is not known."""
        return self._rounds.ledger.tokens

    def ask(self) -> Ask:
        """The candidates to evaluate next; the same answer until `tell` is called."""
        return self._rounds.ask()
