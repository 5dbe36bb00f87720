"""The measured allocations of a search that no other one beats in every objective."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import UsageError
from layerwise.solvers._incumbent import Measured, as_choice, key
from layerwise.solvers.pareto import non_dominated
from layerwise.solvers.problem import LOSS, Choice, Problem


class Archive:
    """A Pareto front that grows.

    Args:
        problem: in plain units.
        objectives: "loss" and any resources, all minimised.
    Raises:
        UsageError: an objective that the problem does not have, one named twice, or no loss among them.
    """

    def __init__(self, problem: Problem, objectives: Sequence[str]) -> None:
        known = [LOSS, *problem.costs]
        for objective in objectives:
            if objective not in known:
                raise UsageError(f"unknown objective {objective}; known are {', '.join(known)}")
        if LOSS not in objectives or len(set(objectives)) < len(objectives):
            raise UsageError(f"objectives are loss and different resources, found {', '.join(objectives) or 'none'}")
        self._problem, self._objectives = problem, tuple(objectives)
        self._front: list[Measured] = []

    @property
    def front(self) -> list[Measured]:
        """The allocations and their losses, the least loss first."""
        return self._front

    def points(self, measured: Sequence[Measured]) -> NDArray[np.float64]:
        """(candidates, objectives): what is minimised."""
        return np.array([self.point(choice, loss) for choice, loss in measured]).reshape(-1, len(self._objectives))

    def point(self, choice: Choice, loss: float) -> list[float]:
        """The objectives of one candidate."""
        amounts = {**self._problem.cost(choice), LOSS: loss}
        return [amounts[objective] for objective in self._objectives]

    def take(self, measured: Sequence[Measured], comparable: bool) -> None:
        """Let these join; those that failed are left out.

        Args:
            measured: candidates and their losses.
            comparable: these losses can be compared with those that it holds; otherwise it forgets what it holds.
        """
        every = [*self._front, *measured] if comparable else measured
        alive = {key(self._problem, choice): (choice, loss) for choice, loss in every if not math.isnan(loss)}
        pairs = list(alive.values())
        front = [pairs[index] for index in np.flatnonzero(non_dominated(self.points(pairs)))]
        self._front = sorted(front, key=lambda pair: (pair[1], self.point(*pair), pair[0].tolist()))

    def state_dict(self) -> list[dict[str, Any]]:
        return [{"choice": choice.tolist(), "loss": loss} for choice, loss in self._front]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        self._front = [(as_choice(entry["choice"]), entry["loss"]) for entry in state]
