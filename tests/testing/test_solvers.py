"""The suites of solvers and searches find out one that breaks any of its promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.solvers import Ask, Choice, Problem, Random, Solution, Stop, branch, greedy
from layerwise.testing.promises import Promise
from layerwise.testing.searches import BOTH, Short, search_promises
from layerwise.testing.searches import EVERY as EVERY_SEARCH
from layerwise.testing.solvers import EVERY, EXACT, FORMS, Claims, solver_promises

counter = itertools.count()
CLAIMS = Claims(refuses={"reverse with interactions"}, exact=True)


def answer(problem: Problem, choice: Any) -> Solution:
    return problem.solution(problem.canonical(np.asarray(choice, dtype=np.int64)))


def near(problem: Problem) -> Solution:
    """Not optimal, and says that it is."""
    found = branch(problem)
    if problem.losses is None or not problem.separable:
        return found
    return replace(greedy(problem), lower_bound=found.lower_bound, status=found.status)


def near_with_interactions(problem: Problem) -> Solution:
    """Leaves interactions out of account, but for its answer's own."""
    found = branch(problem)
    if not problem.interactions:
        return found
    return replace(
        answer(problem, branch(replace(problem, interactions={})).choice),
        lower_bound=found.lower_bound,
        status=found.status,
    )


def changed(**changes: Any) -> Callable[[Problem], Solution]:
    return lambda problem: replace(branch(problem), **changes)


def over_budget(problem: Problem) -> Solution:
    branch(problem)
    return answer(problem, [int(np.flatnonzero(row)[-1]) for row in problem.available])


def wrong_shortage(problem: Problem) -> Solution:
    try:
        return branch(problem)
    except InfeasibleBudget as error:
        raise InfeasibleBudget(error.resource, error.budget, error.budget / 2) from error


def restless(problem: Problem) -> Solution:
    return replace(branch(problem), status=str(next(counter)))


def spends_little(problem: Problem) -> Solution:
    branch(problem)
    return answer(problem, problem.lowest(problem.costs[next(iter(problem.costs))]))


def needs_two(problem: Problem) -> Solution:
    if problem.shape == (1, 1):
        raise UsageError("one unit needs no solver")
    return branch(problem)


def without_losses(problem: Problem) -> Solution:
    if problem.losses is None:
        return answer(problem, [0] * problem.shape[0])
    return branch(problem)


def by_order(problem: Problem) -> Solution:
    """Looks at which unit comes first."""
    assert problem.losses is not None
    first, fifth = problem.losses[[0, 4], 0]
    return branch(problem) if first < fifth else spends_little(problem)


def moody(problem: Problem) -> Solution:
    """Better on even budgets."""
    return branch(problem) if int(sum(problem.budgets.values()) / 10) % 2 else spends_little(problem)


def clipped(problem: Problem) -> Solution:
    """Scales losses by the greatest, and rounds."""
    if problem.losses is None or not problem.losses.max() > 1e6:
        return branch(problem)
    rounded = np.round(problem.losses / 1e9, 6)
    return answer(problem, branch(replace(problem, losses=rounded)).choice)


def coarse(problem: Problem) -> Solution:
    """Exact on quarters, and wrong on other numbers."""
    if problem.losses is None:
        return branch(problem)
    finite = np.where(np.isfinite(problem.losses), problem.losses, 0)
    return branch(problem) if (finite * 4 == np.round(finite * 4)).all() else spends_little(problem)


