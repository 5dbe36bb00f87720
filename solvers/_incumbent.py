"""The best allocation of a search so far, and how it is compared with others: only ever on the same tokens.

Losses of different draws are never compared. A search that looked at samples therefore ends with a closing round on all
the data, between its start and its last incumbents: hence no search ends above its start on the data that it searched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from layerwise.errors import UsageError
from layerwise.solvers.problem import Choice, Problem, Solution

FINALISTS = 5
"""Allocations that a closing round compares: the start, the incumbent and those just before it. A guess."""

MOST_TRIES = 50
"""Random candidates in a row that may be unusable or known before a search goes on with those it has.

A guess.
"""

Name = TypeVar("Name", bytes, str)

Measured = tuple[Choice, float]
"""A candidate in plain units and its loss, NaN if it failed."""


class Incumbent:
    """The best allocation so far, and those that it displaced.

    Attributes:
        choice: in plain units.
        loss: the last one measured; None where nothing was measured yet, or that evaluation failed.
        complete: that loss is one on all of the data.
    """

    def __init__(self, problem: Problem, choice: Choice) -> None:
        self._problem = problem
        self.choice, self.loss, self.complete = choice, None, False
        self._former: list[Choice] = []  # the start first, then the most recent ones

    choice: Choice
    loss: float | None

    def adopt(self, choice: Choice, loss: float, complete: bool) -> None:
        """Take this one, without a comparison; NaN as its loss if it failed."""
        self.choice, self.loss = choice, None if math.isnan(loss) else loss
        self.complete = complete and self.loss is not None

    def defend(self, own: float, challengers: Sequence[Measured], complete: bool) -> bool:
        """Give way to the best challenger if it is better on the same tokens; a tie stays.

        Args:
            own: the incumbent's loss on these tokens, NaN if it failed.
            challengers: with their losses.
            complete: the tokens are all of the data.
        Returns:
            whether it gave way.
        """
        best = best_of(challengers)
        if best is None or best[1] >= own:  # never so if `own` is NaN
            self.adopt(self.choice, own, complete)
            return False
        self._former = [*self._former[:1], *[*self._former[1:], self.choice][-FINALISTS + 2 :]]
        self.adopt(*best, complete)
        return True

    def finalists(self) -> list[Choice]:
        """What a closing round compares, the start last. Of equals, the later incumbent stands first and wins."""
        return distinct(self._problem, [self.choice, *reversed(self._former)])

    @property
    def complete_loss(self) -> float | None:
        """Its loss on all of the data, None if not known."""
        return self.loss if self.complete else None

    def solution(self, problem: Problem) -> Solution:
        """In the units of the problem as it was given, with the measured loss."""
        return replace(problem.solution(problem.expand(self.choice)), loss=self.loss)

    def state_dict(self) -> dict[str, Any]:
        return {
            "choice": self.choice.tolist(),
            "loss": self.loss,
            "complete": self.complete,
            "former": [choice.tolist() for choice in self._former],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.choice, self.loss, self.complete = as_choice(state["choice"]), state["loss"], state["complete"]
        self._former = [as_choice(levels) for levels in state["former"]]


def best_of(measured: Sequence[Measured]) -> Measured | None:
    """The first of the lowest loss; None if all failed."""
    return min((pair for pair in measured if not math.isnan(pair[1])), key=lambda pair: pair[1], default=None)


def given_start(problem: Problem, start: Solution | ArrayLike | None) -> Choice | None:
    """A start in plain units, checked; None if there is none.

    Raises:
        UsageError: the problem is one in the reverse form, or the start is outside the budgets.
    """
    if problem.minimize != "loss":
        raise UsageError(
            f"a search minimises the measured loss, and this problem asks for the least {problem.minimize}"
        )
    problem.check_budgets()
    if start is None:
        return None
    folded = problem.fold(problem.canonical(start))
    plain = problem.plain()
    if not plain.feasible(folded):
        over = [
            f"{cost:.6g} {resource} of {problem.budgets[resource]:.6g}"
            for resource, cost in plain.cost(folded).items()
            if resource in plain.limits
        ]
        raise UsageError(f"the start has an unavailable level or is outside the budgets: {', '.join(over)}")
    return plain.with_cheapest_absent(folded)


def as_choice(levels: Sequence[int]) -> Choice:
    """An allocation from its JSON form."""
    return np.array(levels, dtype=np.int64)


def key(problem: Problem, choice: Choice) -> bytes:
    """Equal for allocations that are the same but for the levels of absent units."""
    return problem.canonical(choice).tobytes()


def digest(problem: Problem, choice: Choice) -> str:
    """The same in 16 hexadecimal digits, for long lists in a state."""
    return hashlib.blake2b(key(problem, choice), digest_size=8).hexdigest()


def fresh(make: Callable[[], Choice | None], n: int, known: set[Name], name: Callable[[Choice], Name]) -> list[Choice]:
    """Up to `n` random allocations that are not known yet; fewer where `MOST_TRIES` in a row bring none.

    Args:
        make: one at random, None if that did not work.
        known: names of those that are not wanted; the new ones are added.
        name: equal for equal allocations, such as `key` or `digest`.
    """
    found, tries = list[Choice](), 0
    while len(found) < n and tries < MOST_TRIES:
        tries += 1
        choice = make()
        if choice is not None and (called := name(choice)) not in known:
            known.add(called)
            found.append(choice)
            tries = 0
    return found


def distinct(problem: Problem, choices: Sequence[Choice]) -> list[Choice]:
    """Each allocation once, where it stands first."""
    return list({key(problem, choice): choice for choice in choices}.values())
