"""What every search promises; see `layerwise.solvers.Search`.

A search is made as `make(problem, start, seed, total_tokens=..., stop=..., clock=...)`. Models are stood in for by
additive losses, which samples of the data see with noise of their own.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.solvers import Ask, Choice, Problem, Search, Stop, greedy
from layerwise.stages.allocate.methods import find_search
from layerwise.testing import oracles
from layerwise.testing.problems import nested_blocks, two_budgets, unequal_layers
from layerwise.testing.promises import Promise, answer_of_fresh_interpreter, close, demand, keep_all, refusal
from layerwise.testing.solvers import drawn

Evaluate = Callable[[Problem, Any, "Ask | None"], float]
"""Measures an allocation, on the tokens of an ask; on all of them without."""

MOST_AT_A_TIME = 24
"""No search of the suite may ask for more candidates at a time, or limits would say nothing."""


@dataclass(frozen=True)
class Short:
    """How a search is made short enough for the suite, some fifty evaluations.

    Args:
        settings: arguments for a short search on samples of the data.
        on_all_data: what changes in them so that every ask sees all of the data.
        few: what changes in them for some sixteen evaluations.
        remembers: no model is measured twice on all of the data.
    """

    settings: Mapping[str, Any] = field(default_factory=lambda: {"stop": Stop(evaluations=50), "tokens_per_ask": 64})
    on_all_data: Mapping[str, Any] = field(default_factory=lambda: {"tokens_per_ask": None})
    few: Mapping[str, Any] = field(default_factory=lambda: {"stop": Stop(evaluations=16)})
    remembers: bool = False


def check_search(search: str | Callable[..., Search], short: Short = Short()) -> None:
    """Check every promise of a search; needs hypothesis.

    Args:
        search: its name, or what makes it.
        short: how it is made short.
    Raises:
        AssertionError: a promise is broken; says which.
    """
    keep_all(search_promises(search, short))


def search_promises(search: str | Callable[..., Search], short: Short = Short()) -> list[Promise]:
    """The promises of `check_search`, one by one."""
    case = _Case(find_search(search) if isinstance(search, str) else search, short)
    of = f"search {search if isinstance(search, str) else search.__name__}"
    kept: dict[str, Callable[[], None]] = {text: partial(check, case) for text, check in EVERY.items()}
    for text, check in BOTH.items():
        kept[f"{text}, on samples of the data"] = partial(check, case, False)
        kept[f"{text}, on all of the data"] = partial(check, case, True)
    if short.remembers:
        kept["no model is measured twice on all of the data"] = partial(_remembers, case)
    if isinstance(search, str):
        kept["its name is found without loading torch or Ray"] = partial(_nothing_heavy, search)
    return [Promise(of, text, check) for text, check in kept.items()]


# --- running one ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """A search and how it is made short."""

    make: Callable[..., Search]
    short: Short

    def __call__(
        self, problem: Problem, start: Any = None, seed: int = 0, *, whole: bool = False, **more: Any
    ) -> Search:
        settings = {**self.short.settings, **(self.short.on_all_data if whole else {}), **more}
        return self.make(problem, start, seed, **settings)


def measured(problem: Problem, choice: Any, ask: Ask | None = None) -> float:
    """A stand-in for a model: additive losses, which samples of the data see with noise of their own."""
    loss = problem.loss(choice)
    assert loss is not None
    if ask is None or ask.tokens is None:
        return loss
    noise = np.random.default_rng([ask.draw, *choice]).normal()
    return float(loss * (1 + noise / math.sqrt(ask.tokens)))


def failing_at_times(problem: Problem, choice: Any, ask: Ask | None) -> float:
    """The same, but for every fourth candidate or so, which fails."""
    assert ask is not None
    failures = [math.nan, math.inf, -math.inf]
    return failures[ask.draw % 3] if (ask.draw + int(choice.sum())) % 4 == 0 else measured(problem, choice, ask)


def step(search: Search, problem: Problem, evaluate: Evaluate) -> Ask:
    """Answer one ask."""
    ask = search.ask()
    demand(0 < len(ask.candidates) <= MOST_AT_A_TIME, f"it asks for {len(ask.candidates)} candidates at a time")
    search.tell([evaluate(problem, choice, ask) for choice in ask.candidates])
    return ask


def run(search: Search, problem: Problem, evaluate: Evaluate = measured) -> list[Ask]:
    """Bring a search to its end; gives all that it asked for."""
    asked = []
    while not search.done:
        asked.append(step(search, problem, evaluate))
    return asked


def course(asked: Sequence[Ask]) -> list[Any]:
    """What was asked for, to be compared."""
    return [(a.generation, a.round, a.tokens, a.draw, [choice.tolist() for choice in a.candidates]) for a in asked]


def through_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state as a file gives it back."""
    read: dict[str, Any] = json.loads(json.dumps(state, allow_nan=False))
    return read