SOLVERS: dict[str, tuple[Callable[[Problem], Solution], str]] = {
    "near": (near, "where the best trades first do not"),
    "near, within two budgets": (near, "within two budgets"),
    "near, with interactions": (near_with_interactions, "true loss and cost (interactions)"),
    "not optimal": (changed(status="feasible"), "agrees with enumeration and"),
    "says another loss": (changed(loss=1.5), "true loss and cost (one budget)"),
    "says another bound": (changed(lower_bound=1e9), "true loss and cost (nested deeply)"),
    "over budget": (over_budget, "true loss and cost (several budgets)"),
    "a wrong shortage": (wrong_shortage, "names the shortfall"),
    "restless": (restless, "same answer and stays"),
    "spends little": (spends_little, "dearest and best level"),
    "needs two": (needs_two, "one unit with one level"),
    "takes what it refuses": (lambda problem: answer(problem, [0] * problem.shape[0]), "does not take is refused"),
    "without losses": (without_losses, "without losses is refused"),
    "by order": (by_order, "order of the units"),
    "clipped": (clipped, "catastrophic level"),
    "coarse": (coarse, "real numbers of any size"),
    "moody": (moody, "tighter budget"),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_broken_promise_of_a_solver_is_found(name: str) -> None:
    solve, promise = SOLVERS[name]
    promises = [one for one in solver_promises(solve, CLAIMS) if promise in one.text]
    assert promises
    assert any(map(is_broken, promises))


def is_broken(promise: Promise) -> bool:
    try:
        promise()
    except AssertionError:
        return True
    return False


def test_every_promise_of_a_solver_is_broken_here() -> None:
    forms = [f"an answer keeps the limits and tells its true loss and cost ({form})" for form in FORMS]
    for text in [*EVERY, *EXACT]:
        assert any(promise in text for _, promise in SOLVERS.values()), text
    assert any(promise in text for text in forms for _, promise in SOLVERS.values())


# --- searches ---------------------------------------------------------------------------------------------------------


class Odd(Random):
    """An honest search until something is replaced."""

    edit: Callable[[Odd, Ask], Ask] = staticmethod(lambda search, ask: ask)

    def __init__(self, problem: Problem, start: Any = None, seed: int = 0, **settings: Any) -> None:
        super().__init__(problem, start, seed, **settings)
        self.problem, self.settings = problem, settings

    def ask(self) -> Ask:
        return type(self).edit(self, super().ask())


def editing(edit: Callable[[Odd, Ask], Ask]) -> type[Odd]:
    return type("Edited", (Odd,), {"edit": staticmethod(edit)})


def with_candidates(change: Callable[[Problem, Choice], Choice]) -> type[Odd]:
    return editing(
        lambda search, ask: replace(ask, candidates=tuple(change(search.problem, c) for c in ask.candidates))
    )


def untied(problem: Problem, choice: Choice) -> Choice:
    moved = choice.copy()
    moved[0] = 0
    return moved


def dearest(problem: Problem, choice: Choice) -> Choice:
    return np.full_like(choice, problem.shape[1] - 1)


def not_canonical(problem: Problem, choice: Choice) -> Choice:
    moved = choice.copy()
    moved[~problem.present(choice)] = 2
    return moved


class Best(Odd):
    def __init__(self, *arguments: Any, change: Callable[[Solution], Solution], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.change = change

    @property
    def best(self) -> Solution:
        return self.change(super().best)


def saying(change: Callable[[Solution], Solution]) -> Callable[..., Odd]:
    return lambda *arguments, **settings: Best(*arguments, change=change, **settings)


class Seedless(Odd):
    def __init__(self, problem: Problem, start: Any = None, seed: int = 0, **settings: Any) -> None:
        super().__init__(problem, start, min(seed, 0), **settings)


class Forgetful(Odd):
    """Goes on with what it knew."""

    def load_state_dict(self, state: Any) -> None:
        if not state:
            raise UsageError("nothing")
        super().load_state_dict({**state, "known": []})


class Trusting(Odd):
    """Takes any state."""

    def load_state_dict(self, state: Any) -> None:
        self._known = set(state.get("known", []))


class Nervous(Odd):
    """Asks for something else each time."""

    def ask(self) -> Ask:
        asked = super().ask()
        return replace(asked, draw=next(counter))


class Gullible(Odd):
    """Takes whatever it is told for losses."""

    def tell(self, losses: Any) -> None:
        given = [loss if isinstance(loss, float) else 0.5 for loss in losses] if isinstance(losses, Sequence) else []
        super().tell((given + [0.5] * 99)[: len(super().ask().candidates)])


class Optimist(Odd):
    """Takes a failure for the best there is."""

    def tell(self, losses: Any) -> None:
        super().tell([loss if isinstance(loss, float) and np.isfinite(loss) else -1.0 for loss in losses])


class Endless(Odd):
    """Answers after the end as before."""

    def ask(self) -> Ask:
        return Ask((), None, 0, 0, 0) if self.done else super().ask()


class Spendthrift(Odd):
    """Knows no limits of its own but these."""

    def __init__(self, problem: Problem, start: Any = None, seed: int = 0, **settings: Any) -> None:
        super().__init__(problem, start, seed, **{**settings, "stop": Stop(evaluations=300)})


class Careless(Odd):
    """Takes a start outside the budgets for none."""

    def __init__(self, problem: Problem, start: Any = None, seed: int = 0, **settings: Any) -> None:
        try:
            super().__init__(problem, start, seed, **settings)
        except UsageError:
            super().__init__(problem, None, abs(seed), **settings)


class Accountant(Odd):
    @property
    def evaluations(self) -> int:
        return super().evaluations + 1


SEARCHES: dict[str, tuple[Callable[..., Any], str]] = {
    "over budget": (with_candidates(dearest), "no candidate leaves the budgets"),
    "over budget when nested": (with_candidates(dearest), "however deep units are nested"),
    "not canonical": (with_candidates(not_canonical), "of allocations that differ in absent units"),
    "untied": (with_candidates(untied), "tied units agree"),
    "unfixed": (with_candidates(untied), "fixed units stay"),
    "unmeasured": (with_candidates(dearest), "a problem with one allocation"),
    "says another loss": (saying(lambda best: replace(best, loss=0.5)), "best of what was measured"),
    "worse than its start": (saying(lambda best: replace(best, loss=1e9)), "never ends above its start"),
    "a loss from nowhere": (saying(lambda best: replace(best, loss=best.loss or 0.0)), "when everything fails"),
    "one draw": (editing(lambda search, ask: replace(ask, draw=0)), "draws of their own"),
    "wrong books": (Accountant, "the books are right"),
    "optimist": (Optimist, "candidates that failed"),
    "seedless": (Seedless, "the seed decides"),
    "forgetful": (Forgetful, "never having stopped"),
    "trusting": (Trusting, "not continued by another"),
    "never finished": (Trusting, "can be loaded and is finished"),
    "nervous": (Nervous, "asking twice"),
    "nervous after an error": (Nervous, "nothing told is lost"),
    "gullible": (Gullible, "what is no loss"),
    "endless": (Endless, "going on after the end"),
    "careless": (Careless, "impossible budgets"),
    "spendthrift": (Spendthrift, "never exceeded"),
    "patient": (Spendthrift, "patience stops"),
    "timeless": (Spendthrift, "seconds are counted"),
    "boundless": (Spendthrift, "a small gap"),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_broken_promise_of_a_search_is_found(name: str) -> None:
    make, promise = SEARCHES[name]
    short = Short({"batch": 4, "tokens_per_ask": 64, "stop": Stop(evaluations=50)})
    promises = [one for one in search_promises(make, short) if promise in one.text]
    assert promises
    assert any(map(is_broken, promises))


def test_every_promise_of_a_search_is_broken_here() -> None:
    for text in [*EVERY_SEARCH, *BOTH]:
        assert any(promise in text for _, promise in SEARCHES.values()), text
