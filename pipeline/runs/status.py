"""How the runs of a results folder stand: finished, at work, stopped, or interrupted by the death of their process.

The tables say what was done and how each attempt ended. A run that was killed could not write its end, so of a run that
seems to be at work the process is asked whether it lives, by its id and its start, which only its own host can answer.
Of an attempt that was submitted to a cluster, Ray is asked where that answers nothing (`liveness.py`): before the job
has begun, and from another host. How far the present stage is comes from `progress.json`; losing that file costs a
number on the screen.

Left out: asking other hosts about what was not submitted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from layerwise.pipeline.cluster.liveness import Clusters, Verdict, judge
from layerwise.pipeline.cluster.submission import Submission, read_submission
from layerwise.pipeline.display import clock, left
from layerwise.pipeline.runs.attempt import Attempt, attempt_numbers, last_number, read_attempt
from layerwise.pipeline.runs.kept_workflow import WORKFLOW, read_kept
from layerwise.pipeline.runs.log import Progress, read_progress
from layerwise.results.runs import find_run, latest_runs, latest_stages, runs_table
from layerwise.results.store import Store, is_run_id

if TYPE_CHECKING:
    import pandas as pd

LIVE = ("running", "pending")
"""The states of what has not ended, as far as is known."""

_STAGE_COLUMNS = ["run_id", "stage", "uses", "cache", "reason", "status", "items_total", "seconds", "error", "attempt"]


@dataclass(frozen=True)
class StageState:
    """How one stage of a run stands.

    Args:
        status: `ok`; `cached`, made by another run; `running`, `failed`, `stopped`, `interrupted`; `waiting` for its
            turn in a run at work, `not started` in any other.
        done: items that are done, of `total`; while the stage is at work, those of its present step.
        note: what the step counts.
        seconds: what it took, or how long it has been at work.
        remaining_seconds: of the present step.
        reason: why it had to be made.
    """

    stage: str
    uses: str
    status: str
    done: int | None = None
    total: int | None = None
    note: str = ""
    seconds: float | None = None
    remaining_seconds: float | None = None
    reason: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class RunState:
    """How a run stands.

    Args:
        status: `running`, `ok`, `failed`, `stopped`, or `interrupted`: its process ended without a word. `pending`: it
            was submitted, and its job has not begun. `not started`: only its folder is there.
        number: of the latest attempt.
        attempt: the record of it; None if it has not begun, or an older layerwise made it.
        submission: of the latest attempt, if it was submitted to a cluster.
        checked: False where the run is said to be at work and nobody here can know.
        seconds: from start to end, or so far; None where nobody knows the end.
        stages: in the order in which they run.
        remark: what Ray says that the status does not.
    """

    run: str
    name: str
    status: str
    number: int
    attempt: Attempt | None
    checked: bool
    executor: str
    started_at: datetime
    seconds: float | None
    error: str | None
    stages: tuple[StageState, ...]
    submission: Submission | None = None
    remark: str | None = None

    @property
    def live(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return self.status in LIVE

    @property
    def host(self) -> str:
        """Where the latest attempt was made, or was to be made."""
        if self.attempt is not None:
            return self.attempt.process.host
        return "an unknown host" if self.submission is None else self.submission.address

    @property
    def where(self) -> str:
        """The host, and whether it could not be asked."""
        return self.host if self.checked else f"{self.host} (not checked)"

    @property
    def present(self) -> StageState | None:
        """The stage at work, or the one that was when the run ended badly."""
        return next((s for s in self.stages if s.status in ("running", "failed", "stopped", "interrupted")), None)


def run_states(store: Store) -> list[RunState]:
    """Every run, the newest first."""
    stages: dict[str, dict[str, dict[str, Any]]] = {}
    for row in store.rows("stages", columns=_STAGE_COLUMNS):  # in order, so the last one of a stage stays
        stages.setdefault(row["run_id"], {})[row["stage"]] = row
    clusters = Clusters()
    rows = latest_runs(store)
    rows = sorted([*rows, *_without_rows(store, rows)], key=lambda row: row["written_at"], reverse=True)
    return [_run_state(store, row, stages.get(row["run_id"], {}), clusters, thorough=False) for row in rows]


def run_state(store: Store, run: str | None) -> RunState:
    """One run.

    Args:
        store: where to look.
        run: its id, the start of it, or the name of a workflow (its newest run); None for the newest of all.
    Raises:
        UsageError: there is no such run, or several start like this.
    """
    found = find_run(store, run, _without_rows(store, latest_runs(store)))

    def look() -> RunState:
        rows = store.rows("runs", run=found) or _without_rows(store, ())
        row = next(row for row in reversed(rows) if row["run_id"] == found)
        return _run_state(store, row, latest_stages(store, found), Clusters(), thorough=True)

    state = look()
    return state if state.live else look()  # as in `attempt_status`


def attempt_status(store: Store, run: str, number: int, clusters: Clusters | None = None) -> str:
    """How one attempt at a run stands, in the words of `RunState.status`.

    Args:
        store: where to look.
        run: its id.
        number: of the attempt.
        clusters: to ask.
    Raises:
        ClusterError: only the cluster that it was submitted to can say, and it cannot be asked.
    """
    folder = store.root / "runs" / run

    def look() -> Verdict:
        rows = store.rows("runs", run=run, columns=["status", "attempt"])
        statuses = [str(row["status"]) for row in rows if row["attempt"] == number]
        later = max(attempt_numbers(folder), default=0) > number
        attempt, submission = read_attempt(folder, number), read_submission(folder, number)
        return judge(statuses[-1] if statuses else None, attempt, submission, clusters or Clusters(), over=later)

    verdict = look()
    if verdict.status not in LIVE:
        verdict = look()  # it may have written its end after it was read, and ended before it was asked
    if verdict.failure is not None:
        raise verdict.failure
    return verdict.status


def checked_runs_table(store: Store) -> pd.DataFrame:
    """`results.runs.runs_table` with the status that holds, where that of the tables is the last word of the dead."""
    frame, states = runs_table(store), {state.run: state for state in run_states(store)}
    known = zip(frame["run"], frame["status"], strict=True)
    frame["status"] = [states[run].status if run in states else status for run, status in known]
    return frame


def _without_rows(store: Store, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As rows of `runs`, those runs whose folder is there and which have left no row: their job has not begun yet."""
    known = {row["run_id"] for row in rows}
    found: list[dict[str, Any]] = []
    for path in (store.root / "runs").glob(f"*/{WORKFLOW}"):
        if path.parent.name in known or not is_run_id(path.parent.name):
            continue
        workflow = read_kept(path)
        if workflow is None:
            continue
        at = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        found.append(
            {
                "run_id": path.parent.name,
                "name": workflow["name"],
                "attempt": 0,
                "status": None,
                "executor": "ray",
                "resolved": json.dumps(workflow),
                **dict.fromkeys(("started_at", "written_at"), at),
                **dict.fromkeys(("seconds", "error")),
            }
        )
    return found