def _all(asked: Sequence[Ask]) -> list[Choice]:
    return [choice for ask in asked for choice in ask.candidates]


# --- what is asked for ------------------------------------------------------------------------------------------------


def _within(case: _Case, whole: bool) -> None:
    for problem in (unequal_layers(), two_budgets()):
        search = case(problem, whole=whole)
        asked = []
        while not search.done:
            asked.append(step(search, problem, measured))
            demand(problem.feasible(search.best.choice), f"the best is {search.best.choice.tolist()}")
        for ask in asked:
            for choice in ask.candidates:
                demand(problem.feasible(choice), f"it asks for {choice.tolist()}")
            demand(len({choice.tobytes() for choice in ask.candidates}) == len(ask.candidates), "one is asked twice")
        moved = len({choice.tobytes() for choice in _all(asked)})
        demand(moved > 10, f"it asks for {moved} different candidates all in all")


def _absent(case: _Case, whole: bool) -> None:
    problem = nested_blocks()
    start = problem.expand(np.array([1, 0, 2, 2, 2, 2, *[0, 1, 2, 2, 2, 2] * 2]))
    search = case(problem, start, whole=whole)
    expected = [1, 0, 0, 0, 0, 0, *[0, 1, 2, 0, 2, 0] * 2]
    demand(search.best.choice.tolist() == expected, f"its start is {search.best.choice.tolist()}, not {expected}")
    asked = run(search, problem)
    for ask in asked:
        models = {tuple(problem.named(choice).items()) for choice in ask.candidates}
        demand(len(models) == len(ask.candidates), "it asks twice for one model")
    for choice in [search.best.choice, *_all(asked)]:
        demand(problem.canonical(choice).tolist() == choice.tolist(), f"{choice.tolist()} is not in canonical form")
    present = np.array([problem.present(choice) for choice in _all(asked)])
    moved = int((present.any(axis=0) & ~present.all(axis=0)).sum())
    demand(moved > 6, f"only {moved} units go and come back")


def _deep(case: _Case) -> None:
    for n_budgets in (1, 2):
        drawn(partial(_nested, case), 6, max_units=6, max_levels=3, nested=3, n_budgets=n_budgets)


def _nested(case: _Case, problem: Problem) -> None:
    optimum = oracles.brute_force(problem)
    if optimum is None:
        refusal(InfeasibleBudget, "a problem without an answer", partial(case, problem))
        return
    search = case(problem, whole=True, **case.short.few)
    losses = []
    while not search.done:
        true = [oracles.sums(problem, choice.tolist()) for choice in search.ask().candidates]
        for entry, (resource, limit) in itertools.product(true, problem.limits.items()):
            demand(entry[resource] <= limit, f"a candidate has {entry[resource]} {resource}, above {limit}")
        losses += [entry["loss"] for entry in true]
        search.tell([entry["loss"] for entry in true])
    best = search.best
    demand(best.loss == min(losses), f"the best is said to have {best.loss}; the least measured is {min(losses)}")
    demand(min(losses) >= optimum - 1e-9, f"a loss of {min(losses)} is below the optimum {optimum}")
    true_loss = oracles.sums(problem, best.choice.tolist())["loss"]
    demand(close(true_loss, best.loss), f"the best is said to have {best.loss}, and has {true_loss}")


