"""Which one of several allocations is meant."""

from __future__ import annotations

import numpy as np

from layerwise.errors import UsageError
from layerwise.solvers.pareto import knee, non_dominated
from layerwise.stages.allocate.allocation import Allocation

PICK = (
    "knee: where the frontier of bits and KL bends (best, if it does not); best: least KL; smallest: fewest bits; a "
    "budget as it stands in the frontier (bits=3); or the first digits of a candidate"
)
"""What `how` may be, for people."""


def pick(allocations: list[Allocation], how: str) -> Allocation:
    """One of several allocations.

    Args:
        allocations: with what was measured of them.
        how: see PICK.
    Raises:
        UsageError: nothing fits.
    """
    if how in ("knee", "best", "smallest"):
        measured = [
            (allocation.sizes["bits"], allocation.kl, allocation)
            for allocation in allocations
            if allocation.kl is not None
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