def _run_state(
    store: Store, row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], clusters: Clusters, thorough: bool
) -> RunState:
    folder = store.root / "runs" / row["run_id"]
    number = max(row["attempt"], last_number(folder))
    attempt, submission = read_attempt(folder, number), read_submission(folder, number)
    begun = number == row["attempt"]  # else it was submitted, and has written no row
    verdict = judge(row["status"] if begun else None, attempt, submission, clusters, thorough=thorough)
    progress = read_progress(folder)
    if progress is not None and progress.attempt != number:
        progress = None
    now = datetime.now(UTC)
    started = row["started_at"] if begun or submission is None else submission.submitted_at
    return RunState(
        run=row["run_id"],
        name=row["name"],
        status=verdict.status,
        number=number,
        attempt=attempt,
        checked=verdict.checked,
        executor=row["executor"] if begun else "ray",
        started_at=started,
        seconds=(now - started).total_seconds() if verdict.status == "running" else row["seconds"] if begun else None,
        error=row["error"] if begun else verdict.error,
        stages=tuple(
            _stage_state(stage, entry["uses"], rows.get(stage), verdict.status, number, progress, now)
            for stage, entry in json.loads(row["resolved"])["stages"].items()
        ),
        submission=submission,
        remark=verdict.remark,
    )