def _remembers(case: _Case) -> None:
    problem = nested_blocks()
    models = [choice.tobytes() for choice in _all(run(case(problem, whole=True), problem))]
    demand(len(set(models)) == len(models), f"of {len(models)} candidates only {len(set(models))} are different")


def _tied(case: _Case) -> None:
    problem = unequal_layers()
    for choice in _all(run(case(problem), problem)):
        demand(choice[0] == choice[1], f"tied units differ in {choice.tolist()}")


def _fixed(case: _Case) -> None:
    problem = replace(unequal_layers(), fixed={4: 0, 0: 2, 1: 2})
    for choice in _all(run(case(problem), problem)):
        demand(choice[[0, 1, 4]].tolist() == [2, 2, 0], f"fixed units are not where they belong in {choice.tolist()}")


def _one_allocation(case: _Case) -> None:
    costs = np.array([[1.0, 2.0], [1.0, 2.0]])
    problem = Problem(costs={"bits": costs}, budgets={"bits": 2.0}, losses=np.array([[1.0, 0.5]] * 2))
    search = case(problem, whole=True)
    asked = run(search, problem)
    demand({tuple(choice.tolist()) for choice in _all(asked)} == {(0, 0)}, "it asks for something else, or nothing")
    demand(len(asked) <= 2, f"it asks {len(asked)} times")
    demand(search.best.loss == 2.0, f"the loss is said to be {search.best.loss}")


# --- what is told -----------------------------------------------------------------------------------------------------


def _best(case: _Case, whole: bool) -> None:
    problem = unequal_layers()
    search = case(problem, whole=whole, seed=3)
    complete = [choice for ask in run(search, problem) if ask.tokens is None for choice in ask.candidates]
    best = search.best
    least = min(measured(problem, choice) for choice in complete)
    demand(best.loss == least, f"its loss is said to be {best.loss}; the least measured is {least}")
    demand(best.loss == measured(problem, best.choice), "its loss is not the one that was measured")
    demand(best.cost == problem.cost(best.choice), f"its cost is said to be {best.cost}")


def _start(case: _Case, whole: bool) -> None:
    problem = unequal_layers()
    starts: list[Any] = [greedy(problem), [0] * 6]
    for seed, start in itertools.product(range(3), starts):
        choice = start if isinstance(start, list) else start.choice.tolist()
        search = case(problem, start, seed, whole=whole)
        before = search.best.choice.tolist()
        demand(before == choice, f"before anything is measured the best is {before}")
        asked = run(search, problem)
        was = measured(problem, choice)
        loss = search.best.loss
        assert loss is not None
        seen = any(c.tolist() == choice for ask in asked if ask.tokens is None for c in ask.candidates)
        demand(seen or loss < was, "its start was never measured on all of the data")
        demand(loss <= was, f"it ends at {loss}, its start had {was}")


def _draws(case: _Case) -> None:
    problem = unequal_layers()
    asked = run(case(problem), problem)
    demand(len({ask.draw for ask in asked}) == len(asked), "two asks have the same draw")
    demand(all(ask.tokens is None or ask.tokens >= 1 for ask in asked), "an ask is for no tokens")
    places = [(ask.generation, ask.round) for ask in asked]
    demand(places == sorted(set(places)), f"generations and rounds are {places}")


