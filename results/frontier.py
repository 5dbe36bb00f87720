"""The Pareto frontier: which allocations no other one beats, and where giving more bits stops paying.

`frontier_table` brings a run's allocations together with what was measured of them on held-out text; the geometry is
that of `layerwise.solvers.pareto`. Left out: fronts over more than one cost at a time.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from layerwise.errors import UsageError
from layerwise.results.resources import RESOURCES
from layerwise.results.runs import find_run, latest_stages, stage_keys
from layerwise.solvers.pareto import knee, non_dominated

if TYPE_CHECKING:
    import pandas as pd

    from layerwise.results.store import Store

Cost = str
"""A name of `layerwise.results.resources.RESOURCES`."""

Loss = Literal["heldout_kl", "kl", "heldout_perplexity", "heldout_accuracy"]

HELDOUT: Mapping[str, str] = {
    "heldout_kl": "kl",
    "heldout_perplexity": "perplexity",
    "heldout_accuracy": "accuracy",
}
"""Columns of `frontier_table` that come from the `metrics` table, with the metric's name there."""

GREATER_IS_BETTER = frozenset({"heldout_accuracy"})
"""Losses that are none: of these the greater is the better."""

_UNREPAIRED = {"allocate", "apply"}
"""Stages whose model is the allocation itself; behind any other, a recovery say, it has been changed."""

RECOVERED = {
    "repair": "object",
    "recovered_kl": "float64",
    "recovered_bytes": "Int64",
    "recovered_effective_bits": "float64",
    "unrepaired_kl": "float64",
    "unrepaired_bytes": "Int64",
    "finalists": "Int64",
    "ranks_changed": "Int64",
}
"""Columns of allocations that were compared after a repair, and their types in a frame. `unrepaired` is the finalist
that is best without."""

_MISSING = {
    True: "a run of an earlier layerwise has none; run the workflow again",
    False: "add a `latency` stage to what `allocate` needs",
}
"""What to do about a cost that no allocation has, by whether levels alone tell it."""

COLUMNS = [
    "run",
    "stage",
    "solver",
    "budget",
    *RESOURCES,
    "metric",
    "kl",
    *RECOVERED,
    *HELDOUT,
    "heldout_data",
    "ranked_by",
    "on_front",
    "knee",
    "candidate",
]
"""Columns of `frontier_table`."""

_TYPES = {**RECOVERED, **dict.fromkeys(("kl", *HELDOUT), "float64")} | {
    name: "Int64" if resource.type == "int64" else "float64" for name, resource in RESOURCES.items()
}


def frontier_table(
    store: Store,
    run: str | None = None,
    *,
    over: Cost = "bits",
    loss: Loss | None = None,
    stage: str | None = None,
    solver: str | None = None,
    data: str | None = None,
    dominated: bool = False,
) -> pd.DataFrame:
    """The frontier of a run's allocations.

    Args:
        store: where the results are.
        run: a run's id or the start of it; None for the newest run.
        over: the cost on one axis. Allocations without it are off the front.
        loss: the loss on the other. By default `heldout_kl` if every allocation has it, else `kl`, for a front must not
            mix two measures. Asked for by name, allocations without it are off the front; if none has it, `kl` is used.
        stage: only allocations of this stage of the run; of all its instances, if it has `foreach`.
        solver: only allocations by this solver.
        data: held-out text by name; by default the one that most was measured on.
        dominated: also give the allocations that are not on the front.
    Returns:
        The columns `COLUMNS`, by rising cost. `ranked_by` names the loss that was used, `metric` what `kl` measured in
        the search. Held-out figures are those of the allocation itself, not of a model repaired afterwards; what a
        repair won back on the search data stands in the columns `RECOVERED`.
    Raises:
        UsageError: no such cost, no such run, no such stage in it, no allocation (of that solver) yet, or none with
            that cost.
    """
    import pandas as pd

    if over not in RESOURCES:
        raise UsageError(f"there is no cost {over!r}", hint=f"there are {', '.join(RESOURCES)}")
    run = find_run(store, run)
    stages = latest_stages(store, run)
    names = {row["stage_key"]: name for name, row in stages.items() if stage in (None, name, name.split("@")[0])}
    if not names and stage is not None:
        raise UsageError(f"run {run} has no stage {stage!r}", hint=f"it has {', '.join(stages)}")
    heldout = _Heldout(store, stages, data)
    records = [
        {
            **{column: row[column] for column in ("solver", "budget", "metric", "kl", "candidate", *RESOURCES)},
            **{column: row.get(column) for column in RECOVERED},
            **{column: heldout.value(row, metric) for column, metric in HELDOUT.items()},
            "run": run,
            "stage": names[row["stage_key"]],
            "heldout_data": heldout.data,
        }
        for row in store.rows("allocations", stage_key=stage_keys(stages.values()))
        if row["stage_key"] in names and solver in (None, row["solver"])
    ]
    if not records:
        raise _nothing_yet(store, run, stages, stage, solver)
    frame = pd.DataFrame(records, columns=COLUMNS).astype(_TYPES)
    if frame[over].isna().all():
        what = "milliseconds" if over == "ms" else over
        raise UsageError(
            f"run {run} has no {what}: no allocation of it has any",
            hint=f"{_MISSING[RESOURCES[over].of_levels]}, or choose another cost with --over",
        )
    ranked_by = _ranked_by(frame, loss)
    frame["ranked_by"] = ranked_by
    sign = -1.0 if ranked_by in GREATER_IS_BETTER else 1.0
    points = frame[[over, ranked_by]].to_numpy(dtype=np.float64, na_value=np.nan) * [1.0, sign]
    frame["on_front"] = non_dominated(points)
    front = frame[frame["on_front"]]
    bend = knee(front[over], sign * front[ranked_by])
    frame["knee"] = False if bend is None else frame.index == front.index[bend]
    shown = frame if dominated else frame[frame["on_front"]]
    return shown.sort_values([over, ranked_by, "candidate"], ascending=[True, sign > 0, True], ignore_index=True)


