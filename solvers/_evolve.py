"""Evolutionary search over whole allocations: EvoPress.

One parent, many offspring. Every generation mutates the parent by level switches that keep the budgets (`_moves.py`),
ranks the offspring on a few tokens, keeps the best, ranks those on more, and so on; in the last round the parent takes
part, and only a better one replaces it. Losses of the problem are not used: what counts is the measured fitness,
because a sum of layer errors is not a safe objective for language models.

Against the published program: units may differ in size and budgets may be several (see `_moves.py`); the two units of a
switch are different ones, where EvoPress lets a switch undo itself; a tie keeps the parent; losses of different draws
are never compared, so a search whose last round sees a sample only ends with one more round on all the data,
between its start and its last parents. Hence no search ends above its start on the data that it searched.

Every generation has a random generator of its own, made from the seed and its number. A search that was stopped, saved,
loaded and continued therefore takes the same course as one that never stopped.

Left out: several parents, and crossover; EvoPress found one parent enough.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.solvers._ilp import any_feasible
from layerwise.solvers._moves import Moves
from layerwise.solvers._uniform import uniform
from layerwise.solvers.presets import find_preset
from layerwise.solvers.problem import Choice, Problem, Solution
from layerwise.solvers.search import Ask

_FINALISTS = 4
"""Parents besides the start that the closing round may compare: the last one and those before it."""

_MOST_TRIES = 50
"""Mutants in a row that may be unusable or known before a generation goes on with the offspring it has."""

_MUTATION, _DRAW = 0, 1  # the two random streams of a generation


@dataclass(frozen=True)
class _Settings:
    seed: int
    generations: int
    offspring: int
    survivors: tuple[int, ...]
    tokens: tuple[int | None, ...]
    max_switches: int
    initially_generated: int
    initial_tokens: int | None
    patience: int | None
    max_tokens: int | None
    total_tokens: int | None

    def __post_init__(self) -> None:
        if not self.survivors or len(self.survivors) != len(self.tokens):
            raise UsageError(f"survivors {self.survivors} and tokens {self.tokens} must name the same rounds")
        if self.survivors[-1] != 1:
            raise UsageError(f"the last round must leave one survivor, found {self.survivors[-1]}")
        least = {
            "seed": 0,
            "generations": 0,
            "offspring": 1,
            "max_switches": 1,
            "initially_generated": 1,
            "patience": 1,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UsageError(f"{name} must be at least {bound}, found {value}")
        counts = [*self.survivors, *self.tokens, self.initial_tokens, self.max_tokens, self.total_tokens]
        if any(count is not None and count < 1 for count in counts):
            raise UsageError("survivors and numbers of tokens must be at least 1")
        if self.max_tokens is not None and self.total_tokens is None:
            raise UsageError("max_tokens needs total_tokens, because the closing round uses all of the search data")

    @property
    def samples_to_the_end(self) -> bool:
        """True if even the last round sees only a part of the data."""
        return self.tokens[-1] is not None

    def cost(self, n_candidates: int, tokens: int | None) -> int | None:
        """Tokens that a round takes; None where the amount of data is not known."""
        each = self.total_tokens if tokens is None else tokens
        return None if each is None else n_candidates * each

    def reserve(self) -> int:
        """Tokens of one full generation and the closing round. Asked only with `max_tokens`, so all data is counted."""
        sizes = [self.offspring, *self.survivors[:-1]]
        sizes[-1] += 1  # the parent
        rounds = [*zip(sizes, self.tokens, strict=True), *([(_FINALISTS + 1, None)] if self.samples_to_the_end else [])]
        return sum(self.cost(size, tokens) or 0 for size, tokens in rounds)


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
        patience: stop after so many generations in a row without a better parent.
        max_tokens: start no generation that could take the search above so many evaluated tokens in all, the closing
            round included. Needs `total_tokens`. The initial and the closing round always run.
        total_tokens: how much data there is. Rounds that ask for as much or more become "all of it".
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
        patience: int | None = None,
        max_tokens: int | None = None,
        total_tokens: int | None = None,
    ) -> None:
        base = find_preset(preset or "evopress-quantization")
        generations = base.generations if generations is None else generations
        if generations is None:
            raise UsageError(f"preset {preset} leaves generations to you", hint="see depth_generations")

        def amount(wanted: int | None) -> int | None:
            return None if wanted is None or (total_tokens is not None and wanted >= total_tokens) else wanted

        rounds = base.tokens if tokens is None else tuple(tokens)
        self._settings = _Settings(
            seed=seed,
            generations=generations,
            offspring=base.offspring if offspring is None else offspring,
            survivors=base.survivors if survivors is None else tuple(survivors),
            tokens=tuple(amount(wanted) for wanted in rounds),
            max_switches=base.max_switches if max_switches is None else max_switches,
            initially_generated=base.initially_generated if initially_generated is None else initially_generated,
            initial_tokens=amount((rounds or (None,))[0] if initial_tokens is None else initial_tokens),
            patience=patience,
            max_tokens=max_tokens,
            total_tokens=total_tokens,
        )
        self._problem, self._tied = problem, problem.tied()
        self._moves = Moves(self._tied)
        self._identity = _identity(self._tied, self._settings, start)
        self._phase: Literal["start", "select", "close", "done"] = "start"
        self._generation = self._round = self._stale = self._evaluations = 0
        self._spent: int | None = 0
        self._parent = self._first(start)
        self._parent_loss: float | None = None
        self._parent_complete = False  # its loss was measured on all of the data
        self._ancestors: list[Choice] = []  # former parents, the start first, then the most recent ones
        self._pool: list[Choice] = []
        if start is None and self._moves.can_rise(self._parent):
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
        return self._evaluations

    @property
    def evaluated_tokens(self) -> int | None:
        """How many tokens these evaluations took; None once all data was used and `total_tokens` is not known."""
        return self._spent

    @property
    def best(self) -> Solution:
        """The parent. Its loss is the last one measured: at the end on all the data, before that on the last draw.

        None where nothing was measured yet, or every evaluation failed.
        """
        return replace(self._problem.solution(self._problem.expand(self._parent)), loss=self._parent_loss)

    def ask(self) -> Ask:
        """The candidates to evaluate next; the same answer until `tell` is called."""
        if self.done:
            raise UsageError("the search is done; there is nothing left to evaluate")
        rng = self._rng(self._generation, _DRAW)
        draws = rng.integers(2**32, size=len(self._settings.tokens) + 1)
        return Ask(
            candidates=tuple(self._problem.expand(candidate) for candidate in self._candidates()),
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
        candidates = self._candidates()
        if len(losses) != len(candidates):
            raise UsageError(f"{len(losses)} losses told for {len(candidates)} candidates asked")
        values = [float(loss) for loss in losses]
        self._evaluations += len(values)
        cost = self._settings.cost(len(values), self._tokens())
        self._spent = None if cost is None or self._spent is None else self._spent + cost
        ranked = sorted((index for index, loss in enumerate(values) if math.isfinite(loss)), key=values.__getitem__)
        if self._phase == "select" and not self._in_last_round():
            self._keep([candidates[index] for index in ranked[: self._settings.survivors[self._round]]])
        elif self._phase == "select":
            self._compare_with_parent(values, ranked)
            self._next_generation()
        else:
            best = ranked[0] if ranked else 0
            self._adopt(candidates[best], values[best] if ranked else None)
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
            "stale": self._stale,
            "evaluations": self._evaluations,
            "spent": self._spent,
            "parent": self._parent.tolist(),
            "parent_loss": self._parent_loss,
            "parent_complete": self._parent_complete,
            "ancestors": [ancestor.tolist() for ancestor in self._ancestors],
            "pool": [candidate.tolist() for candidate in self._pool],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            UsageError: the state belongs to a search with another problem, start or settings.
        """
        if state.get("version") != 1 or state.get("identity") != self._identity:
            raise UsageError("the saved state belongs to a search with another problem, start or settings")
        self._phase = state["phase"]
        self._generation, self._round, self._stale = state["generation"], state["round"], state["stale"]
        self._evaluations, self._spent = state["evaluations"], state["spent"]
        self._parent = np.array(state["parent"], dtype=np.int64)
        self._parent_loss, self._parent_complete = state["parent_loss"], state["parent_complete"]
        self._ancestors = [np.array(ancestor, dtype=np.int64) for ancestor in state["ancestors"]]
        self._pool = [np.array(candidate, dtype=np.int64) for candidate in state["pool"]]

    def _candidates(self) -> list[Choice]:
        """What is being asked for, in tied units: the pool, with the parent last in the last round."""
        return [*self._pool, self._parent] if self._phase == "select" and self._in_last_round() else self._pool

    def _in_last_round(self) -> bool:
        return self._round == len(self._settings.tokens) - 1

    def _tokens(self) -> int | None:
        if self._phase == "start":
            return self._settings.initial_tokens
        return self._settings.tokens[self._round] if self._phase == "select" else None

    def _keep(self, survivors: list[Choice]) -> None:
        """Go on to the next round, or to the next generation if every candidate failed."""
        self._pool = survivors
        self._round += 1
        if not survivors:
            self._stale += 1
            self._next_generation()

    def _compare_with_parent(self, losses: list[float], ranked: list[int]) -> None:
        """The last round: `losses` ends with the parent's."""
        parent_loss = losses[-1] if math.isfinite(losses[-1]) else None
        if ranked and (parent_loss is None or losses[ranked[0]] < parent_loss):
            self._ancestors = [*self._ancestors[:1], *[*self._ancestors[1:], self._parent][-_FINALISTS + 1 :]]
            self._adopt(self._pool[ranked[0]], losses[ranked[0]])
            self._stale = 0
        else:
            self._adopt(self._parent, parent_loss)
            self._stale += 1

    def _adopt(self, parent: Choice, loss: float | None) -> None:
        self._parent, self._parent_loss = parent, loss
        self._parent_complete = loss is not None and self._tokens() is None

    def _next_generation(self) -> None:
        """Begin the next generation that has offspring; without one, close the search."""
        self._phase, self._round = "select", 0
        while not self._exhausted():
            self._generation += 1
            self._pool = self._offspring()
            if self._pool:
                return
            self._stale += 1
        self._close()

    def _exhausted(self) -> bool:
        settings = self._settings
        if settings.max_tokens is not None and (self._spent or 0) + settings.reserve() > settings.max_tokens:
            return True
        patient = settings.patience is None or self._stale < settings.patience
        return self._generation >= settings.generations or not patient

    def _close(self) -> None:
        """Compare the start with the last parents on all the data, unless every last round has done so."""
        if self._parent_complete:
            self._phase, self._pool = "done", []
            return
        self._phase, self._round = "close", len(self._settings.tokens)
        self._pool = _distinct([self._parent, *reversed(self._ancestors)])  # of equals, the later parent

    def _first(self, start: Solution | ArrayLike | None) -> Choice:
        """The parent of the first generation, or what random fills go up from."""
        if start is None:
            self._problem.check_budgets()
            try:
                return self._problem.fold(uniform(self._problem).choice)
            except InfeasibleBudget:  # no common level fits; a mixture may
                return self._problem.fold(any_feasible(self._problem))
        choice = start.choice if isinstance(start, Solution) else start
        folded = self._problem.fold(choice)
        if not self._tied.feasible(folded):
            over = [
                f"{cost:.6g} {resource} of {self._problem.budgets[resource]:.6g}"
                for resource, cost in self._tied.cost(folded).items()
                if resource in self._tied.limits
            ]
            raise UsageError(f"the start has an unavailable level or is outside the budgets: {', '.join(over)}")
        return folded

    def _random_fills(self) -> list[Choice]:
        rng = self._rng(0, _MUTATION)
        return _distinct([self._moves.filled(self._parent, rng) for _ in range(self._settings.initially_generated)])

    def _offspring(self) -> list[Choice]:
        """Mutants of the parent, none like it or like another."""
        rng = self._rng(self._generation, _MUTATION)
        offspring: list[Choice] = []
        known = {self._parent.tobytes()}
        tries = 0
        while len(offspring) < self._settings.offspring and tries < _MOST_TRIES:
            tries += 1
            mutant = self._moves.mutated(self._parent, rng, self._settings.max_switches)
            if mutant is not None and mutant.tobytes() not in known:
                known.add(mutant.tobytes())
                offspring.append(mutant)
                tries = 0
        return offspring

    def _rng(self, generation: int, stream: int) -> np.random.Generator:
        key = np.array([self._settings.seed, generation], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))


def _distinct(choices: Sequence[Choice]) -> list[Choice]:
    return list({choice.tobytes(): choice for choice in reversed(choices)}.values())[::-1]


def _identity(problem: Problem, settings: _Settings, start: Solution | ArrayLike | None) -> str:
    """A hash of everything that decides the course of a search, so that a state is not continued by another one."""
    digest = hashlib.sha256(json.dumps([asdict(settings), dict(problem.budgets), problem.shape]).encode())
    for resource in sorted(problem.costs):
        digest.update(resource.encode() + problem.costs[resource].tobytes())
    if start is not None:
        digest.update(np.asarray(start.choice if isinstance(start, Solution) else start, dtype=np.int64).tobytes())
    return digest.hexdigest()
