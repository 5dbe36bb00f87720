"""`apply`: turns one allocation into a compressed model.

Its artifact is the decoded weights of the units beside the allocation that they came from (`applied.py`), and on
request the same weights laid out for kernels (`packed_model.py`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from layerwise.errors import UsageError
from layerwise.solvers.pareto import knee, non_dominated
from layerwise.stages.allocate.allocation import Allocation, check_database, load_allocations
from layerwise.stages.contract import Context, ModelSource, Params, Port, Stage
from layerwise.stages.levels.database import DatabaseIndex

if TYPE_CHECKING:
    from torch import Tensor


class ApplyParams(Params):
    """Which allocation to take."""

    pick: str = Field(
        "knee",
        description="knee: where the frontier of bits and KL bends (best, if it does not); best: least KL; "
        "smallest: fewest bits; "
        "a budget as it stands in the frontier (bits=3); or the first digits of a candidate",
    )
    packed: bool = Field(
        False, description="also write the weights as kernels take them: a model that runs on them can be loaded"
    )

    def material(self) -> dict[str, Any]:
        """Without `packed` where it changes nothing."""
        return self.model_dump(mode="json", exclude=set() if self.packed else {"packed"})


def apply(context: Context, params: ApplyParams) -> None:
    """Write `allocation.json` and `weights.safetensors`; with `packed` also `packed.json` and `packed.safetensors`.

    Raises:
        UsageError: nothing fits `pick`, or the database is not that of the allocations.
    """
    allocation = pick(load_allocations(context.input("allocations")), params.pick)
    check_database([allocation], DatabaseIndex(context.input("database")))
    write = partial(
        _write_weights,
        model=context.model,
        database=context.input("database"),
        out=context.out,
        packed=params.packed,
    )
    context.executor.map(write, [allocation], note="models")


def pick(allocations: list[Allocation], how: str) -> Allocation:
    """One of several allocations; see `ApplyParams.pick`.

    Raises:
        UsageError: nothing fits.
    """
    if how in ("knee", "best", "smallest"):
        measured = [
            (allocation.bits, allocation.kl, allocation) for allocation in allocations if allocation.kl is not None
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
    return fitting[0]


def _write_weights(allocation: Allocation, *, model: ModelSource, database: Path, out: Path, packed: bool) -> None:
    from layerwise.stages.apply.model import save_applied
    from layerwise.stages.apply.packed import save_packed
    from layerwise.stages.levels.database import Database
    from layerwise.stages.models.checkpoint import Checkpoint

    checkpoint, levels = Checkpoint(model.path), Database(database)
    tensors = {}
    for unit in levels.units:
        decoded = levels.decode(unit["unit"], allocation.levels[unit["unit"]])
        stored = checkpoint.read(unit["tensor"])
        tensors[unit["tensor"]] = (decoded.T if unit["transposed"] else decoded).to(stored.dtype).contiguous()
    save_applied(out, allocation, tensors, {unit["unit"]: unit["tensor"] for unit in levels.units})
    if packed:
        rows = levels.index.by_name

        def stored_weight(unit: str) -> Tensor:
            weight = tensors[rows[unit]["tensor"]]
            return weight.T if rows[unit]["transposed"] else weight

        save_packed(out, levels, allocation.levels, stored_weight)


STAGE = Stage(
    "apply",
    ApplyParams,
    apply,
    gives="model",
    takes={"allocations": Port("allocations"), "database": Port("database")},
)