def _books(case: _Case) -> None:
    problem = unequal_layers()
    search = case(problem, total_tokens=1000)
    asked = run(search, problem)
    count = sum(len(ask.candidates) for ask in asked)
    tokens = sum(len(ask.candidates) * (ask.tokens or 1000) for ask in asked)
    demand(search.evaluations == count, f"{search.evaluations} evaluations are booked, not {count}")
    demand(search.evaluated_tokens == tokens, f"{search.evaluated_tokens} tokens are booked, not {tokens}")
    most = search.generations
    demand(most is None or asked[-1].generation <= most, f"it ends in generation {asked[-1].generation} of {most}")
    unknown = case(problem)
    run(unknown, problem)
    demand(unknown.evaluated_tokens is None, "it tells of tokens without knowing how many all are")


def _failed(case: _Case) -> None:
    def broken(problem: Problem, choice: Any, ask: Ask | None) -> float:
        failures = [math.nan, math.inf, -math.inf]
        return failures[int(choice.sum()) % 3] if choice[2] >= 2 else measured(problem, choice, ask)

    problem = unequal_layers()
    search = case(problem, [0] * 6, seed=1)
    run(search, problem, broken)
    demand(search.best.choice[2] < 2, f"the best is {search.best.choice.tolist()}, which failed")
    demand(search.best.loss == measured(problem, search.best.choice), f"its loss is said to be {search.best.loss}")


def _all_failed(case: _Case, whole: bool) -> None:
    problem = unequal_layers()
    start = greedy(problem)
    search = case(problem, start, whole=whole)
    run(search, problem, lambda *_: math.nan)
    demand(search.best.choice.tolist() == start.choice.tolist(), f"the best is {search.best.choice.tolist()}")
    demand(search.best.loss is None, f"the loss is said to be {search.best.loss}")


# --- stopping and going on --------------------------------------------------------------------------------------------


def _seeds(case: _Case) -> None:
    problem = unequal_layers()
    first, again, other = (course(run(case(problem, seed=seed), problem)) for seed in (7, 7, 8))
    demand(first == again, "the same seed gives another course")
    demand(first != other, "another seed gives the same course")


def _resumed(case: _Case, whole: bool) -> None:
    problem = unequal_layers()
    for between in (False, True):
        search = case(problem, seed=5, whole=whole)
        asked, states = [], []
        while not search.done:
            if between:
                search.ask()
            states.append(through_json(search.state_dict()))
            asked.append(step(search, problem, failing_at_times))
        expected, end = course(asked), search.state_dict()
        for number, state in enumerate(states):
            resumed = case(problem, seed=5, whole=whole)
            resumed.load_state_dict(state)
            when = f"stopped after ask {number}{', between ask and tell' if between else ''},"
            demand(course(run(resumed, problem, failing_at_times)) == expected[number:], f"{when} it asks for others")
            demand(resumed.best.choice.tolist() == search.best.choice.tolist(), f"{when} the best is another one")
            demand(resumed.best.loss == search.best.loss, f"{when} the loss is {resumed.best.loss}")
            books = (resumed.evaluations, resumed.evaluated_tokens)
            demand(books == (search.evaluations, search.evaluated_tokens), f"{when} its books are {books}")
            demand(resumed.state_dict() == end, f"{when} it ends in another state")


def _finished(case: _Case) -> None:
    problem = unequal_layers()
    search = case(problem)
    run(search, problem)
    loaded = case(problem)
    loaded.load_state_dict(through_json(search.state_dict()))
    demand(loaded.done, "it is not finished")
    demand(loaded.best.loss == search.best.loss, f"its loss is {loaded.best.loss}, not {search.best.loss}")


def _other_states(case: _Case) -> None:
    problem = unequal_layers()
    state = case(problem, seed=1).state_dict()
    others = {
        "seed": case(problem, seed=2),
        "start": case(problem, [0] * 6, seed=1),
        "amount of data": case(problem, seed=1, total_tokens=5000),
        "problem": case(replace(problem, budgets={"bits": 40.0}), seed=1),
    }
    for what, other in others.items():
        error = refusal(UsageError, f"the state of a search with another {what}", partial(other.load_state_dict, state))
        expected = "another problem, start or settings"
        demand(expected in error.message, f"the message does not say '{expected}': {error.message}")
    refusal(UsageError, "an empty state", partial(case(problem).load_state_dict, {}))


