"""Optuna's samplers as searches: `TPE` and `NSGA2`.

Every unit of the plain problem is one categorical parameter over the levels that it has. What Optuna proposes may leave
the budgets, and such an allocation is never asked for: its trial gets the relative excess over each budget as
constraint values and is told as pruned, without any value, and Optuna draws again. That is the signal which each
sampler understands. TPE puts trials that violate a constraint among the bad ones, whatever their value, so it learns
where the budgets end; for NSGA-II a pruned trial is no member of any population, so its parents are always feasible. A
proposal that is known already is told as failed, which samplers ignore. After a few draws in vain the last one is
repaired (`_repair.py`) towards the best allocation so far, and enters the study as what it has become.

Where asks see samples of the data, a study holds losses of different draws: the sampler takes the difference for noise.
The best allocation is still only ever compared on the same tokens.

Optuna's samplers carry random generators that cannot be saved, so every ask has a new sampler, seeded by the seed and
the number of the ask: what it proposes depends on nothing but that and the trials told before. A state holds the trials
ask by ask, and a study restored from it replays them in their order.

Optuna is imported when a search is made, and kept from announcing the study in the host's log.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from layerwise.errors import UsageError
from layerwise.solvers._archive import Archive
from layerwise.solvers._incumbent import MOST_TRIES, as_choice
from layerwise.solvers._ledger import Clock, Course
from layerwise.solvers._repair import repaired
from layerwise.solvers._rounds import FIRST_STREAM, Batched, Rounds
from layerwise.solvers.problem import LOSS, Choice, Problem, Solution
from layerwise.solvers.stopping import Stop

_MOST_DRAWS = 4
"""Proposals for one candidate before the last is repaired. A guess.