def _stage_state(
    stage: str,
    uses: str,
    row: Mapping[str, Any] | None,
    run_status: str,
    attempt: int,
    progress: Progress | None,
    now: datetime,
) -> StageState:
    told = progress if progress is not None and progress.stage == stage else None
    written = row is not None and row["attempt"] == attempt
    if told is not None and not written and run_status in ("running", "interrupted"):
        going = run_status == "running"
        began = datetime.fromisoformat(told.started_at)
        return StageState(
            stage,
            uses,
            run_status,
            told.done,
            told.total,
            told.note,
            seconds=(now - began).total_seconds() if going else None,
            remaining_seconds=told.remaining_seconds if going else None,
            reason=told.reason,
        )
    if row is not None and row["status"] == "ok":
        items = row["items_total"] or None
        status = "cached" if row["cache"] == "hit" else "ok"
        return StageState(stage, uses, status, items, items, seconds=row["seconds"], reason=row["reason"])
    if row is not None and written:
        place = (None, None, "") if told is None else (told.done, told.total, told.note)
        tail = {"seconds": row["seconds"], "reason": row["reason"], "error": row["error"]}
        return StageState(stage, uses, row["status"], *place, **tail)
    return StageState(stage, uses, "waiting" if run_status in ("running", "pending") else "not started")


# --- tables ---


def runs_status_table(states: Sequence[RunState], readable: bool = False) -> pd.DataFrame:
    """One row per run.

    Args:
        states: the runs.
        readable: fewer columns, put into words; else one for each fact.
    """
    import pandas as pd

    rows = [_readable_run(state) if readable else _run_facts(state) for state in states]
    return pd.DataFrame(rows, dtype=object)


def _run_facts(state: RunState) -> dict[str, Any]:
    """A run in plain values, without its stages."""
    present, process = state.present, None if state.attempt is None else state.attempt.process
    return {
        "run": state.run,
        "name": state.name,
        "status": state.status,
        "stages_done": _done(state),
        "stages_total": len(state.stages),
        "stage": None if present is None else present.stage,
        "done": None if present is None else present.done,
        "total": None if present is None else present.total,
        "remaining_seconds": None if present is None else present.remaining_seconds,
        "attempt": state.number,
        "executor": state.executor,
        "host": None if process is None else process.host,
        "pid": None if process is None else process.pid,
        "checked": state.checked,
        "job": None if state.submission is None else state.submission.job,
        "address": None if state.submission is None else state.submission.address,
        "remark": state.remark,
        "started_at": state.started_at,
        "seconds": state.seconds,
        "error": state.error,
    }


def stages_status_table(state: RunState, readable: bool = False) -> pd.DataFrame:
    """One row per stage of a run.

    Args:
        state: the run.
        readable: fewer columns, put into words; else one for each fact.
    """
    import pandas as pd

    return pd.DataFrame([_readable_stage(stage) if readable else asdict(stage) for stage in state.stages], dtype=object)


def _readable_run(state: RunState) -> dict[str, Any]:
    present = state.present
    return {
        "run": state.run,
        "status": state.status,
        "stages": f"{_done(state)}/{len(state.stages)}",
        "stage": "" if present is None else f"{present.stage} {_items(present)}".strip(),
        "started": state.started_at,
        "time": None if state.seconds is None else clock(state.seconds),
        "where": state.where,
    }


def _readable_stage(state: StageState) -> dict[str, Any]:
    return {
        "stage": state.stage,
        "status": state.status,
        "items": _items(state),
        "time": None if state.seconds is None else clock(state.seconds),
        "reason": _why(state),
    }


def _why(state: StageState) -> str | None:
    """What is worth reading of a stage: its error, or why it must be made until it is."""
    if state.error:
        return state.error.splitlines()[0]
    return None if state.status in ("ok", "cached") else state.reason


def _items(state: StageState) -> str:
    if state.total is None:
        return ""
    return f"{state.done}/{state.total} {state.note}".strip() + left(state.remaining_seconds)


def _done(state: RunState) -> int:
    return sum(stage.status in ("ok", "cached") for stage in state.stages)