def _asks_twice(case: _Case) -> None:
    search = case(unequal_layers())
    before = through_json(search.state_dict())
    demand(course([search.ask()]) == course([search.ask()]), "the second time it asks for others")
    demand(through_json(search.state_dict()) == before, "asking changes its state")


def _interrupted(case: _Case) -> None:
    problem = unequal_layers()
    search, unbroken = case(problem, seed=2), case(problem, seed=2)
    asked: list[Ask] = []
    while not search.done:
        before = search.ask()
        if len(asked) % 2:  # an evaluation raises: nothing is told
            search.ask()
        asked.append(step(search, problem, measured))
        demand(course([before]) == course(asked[-1:]), "after an evaluation that raised it asks for others")
    demand(course(asked) == course(run(unbroken, problem)), "evaluations that raised change its course")


NO_LOSSES: dict[str, Callable[[list[float]], Any]] = {
    "text": lambda losses: [*losses[:-1], "0.5"],
    "None": lambda losses: [*losses[:-1], None],
    "a list": lambda losses: [*losses[:-1], [0.5, 0.5]],
    "one too few": lambda losses: losses[:-1],
    "one too many": lambda losses: [*losses, 0.5],
    "one number for all": lambda losses: 0.5,
}
"""What is not one loss for each candidate."""


def _refuses_losses(case: _Case) -> None:
    search = case(unequal_layers())
    before = through_json(search.state_dict())
    for what, spoil in NO_LOSSES.items():
        error = refusal(UsageError, what, partial(search.tell, spoil([1.0] * len(search.ask().candidates))))
        said = any(text in error.message for text in ("not a number", "losses told for", "one loss for each"))
        demand(said, f"of {what} it only says: {error.message}")
        demand(through_json(search.state_dict()) == before, f"{what}, although refused, changes its state")


def _after_the_end(case: _Case) -> None:
    problem = unequal_layers()
    search = case(problem)
    run(search, problem)
    for call in (search.ask, partial(search.tell, [])):
        error = refusal(UsageError, "going on after the end", call)
        demand("done" in error.message, f"the message does not say 'done': {error.message}")


def _impossible(case: _Case) -> None:
    problem = unequal_layers()
    least = replace(problem, budgets={}, minimize="bits", max_loss=100.0)
    wrong: list[tuple[str, type[Exception], str, Callable[[], object]]] = [
        ("a budget out of reach", InfeasibleBudget, "bits", partial(case, replace(problem, budgets={"bits": 20.0}))),
        ("a start outside the budgets", UsageError, "of 39.6", partial(case, problem, [3] * 6)),
        ("a start with tied units that differ", UsageError, "tied", partial(case, problem, [0, 1, 0, 0, 0, 0])),
        ("the least cost within a loss", UsageError, "least bits", partial(case, least)),
        ("a seed below zero", UsageError, "seed", partial(case, problem, seed=-1)),
    ]
    for what, kind, text, call in wrong:
        error = refusal(kind, what, call)
        demand(text in str(error), f"of {what} the message does not say '{text}': {error}")


# --- the stop rules ---------------------------------------------------------------------------------------------------


def _limits(case: _Case) -> None:
    problem = unequal_layers()
    for whole, limit in itertools.product((False, True), (60, 77)):
        search = case(problem, total_tokens=1000, whole=whole, stop=Stop(evaluations=limit))
        run(search, problem)
        used = search.evaluations
        demand(limit - MOST_AT_A_TIME <= used <= limit, f"of {limit} evaluations it takes {used}")
    for limit in (25_000, 33_333):
        search = case(problem, total_tokens=1000, stop=Stop(tokens=limit))
        run(search, problem)
        tokens = search.evaluated_tokens
        demand(tokens is not None and tokens <= limit, f"of {limit} tokens it takes {tokens}")
        demand(search.evaluations > 10, f"of {limit} tokens it makes {search.evaluations} evaluations")
    refusal(UsageError, "a limit on tokens of an unknown total", partial(case, problem, stop=Stop(tokens=1000)))


