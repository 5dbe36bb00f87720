"""How every search speaks: ask for candidates, tell their fitness, until done.

The caller owns the loop and the evaluation, so the same search runs in a notebook, in a test and on a cluster:

    while not search.done:
        search.tell(evaluate(search.ask()))
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
        candidates: allocations, each (units,) level indices, in the units of the problem as it was given.
        tokens: how many tokens of the search data to use; None for all of them.
        draw: seed for choosing these tokens. Another round has another draw.
        generation: 0 for the initial round, then counted from 1.
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
    def best(self) -> Solution:
        """The best allocation so far; its loss is the measured one, None before there is any."""
        ...

    def ask(self) -> Ask:
        """The candidates to evaluate next; the same answer until `tell` is called."""
        ...

    def tell(self, losses: Sequence[float]) -> None:
        """Take the fitness of the candidates last asked for, in their order; NaN or inf for one that failed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on in another process, as plain JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the search must have been made with the same arguments."""
        ...