def after_repair(frame: pd.DataFrame) -> tuple[int, int]:
    """Whether the frontier after a repair lies at or below the one before, at equal bytes.

    Args:
        frame: from `frontier_table`, its dominated allocations included.
    Returns:
        of all sizes of a repaired allocation, at how many the best repaired one that is no larger has at most the KL of
        the best unrepaired one that is no larger; and how many sizes there are. What was chosen for being repaired is
        compared with what would have been chosen without.
    """
    made = frame[frame["recovered_kl"].notna()]
    sizes = sorted(set(made["recovered_bytes"]))

    def least(losses: pd.Series, costs: pd.Series, size: int) -> float:
        within = losses[costs <= size]
        return float(within.min()) if len(within) else float("inf")

    kept = [
        least(made["recovered_kl"], made["recovered_bytes"], size)
        <= least(made["unrepaired_kl"], made["unrepaired_bytes"], size)
        for size in sizes
    ]
    return sum(kept), len(sizes)


def dense_losses(store: Store, run: str | None = None, *, data: str | None = None) -> dict[str, float]:
    """What the dense model itself scores on the held-out text, to be drawn beside a frontier.

    Args:
        store: where the results are.
        run: a run's id or the start of it; None for the newest run.
        data: held-out text by name; by default as in `frontier_table`.
    Returns:
        By loss column (`heldout_perplexity`, ...); only what was measured.
    Raises:
        UsageError: no such run.
    """
    heldout = _Heldout(store, latest_stages(store, find_run(store, run)), data)
    values = {column: heldout.dense.get(metric) for column, metric in HELDOUT.items()}
    return {column: value for column, value in values.items() if value is not None}


def _nothing_yet(
    store: Store, run: str, stages: Mapping[str, dict[str, Any]], stage: str | None, solver: str | None
) -> UsageError:
    """Why there is nothing that could be on a front."""
    if solver is not None:
        keys = stage_keys(row for row in stages.values() if row["uses"] == "allocate")
        known = {row["solver"] for row in store.rows("allocations", stage_key=keys)}
        if known:
            where = "" if stage is None else f" in stage {stage}"
            return UsageError(
                f"run {run} has no candidates of solver {solver!r}{where}", f"it has {', '.join(sorted(known))}"
            )
    ended = [f"stage {name} {row['status']}" for name, row in stages.items() if row["status"] != "ok"]
    if stage is not None and not ended:
        return UsageError(
            f"stage {stage} of run {run} has no candidates", "those of an `allocate` stage are on a frontier"
        )
    why = f": {', '.join(ended)}" if ended else ""
    look = shlex.join(["layerwise", "status", run, "--results", str(store.root)])
    return UsageError(f"run {run} has no candidates yet{why}", f"see how it stands: {look}")


def _ranked_by(frame: pd.DataFrame, loss: Loss | None) -> Loss:
    if loss is None:
        comparable = frame.loc[frame["kl"].notna(), "heldout_kl"]
        return "heldout_kl" if len(comparable) and comparable.notna().all() else "kl"
    if len(frame) and frame[loss].isna().all():
        raise UsageError(
            f"no allocation of this run has {loss}",
            hint="add an `evaluate` stage to the workflow, or say --loss kl",
        )
    return loss


class _Heldout:
    """Held-out figures of one run, on one text.

    A figure is found by the candidate's id. Two allocate stages may come to the same id from different databases, so a
    figure whose source is the very stage of the allocation is preferred.
    """

    def __init__(self, store: Store, stages: Mapping[str, dict[str, Any]], data: str | None) -> None:
        evaluations = [row for row in stages.values() if row["uses"] == "evaluate"]
        rows = [row for row in store.rows("metrics", stage_key=stage_keys(evaluations)) if row["value"] is not None]
        texts = Counter(row["data"] for row in rows)
        self.data = data if data is not None or not texts else texts.most_common(1)[0][0]
        self.dense: dict[str, float] = {}
        self._of_stage: dict[tuple[str, str, str], float] = {}
        self._of_candidate: dict[tuple[str, str], float] = {}
        # A source is named as in the run that measured it, which may be an earlier run with other names.
        sources = {run: latest_stages(store, run) for run in {row["run_id"] for row in rows}}
        for row in rows:
            if row["data"] != self.data:
                continue
            candidate, metric, value = row["candidate"], row["metric"], row["value"]
            source = sources[row["run_id"]].get(row["source"])
            if candidate == "dense":
                self.dense[metric] = value
            elif source is None or source["uses"] in _UNREPAIRED:
                self._of_candidate[candidate, metric] = value
                if source is not None:
                    self._of_stage[source["stage_key"], candidate, metric] = value

    def value(self, allocation: Mapping[str, Any], metric: str) -> float | None:
        """The figure of an allocation, None if it was not measured."""
        candidate = allocation["candidate"]
        exact = self._of_stage.get((allocation["stage_key"], candidate, metric))
        return self._of_candidate.get((candidate, metric)) if exact is None else exact