Under tight budgets over many units nearly all need it.
"""

_MOST_SWITCHES = 3
"""Switches that make another allocation of a repaired one that is known. A guess."""

_SAMPLER, _REPAIR = FIRST_STREAM, FIRST_STREAM + 1

_OPEN, _PRUNED, _FAILED = "open", "pruned", "failed"

_Outcome = str | list[float]
"""What became of a trial: one of the words above, or its values."""


class _Proposals:
    """An Optuna study that proposes allocations within the budgets of a search.

    Args:
        rounds: the course of the search.
        n_objectives: how many values a trial has.
        sampler: makes a sampler from `seed`.
        genetic: the sampler counts generations, and every trial must belong to one.
    """

    def __init__(self, rounds: Rounds, n_objectives: int, sampler: Callable[..., Any], *, genetic: bool) -> None:
        from optuna.distributions import CategoricalDistribution

        self._rounds, self._n_objectives = rounds, n_objectives
        self._sampler, self._genetic = sampler, genetic
        self._space = {
            f"unit {unit}": CategoricalDistribution(np.flatnonzero(levels).tolist())
            for unit, levels in enumerate(rounds.plain.available)
        }
        self._study = _new_study(self._n_objectives)
        self._trials: list[tuple[Choice, _Outcome]] = []  # by their number in the study
        self._asks: list[int] = []  # the first trial of every ask
        self._open: list[int] = []  # trials that wait for their values
        self._known: set[bytes] = set()  # allocations that were or are to be evaluated

    def propose(self, n: int) -> list[Choice]:
        """Up to `n` allocations within the budgets that are new to the study; with the first ask, the incumbent."""
        rounds = self._rounds
        self._study.sampler = self._sampler(seed=int(rounds.rng(_SAMPLER).integers(2**32)))
        rng = rounds.rng(_REPAIR)
        self._begin()
        if rounds.number == 0:
            self._enter(rounds.incumbent.choice)
        while len(self._open) < n and self._found(rng):
            pass
        return [self._trials[index][0] for index in self._open]

    @property
    def n_open(self) -> int:
        """How many were last proposed and wait for their values."""
        return len(self._open)

    def tell(self, values: Sequence[list[float]]) -> None:
        """Take the values of what was last proposed, in that order; a trial with NaN among them has failed."""
        for index, told in zip(self._open, values, strict=True):
            self._end(index, _FAILED if any(math.isnan(value) for value in told) else told)
        self._open = []

    def state_dict(self) -> list[list[dict[str, Any]]]:
        starts = [*self._asks, len(self._trials)]
        return [
            [{"choice": choice.tolist(), "outcome": outcome} for choice, outcome in self._trials[first:last]]
            for first, last in itertools.pairwise(starts)
        ]

    def load_state_dict(self, state: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Build the study again: for each ask its proposals, and only then the values told, as it was at first."""
        self._study = _new_study(self._n_objectives)
        self._trials, self._asks, self._known = [], [], set()
        if self._genetic:  # else random, which is fastest, because the trials are known
            self._study.sampler = self._sampler(seed=0)
        for trials in state:
            self._begin()
            valued = {}
            for index, entry in enumerate(trials, start=len(self._trials)):
                self._enter(as_choice(entry["choice"]))
                if isinstance(entry["outcome"], list):
                    valued[index] = entry["outcome"]
                elif entry["outcome"] != _OPEN:
                    self._end(index, entry["outcome"])
                    self._open.remove(index)
            for index, values in valued.items():
                self._end(index, values)
                self._open.remove(index)

    def _begin(self) -> None:
        self._asks.append(len(self._trials))
        self._open = []

    def _found(self, rng: np.random.Generator) -> bool:
        """Open one more trial; False if nothing new was found."""
        rounds = self._rounds
        for _ in range(_MOST_DRAWS):
            choice = self._ask()
            if not rounds.plain.feasible(choice):
                outcome: _Outcome = _PRUNED
            elif rounds.key(choice) in self._known:
                outcome = _FAILED
            else:
                self._keep(choice)
                return True
            self._trials.append((choice, outcome))
            self._end(len(self._trials) - 1, outcome)
        mended: Choice | None = repaired(rounds.plain, choice, rounds.incumbent.choice, rng)
        for _ in range(MOST_TRIES):
            if mended is not None and rounds.key(mended) not in self._known:
                self._enter(mended)
                return True
            mended = rounds.moves.mutated(rounds.incumbent.choice, rng, _MOST_SWITCHES)
        return False

    def _enter(self, choice: Choice) -> None:
        """Open a trial of this allocation."""
        self._study.enqueue_trial(dict(zip(self._space, choice.tolist(), strict=True)))
        self._keep(self._ask())

    def _keep(self, choice: Choice) -> None:
        self._open.append(len(self._trials))
        self._trials.append((choice, _OPEN))
        self._known.add(self._rounds.key(choice))

    def _ask(self) -> Choice:
        """A new trial of the study, with its constraint values: above 0 where a budget is exceeded."""
        plain = self._rounds.plain
        trial = self._study.ask(self._space)
        if self._genetic:
            self._join_generation(trial.number)
        choice = as_choice([trial.params[name] for name in self._space])
        cost, feasible = plain.cost(choice), plain.feasible(choice)
        for resource, limit in plain.limits.items():
            excess = (cost[resource] - limit) / (abs(limit) or 1.0)
            trial.set_constraint(resource, min(excess, 0.0) if feasible else excess)
        return choice

    def _join_generation(self, number: int) -> None:
        """Give an enqueued trial its generation, and the generation its parents.

        Optuna does so for trials that it draws, so NSGA-II would never see the start nor a repaired child, and a
        restored study would choose the parents later than the first one did.
        """
        study = self._study
        generation = study.sampler.get_trial_generation(study, study.get_trials(deepcopy=False)[number])
        study.sampler.get_parent_population(study, generation)

    def _end(self, number: int, outcome: _Outcome) -> None:
        from optuna.trial import TrialState

        self._trials[number] = (self._trials[number][0], outcome)
        if isinstance(outcome, str):
            self._study.tell(number, state=TrialState.PRUNED if outcome == _PRUNED else TrialState.FAIL)
        else:
            self._study.tell(number, outcome)


