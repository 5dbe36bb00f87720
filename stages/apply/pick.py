"""Which one of several allocations is meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from layerwise.errors import UsageError
from layerwise.solvers.pareto import knee, non_dominated
from layerwise.stages.allocate.allocation import Allocation
from layerwise.stages.allocate.costs import budget_text

PICK = (
    "knee: where the frontier of bits and KL bends (best, if it does not); best: least KL (both after the repair, if "
    "`allocate` compared by one); smallest: fewest bits; a budget as it stands in the frontier (bits=3); or the first "
    "digits of a candidate"
)
"""What `how` may be, for people."""


_WORDS = ("knee", "best", "smallest")
_CANDIDATE = re.compile(r"[0-9a-f]{4,12}")


def misfit(how: str, makers: Sequence[Any]) -> str | None:
    """What is wrong with `how` before the allocations are there; None if it may fit one of them.

    Args:
        makers: the parameters of the stages that make the allocations.
    """
    if how in _WORDS or _CANDIDATE.fullmatch(how):
        return None
    if not all(hasattr(made, "combinations") for made in makers):
        return None  # another package's stage, whose budgets nobody here knows
    budgets = [budget_text(budget) for made in makers for budget in made.combinations]
    if how in budgets:
        return None
    known = [*_WORDS, *dict.fromkeys(budgets)]
    return f"'{how}' fits no allocation: say {', '.join(known[:12])}, or 4 to 12 digits of a candidate"


def pick(allocations: list[Allocation], how: str) -> Allocation:
    """One of several allocations.

    Args:
        allocations: with what was measured of them.
        how: see PICK.
    Raises:
        UsageError: nothing fits.
    """
    if how in _WORDS:
        repaired = all(allocation.recovered_kl is not None for allocation in allocations)
        losses = [allocation.recovered_kl if repaired else allocation.kl for allocation in allocations]
        measured = [
            (allocation.sizes["bits"], kl, allocation)
            for allocation, kl in zip(allocations, losses, strict=True)
            if kl is not None
        ]
        if not measured:
            raise UsageError("no allocation has a finite KL", hint="raise the budget")
        points = np.array([(bits, kl) for bits, kl, _ in measured])
        front = sorted(np.flatnonzero(non_dominated(points)), key=lambda number: measured[number][:2])
        bend = knee(points[front, 0], points[front, 1]) if how == "knee" else None
        place = 0 if how == "smallest" else -1 if bend is None else bend  # bits rise along the front, KL falls
        return measured[front[place]][2]
    fitting = [a for a in allocations if a.budget == how or (len(how) >= 4 and a.candidate.startswith(how))]
    if not fitting:
        known = ", ".join(f"{allocation.budget} ({allocation.candidate})" for allocation in allocations)
        raise UsageError(f"pick: '{how}' fits no allocation; there are {known}", hint="or use knee, best or smallest")
    if len({allocation.candidate for allocation in fitting}) > 1:
        known = ", ".join(allocation.candidate for allocation in fitting)
        raise UsageError(f"pick: '{how}' fits several allocations: {known}", hint="give more digits of one of them")
    return fitting[0]