def _patience(case: _Case) -> None:
    problem = unequal_layers()
    asked = run(case(problem, [0] * 6, stop=Stop(patience=3)), problem, lambda *_: 1.0)
    generations = len({ask.generation for ask in asked})
    demand(generations == 3, f"with a patience of 3 it stops after {generations} generations without progress")


def _seconds(case: _Case) -> None:
    problem = unequal_layers()
    now = [100.0]

    def clocked() -> Search:
        return case(problem, [0] * 6, stop=Stop(seconds=10.0), clock=lambda: now[0])

    def slow(problem: Problem, choice: Any, ask: Ask | None) -> float:
        now[0] += 0.25
        return measured(problem, choice, ask)

    search = clocked()
    now[0] += 6.0
    step(search, problem, slow)
    state = through_json(search.state_dict())
    now[0] += 1000.0  # nobody searches
    resumed = clocked()
    resumed.load_state_dict(state)
    began = now[0]
    asked = run(resumed, problem, slow)
    demand(len(asked) > 1, "the time when nobody searched is counted, too")
    most = 4 + 0.25 * (len(asked[-1].candidates) + len(asked[-2].candidates) + 12)
    demand(now[0] - began < most, f"after the 6 seconds before the restore it takes {now[0] - began} more of 10")


def _gap(case: _Case) -> None:
    problem = unequal_layers()
    bound = 0.5 * measured(problem, [0] * 6)
    stop = Stop(gap=0.5, lower_bound=bound)
    search = case(problem, [0] * 6, whole=True, stop=stop)
    run(search, problem)
    loss = search.best.loss
    assert loss is not None
    demand(loss - bound <= 0.5 * abs(loss), f"it ends at {loss}, too far from {bound}")
    sampled = case(problem, [0] * 6, stop=replace(stop, evaluations=60))
    run(sampled, problem)
    demand(search.evaluations < sampled.evaluations <= 60, "a sample's loss near the bound ends it")


def _nothing_heavy(name: str) -> None:
    heavy = ["torch", "ray", "transformers"]
    program = (
        f"import sys\nfrom layerwise.stages.allocate.methods import find_search\nfind_search({name!r})\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    demand((found := answer_of_fresh_interpreter(program)) == "[]", f"it loads {found}")


BOTH: dict[str, Callable[[_Case, bool], None]] = {
    "no candidate leaves the budgets and none is asked twice in a round": _within,
    "of allocations that differ in absent units one is asked for": _absent,
    "the best is the best of what was measured on all of the data": _best,
    "it never ends above its start": _start,
    "when everything fails it ends within the budgets and without a loss": _all_failed,
    "stopping, saving, loading and going on is never having stopped": _resumed,
}
"""On samples of the data, and on all of it."""

EVERY: dict[str, Callable[[_Case], None]] = {
    "candidates keep the limits however deep units are nested": _deep,
    "tied units agree": _tied,
    "fixed units stay": _fixed,
    "a problem with one allocation is measured and done": _one_allocation,
    "an ask says its tokens, and rounds have draws of their own": _draws,
    "the books are right": _books,
    "candidates that failed never become the best": _failed,
    "the seed decides the course": _seeds,
    "a finished search can be loaded and is finished": _finished,
    "a state is not continued by another search": _other_states,
    "asking twice asks the same and changes nothing": _asks_twice,
    "nothing told is lost when an evaluation raises": _interrupted,
    "what is no loss for each candidate is refused and changes nothing": _refuses_losses,
    "going on after the end is refused": _after_the_end,
    "impossible budgets and starts are refused": _impossible,
    "evaluations and tokens are never exceeded and used almost up": _limits,
    "patience stops a search that no longer improves": _patience,
    "seconds are counted over stops and restores": _seconds,
    "a small gap to a bound ends the search and no sample does": _gap,
}
