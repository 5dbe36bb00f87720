"""Allocations repaired and compared: which one is best may change with a repair, for some errors are easier to mend.

Of every budget the best candidates that were measured are written as models, repaired and measured again, all on the
search data. That budget's allocation is the one that is best repaired. What the repair adds to a model, adapters say,
is counted in its bytes; the budget is that of the levels alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import UsageError
from layerwise.stages.allocate.allocation import Allocation
from layerwise.stages.contract import Context, Row
from layerwise.stages.data.text import Tokens
from layerwise.stages.evaluate.scoring import Request, evaluator_factory, score

if TYPE_CHECKING:
    from layerwise.stages.recover.params import RecoverParams
    from layerwise.stages.recover.texts import Text


@dataclass(frozen=True)
class Recovered:
    """A finalist after its repair.

    Args:
        kl: on the search data; None where it is not finite.
        added: to what the levels cost, by resource in absolute amounts: bytes, and bits that are stored.
    """

    kl: float | None
    added: Mapping[str, float]


class Recovery:
    """Repairs allocations, each once.

    Args:
        context: of the stage.
        repairs: what is done to each.
        text: that the repairs read, if they read any.
        tokens: that models are measured on.
        batch_tokens: tokens that run at a time.
        n_weights: of all units, by which bits per weight are meant.
    """

    def __init__(
        self,
        context: Context,
        repairs: RecoverParams,
        text: Text | None,
        tokens: Tokens,
        *,
        batch_tokens: int,
        n_weights: int,
    ) -> None:
        self.context, self.repairs, self.text = context, repairs, text
        self.tokens, self.batch_tokens, self.n_weights = tokens, batch_tokens, n_weights
        self._known: dict[str, Recovered | None] = {}

    def __call__(self, allocation: Allocation) -> Recovered | None:
        """The allocation after the repair; None if it has nothing that the repair fits, which is told in the store."""
        if allocation.candidate not in self._known:
            self._known[allocation.candidate] = self._recovered(allocation)
        return self._known[allocation.candidate]

    def _recovered(self, allocation: Allocation) -> Recovered | None:
        from layerwise.stages.apply.written import write_model
        from layerwise.stages.recover.repairing import check_statistics, repaired

        context, candidate = self.context, allocation.candidate
        before = context.items / f"finalist-{candidate}"
        write = partial(write_model, workflow=context.model, database=context.input("database"), out=before)
        before.mkdir(exist_ok=True)
        context.executor.map(write, [allocation], note="models")
        check_statistics(context, before)
        of_candidate = replace(context, record=partial(self._record, candidate), progress=_quiet)
        try:
            after = repaired(of_candidate, self.repairs, before, self.text, f"{candidate}-")
        except UsageError as error:
            left = {"repair": self.repairs.name, "candidate": candidate, "status": "left", "error": str(error)}
            context.record("recovery", [left])
            return None
        units = _shared_units(before, after)
        factory = evaluator_factory(context, self.tokens, models=[after], batch_tokens=self.batch_tokens)
        with context.executor.replicas(factory) as pool:
            (measured,) = score(pool, Request(((1,) * units,), ("kl",)), workers=1, note=f"finalist {candidate}")
        (added,) = context.executor.map(partial(added_costs, after), [before], keys=[f"{candidate}-added"])
        return Recovered(measured["kl"]["mean"], added)

    def _record(self, candidate: str, table: str, rows: Sequence[Row]) -> None:
        self.context.record(table, [{**row, "candidate": candidate} for row in rows])


def _quiet(done: int, total: int, note: str) -> None:
    """The progress of the stage is that of its finalists."""


def _shared_units(before: Path, after: Path) -> int:
    """How many units two models name, which are the same for both."""
    from layerwise.stages.evaluate.model_levels import ModelLevels

    units = ModelLevels([after]).unit_names
    assert units == ModelLevels([before]).unit_names, "a repair makes no unit and loses none"
    return len(units)


ADDED = ("bytes", "effective_bits")
"""Resources of which a repair may take more."""


def added_costs(after: Path, before: Path) -> dict[str, float]:
    """What the levels of a model cost beyond those of another one, of `ADDED`."""
    from layerwise.stages.models.compressed import CompressedModel

    found = [
        [model.level(entry.unit.name).costs for entry in model.document.units if not entry.unit.is_parent]
        for model in (CompressedModel(after), CompressedModel(before))
    ]
    return {name: sum(one[name] for one in found[0]) - sum(one[name] for one in found[1]) for name in ADDED}


def best_recovered(finalists: Sequence[Allocation], recovery: Recovery) -> tuple[Allocation, dict[str, Any]]:
    """The finalist that is best once it is repaired, and what is known of the comparison, as columns of `allocations`.

    Args:
        finalists: of one budget, measured.
        recovery: repairs them. One that it does not fit counts as it is.
    """
    found = [recovery(finalist) for finalist in finalists]
    before = [_or_worst(finalist.kl) for finalist in finalists]
    after = [loss if one is None else _or_worst(one.kl) for loss, one in zip(before, found, strict=True)]
    best = min(range(len(finalists)), key=lambda number: (after[number], number))
    plain = min(range(len(finalists)), key=lambda number: (before[number], number))
    row: dict[str, Any] = {
        "finalists": len(finalists),
        "ranks_changed": changed_ranks(before, after),
        "unrepaired_kl": finalists[plain].kl,
        "unrepaired_bytes": finalists[plain].sizes["bytes"],
    }
    chosen, sizes = found[best], finalists[best].sizes
    if chosen is None:
        return finalists[best], row
    return replace(finalists[best], recovered_kl=chosen.kl), {
        **row,
        "repair": recovery.repairs.name,
        "recovered_kl": chosen.kl,
        "recovered_bytes": sizes["bytes"] + int(chosen.added["bytes"]),
        "recovered_effective_bits": sizes["effective_bits"] + chosen.added["effective_bits"] / recovery.n_weights,
    }


def _or_worst(kl: float | None) -> float:
    return math.inf if kl is None else kl


def changed_ranks(before: Sequence[float], after: Sequence[float]) -> int:
    """How many of some models have another rank by one loss than by another; among equals the first comes first."""
    orders = (sorted(range(len(losses)), key=losses.__getitem__) for losses in (before, after))
    return sum(one != other for one, other in zip(*orders, strict=True))
