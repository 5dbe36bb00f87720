"""What happened in the results folder: its runs, the stages of one run, one allocation in detail.

A run owns the rows of every stage it went through, whether it computed the stage or found it in the cache. So rows are
looked up by stage key: the `stages` table says which keys a run went through, and any run may have written the rows.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerwise.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

    from layerwise.results.store import Store

_RUN_COLUMNS = ["name", "status", "started_at", "ended_at", "seconds", "executor", "layerwise_version", "error"]


def runs_table(store: Store) -> pd.DataFrame:
    """One row per run as it stands now, the newest first.

    Returns:
        The columns `run`, name, status, started_at, ended_at, seconds, executor, layerwise_version, error. A run that
        was killed still says `running`: nobody was left to write otherwise, and `layerwise status` finds out.
    """
    import pandas as pd

    rows = [{"run": row["run_id"], **{name: row[name] for name in _RUN_COLUMNS}} for row in latest_runs(store)]
    return pd.DataFrame(rows, columns=["run", *_RUN_COLUMNS])


def find_run(store: Store, run: str | None = None, more: Iterable[dict[str, Any]] = ()) -> str:
    """The id of a run.

    Args:
        store: where to look.
        run: its id, the start of it, or the name of a workflow (its newest run); None for the newest of all.
        more: run_id, name and written_at of runs that have left no row yet.
    Raises:
        UsageError: there is no such run, or several start like this.
    """
    rows = sorted([*latest_runs(store), *more], key=lambda row: row["written_at"], reverse=True)
    known = [str(row["run_id"]) for row in rows]
    if not known:
        raise UsageError(f"{store.root} holds no run yet", hint="run a workflow first")
    if run is None:
        return known[0]
    if run in known:
        return run
    named = [str(row["run_id"]) for row in rows if row["name"] == run]
    if named:
        return named[0]
    near = difflib.get_close_matches(run, known, n=3, cutoff=0.3)
    hint = f"the nearest: {', '.join(near)}" if near else f"the newest is {known[0]}"
    return _only([name for name in known if name.startswith(run)], f"run {run!r}", hint)


def latest_runs(store: Store) -> list[dict[str, Any]]:
    """The latest `runs` row of every run, the newest run first."""
    from layerwise.results.store import is_run_id

    rows = (row for row in store.rows("runs") if is_run_id(row["run_id"]))
    latest = {row["run_id"]: row for row in rows}  # in order, so the last one stays
    return sorted(latest.values(), key=lambda row: row["written_at"], reverse=True)


def latest_stages(store: Store, run: str) -> dict[str, dict[str, Any]]:
    """The latest `stages` row of every stage of a run, by the stage's name."""
    return {row["stage"]: row for row in store.rows("stages", run=run)}  # in order, so the last one stays


@dataclass(frozen=True)
class AllocationDetails:
    """One allocation in full.

    Args:
        summary: its row of `allocations` without the lists, with `run` and `stage` first.
        units: one row per unit: unit, level, bits, effective_bits, size_bytes, weight_nmse, output_error. NULL where
            the run recorded no such level, or several different ones of that name.
        metrics: what was measured of it in any run: run, source, data, metric, value, stderr, n_tokens, status.
    """

    summary: dict[str, Any]
    units: pd.DataFrame
    metrics: pd.DataFrame


def show_allocation(store: Store, candidate: str) -> AllocationDetails:
    """Everything that is known of one allocation.

    Args:
        store: where to look.
        candidate: its id or the start of it. Found by several runs, it is shown as the newest of them found it.
    Raises:
        UsageError: there is no such allocation, or several start like this.
    """
    found = [row for row in store.rows("allocations") if row["candidate"].startswith(candidate)]
    ids = list(dict.fromkeys(row["candidate"] for row in found))
    full_id = _only(ids, f"allocation {candidate!r}", "`layerwise frontier` lists them")
    row = max((row for row in found if row["candidate"] == full_id), key=lambda row: row["written_at"])
    lists = {"genome", "units", "levels"}
    shown = {"candidate": full_id, "run": row["run_id"], "stage": row["stage"]}
    hidden = {*shown, *lists, "run_id", "stage_key", "attempt", "seq", "schema_version"}
    return AllocationDetails(
        summary={**shown, **{name: value for name, value in row.items() if name not in hidden}},
        units=_units(store, row),
        metrics=_metrics(store, full_id),
    )


def _units(store: Store, allocation: dict[str, Any]) -> pd.DataFrame:
    import pandas as pd

    measured = ["bits", "effective_bits", "size_bytes", "weight_nmse", "output_error"]
    keys = _database_keys(store, allocation)
    levels = store.read("levels", stage_key=keys, columns=["unit", "level", *measured]).drop_duplicates()
    levels = levels[~levels.duplicated(["unit", "level"], keep=False)]
    chosen = pd.DataFrame({"unit": allocation["units"] or [], "level": allocation["levels"] or []}, dtype="str")
    return chosen.merge(levels, on=["unit", "level"], how="left")


def _database_keys(store: Store, allocation: dict[str, Any]) -> list[str]:
    """Keys of the stage that made the levels of an allocation; of all stages of the run where that cannot be told."""
    stages = latest_stages(store, allocation["run_id"])
    runs = store.rows("runs", run=allocation["run_id"])
    resolved = json.loads(runs[-1]["resolved"]) if runs and runs[-1]["resolved"] else {}
    made = resolved.get("stages", {}).get(allocation["stage"], {}).get("inputs", {}).get("database")
    return stage_keys([stages[made]] if made in stages else stages.values())


def _metrics(store: Store, candidate: str) -> pd.DataFrame:
    columns = ["source", "data", "metric", "value", "stderr", "n_tokens", "status"]
    metrics = store.read("metrics", columns=["run_id", "candidate", *columns]).rename(columns={"run_id": "run"})
    return metrics.loc[metrics["candidate"] == candidate, ["run", *columns]].reset_index(drop=True)


def stage_keys(stages: Iterable[dict[str, Any]]) -> list[str]:
    """The keys of some `stages` rows, each once; a stage that never got one is left out."""
    return list(dict.fromkeys(row["stage_key"] for row in stages if row["stage_key"] is not None))


def _only(found: list[str], asked: str, hint: str) -> str:
    if not found:
        raise UsageError(f"there is no {asked}", hint=hint)
    if len(found) > 1:
        raise UsageError(f"{asked} is ambiguous: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}")
    return found[0]