def _new_study(n_objectives: int) -> Any:
    """An empty study in memory, made without the line that Optuna would write to the log about it."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(directions=["minimize"] * n_objectives, sampler=optuna.samplers.RandomSampler())
    finally:
        optuna.logging.set_verbosity(before)


class TPE(Batched):
    """Optuna's tree-structured Parzen estimator, multivariate, within the budgets.

    Args:
        problem: any number of budgets; losses are not needed and not used.
        start: an allocation or a solver's solution that becomes the first trial.
        seed: 0 or more; decides everything that is random, the draws of tokens included.
        batch: candidates of an ask; those of one ask keep away from each other (the constant liar).
        random_trials: how many trials are drawn at random before the estimator takes over; proposals outside the
            budgets are counted.
        tokens_per_ask: how much data an ask evaluates on; None is all of it.
        total_tokens: how much data there is.
        stop: when to end; it also ends when nothing new is found. Patience counts asks.
        clock: for `Stop.seconds`.
    Raises:
        InfeasibleBudget: no allocation is within the budgets.
        UsageError: settings that do not fit together, or a start outside the budgets.
    Source: Bergstra et al., Algorithms for hyper-parameter optimization, NeurIPS 2011; Watanabe and Hutter,
        c-TPE, arXiv:2211.14411, for the constraints; both as in Optuna 5.
    """

    def __init__(
        self,
        problem: Problem,
        start: Solution | ArrayLike | None = None,
        seed: int = 0,
        *,
        batch: int = 8,
        random_trials: int = 10,
        tokens_per_ask: int | None = None,
        total_tokens: int | None = None,
        stop: Stop = Stop(evaluations=1000),
        clock: Clock = time.monotonic,
    ) -> None:
        from optuna.samplers import TPESampler

        if random_trials < 0:
            raise UsageError(f"random_trials must be at least 0, found {random_trials}")
        self._rounds = Rounds(
            problem,
            start,
            Course(seed, total_tokens, stop, clock, tokens_per_ask),
            settings={"search": "tpe", "batch": batch, "random_trials": random_trials},
            batch=batch,
        )
        sampler = partial(TPESampler, n_startup_trials=random_trials, multivariate=True, constant_liar=True)
        self._batch, self._proposals = batch, _Proposals(self._rounds, 1, sampler, genetic=False)
        self._next()

    def tell(self, losses: Sequence[float]) -> None:
        """Take the fitness of the candidates last asked for, in their order; NaN or inf for one that failed."""
        measured = self._rounds.take(losses)
        if not self.done:
            self._proposals.tell([[loss] for _, loss in measured[: self._proposals.n_open]])
            self._next()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on in another process, as plain JSON; also between `ask` and `tell`."""
        return {**self._rounds.state_dict(), "trials": self._proposals.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the search must have been made with the same arguments."""
        self._rounds.load_state_dict(state)
        self._proposals.load_state_dict(state["trials"])

    def _next(self) -> None:
        self._rounds.begin()
        self._rounds.open(self._proposals.propose(self._batch))


class NSGA2(Batched):
    """Optuna's NSGA-II, within the budgets. `Genetic` is ours, which spends what children leave of the budgets.

    Args:
        problem: any number of budgets; losses are not needed and not used.
        start: an allocation or a solver's solution that becomes the first trial.
        seed: 0 or more; decides everything that is random, the draws of tokens included.
        objectives: "loss", and any resources of the problem.
        population: candidates of a generation, which is one ask. Without sampling, no allocation is measured twice.
        tokens_per_ask: how much data an ask evaluates on; None is all of it. Parents keep the values of their own draw.
        total_tokens: how much data there is.
        stop: when to end; it also ends when nothing new is found. Patience counts asks without a lower loss.
        clock: for `Stop.seconds`.
    Raises:
        InfeasibleBudget: no allocation is within the budgets.
        UsageError: settings that do not fit together, or a start outside the budgets.
    Source: Deb et al., NSGA-II, IEEE Transactions on Evolutionary Computation 6 (2002), as in Optuna 5.
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
        from optuna.samplers import NSGAIISampler

        if population < 2:
            raise UsageError(f"population must be at least 2, found {population}")
        self._rounds = Rounds(
            problem,
            start,
            Course(seed, total_tokens, stop, clock, tokens_per_ask),
            settings={"search": "nsga2", "objectives": list(objectives), "population": population},
            batch=population,
            more_finalists=population,
        )
        self._archive = Archive(self._rounds.plain, objectives)
        sampler = partial(NSGAIISampler, population_size=population)
        self._size, self._proposals = population, _Proposals(self._rounds, len(objectives), sampler, genetic=True)
        self._next()

    @property
    def archive(self) -> list[Solution]:
        """Measured allocations that no other one beats in every objective, the least loss first.

        With all of the data in every ask, of all that were measured. Otherwise of the last ask on its sample, and at
        the end of the finalists on all of the data.
        """
        return self._rounds.solutions(self._archive.front)

    def tell(self, losses: Sequence[float]) -> None:
        """Take the fitness of the candidates last asked for, in their order; NaN or inf for one that failed."""
        measured = self._rounds.take(losses)
        self._archive.take(measured, comparable=self._rounds.tokens is None)
        if not self.done:
            own = measured[: self._proposals.n_open]
            self._proposals.tell([self._archive.point(choice, loss) for choice, loss in own])
            self._next()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on in another process, as plain JSON; also between `ask` and `tell`."""
        return {
            **self._rounds.state_dict(),
            "trials": self._proposals.state_dict(),
            "archive": self._archive.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the search must have been made with the same arguments."""
        self._rounds.load_state_dict(state)
        self._proposals.load_state_dict(state["trials"])
        self._archive.load_state_dict(state["archive"])

    def _next(self) -> None:
        self._rounds.begin()
        finalists = [choice for choice, _ in self._archive.front][: self._size]
        self._rounds.open(self._proposals.propose(self._size), finalists)
