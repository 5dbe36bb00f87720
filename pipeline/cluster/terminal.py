"""What a terminal shows of a run that was handed to a cluster: how it gets there, how to follow it, how to go on.

stdout gets what a script may want, the ids and the log; stderr gets the story. Ctrl-C ends the showing, not the run.
"""

from __future__ import annotations

import shlex
import sys

from layerwise.pipeline.cluster.handover import Options, await_start, is_finished, submit
from layerwise.pipeline.runs.lifecycle import follow_log, resume_command
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.runs.status import RunState, attempt_status, run_state
from layerwise.results.runs import latest_stages
from layerwise.results.store import Store

ENDS = {"ok": 0, "failed": 1, "stopped": 3, "interrupted": 3}
"""Exit code of who followed a run to its end, by how it ended."""

LEFT = 130
"""Exit code of who stopped following, as shells have it after Ctrl-C."""


def hand_over(run: Run, options: Options, wait: bool) -> int | None:
    """Submit a run, say how to follow it, and follow it if asked to.

    Args:
        run: what to submit.
        options: how.
        wait: to the end of the run, with its log on stdout.
    Returns:
        The exit code; None if the run is finished, and there was nothing to submit.
    Raises:
        LayerwiseError: as `handover.submit` and `handover.await_start`.
    """
    if is_finished(run):
        return None
    submission, made = submit(run, options, _tell)
    if not made:
        _tell(f"run {run.id} is at work already, as job {submission.job} at {submission.address}")
    print(f"run: {run.id}\njob: {submission.job}", flush=True)
    _print_how_to_follow(run)
    try:
        begun = await_start(run, submission, _tell)
        if wait:
            return print_log_to_its_end(run.store, run.id, submission.number)
    except KeyboardInterrupt:
        _tell(f"\nrun {run.id} goes on without this window")
        _print_how_to_follow(run)
        return LEFT
    stands = run_state(run.store, run.id).status if begun else "pending, it begins when the cluster is ready"
    _tell(f"run {run.id}: {stands}")
    return 0


def print_log_to_its_end(store: Store, run: str, number: int, stage: str | None = None) -> int:
    """Print the log of an attempt until it ends.

    Args:
        store: where the run is.
        run: its id.
        number: of the attempt.
        stage: only lines about this stage.
    Returns:
        The exit code that says how it ended.
    """
    for line in follow_log(store, run, number, stage):
        print(line, flush=True)
    ended = attempt_status(store, run, number)
    if ended != "ok":
        _tell(f"run {run}: {ended}; to go on: {resume_command(store, run)}")
    elif any(row["uses"] == "allocate" for row in latest_stages(store, run).values()):
        _tell(shlex.join(["layerwise", "frontier", run, "--results", str(store.root)]))
    return ENDS[ended]


def print_how_to_go_on(store: Store, state: RunState) -> None:
    """What there is to say of a run that has not ended well, or of which nobody knows."""
    if state.remark is not None:
        _tell(f"run {state.run}: {state.remark}")
    if state.status in ("stopped", "interrupted", "failed"):
        _tell(f"run {state.run}: {state.status}; to go on: {resume_command(store, state.run)}")
    elif state.live and not state.checked and state.submission is not None:
        _tell(f"if that cluster is gone: {resume_command(store, state.run)} --address URL of another one")


def _print_how_to_follow(run: Run) -> None:
    for command in (["logs", "-f"], ["status"], ["stop"]):
        _tell("  " + shlex.join(["layerwise", *command, run.id, "--results", str(run.store.root)]))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
