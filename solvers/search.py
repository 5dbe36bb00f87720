"""How every search speaks: ask for candidates, tell their fitness, until done.

The caller owns the loop and the evaluation, so the same search runs in a notebook, in a test and on a cluster:

    while not search.done:
        search.tell(evaluate(search.ask()))

Nothing is told until `tell` returns: if `evaluate` raises, or `tell` refuses what it got, `ask` gives the same answer
again. What a search does is decided by its arguments and by what it is told, `Stop.seconds` excepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from layerwise.solvers.problem import Choice, Solution


@dataclass(frozen=True, eq=False)
class Ask:
    """Candidates to evaluate, all on the same tokens.

    Args:
        candidates: allocations, each (units,) level indices, in the units of the problem as it was given and in the
            form of `Problem.canonical`, so that two of them are equal if they give the same model.
        tokens: how many tokens of the search data to use; None for all of them.
        draw: seed for choosing these tokens. Another round has another draw.
        generation: 0 for the initial round, then counted from 1. Searches of one batch at a time number their asks.
        round: selection round of the generation, from 0; a closing round counts as one more of the last generation.
    """

    candidates: tuple[Choice, ...]
    tokens: int | None
    draw: int
    generation: int
    round: int


class Search(Protocol):
    """A search for the allocation with the least measured loss. It never leaves the budgets."""

    @property
    def done(self) -> bool:
        """True when there is nothing left to ask."""
        ...

    @property
    def generations(self) -> int | None:
        """How many generations it takes by its settings, as `Ask.generation` counts them; None if none says so."""
        ...

    @property
    def evaluations(self) -> int:
        """How many candidates were evaluated so far, one in several rounds counted several times."""
        ...

    @property
    def evaluated_tokens(self) -> int | None:
        """How many tokens these evaluations took; None where that cannot be known."""
        ...

    @property
    def best(self) -> Solution:
        """The best allocation so far; its loss is the measured one, None before there is any."""
        ...

    def ask(self) -> Ask:
        """The candidates to evaluate next; the same answer until `tell` is called."""
        ...

    def tell(self, losses: Sequence[float]) -> None:
        """Take the fitness of the candidates last asked for, in their order; NaN or inf for one that failed.

        Raises:
            UsageError: not one number for each candidate, or nothing was asked for.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on in another process, as plain JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the search must have been made with the same arguments.

        Raises:
            UsageError: the state belongs to a search with another problem, start or settings.
        """
        ...
