"""What can be done to a run that somebody started or submitted: follow its log, stop it, run it from its own folder.

The results folder is all that it takes. The workflow file may be gone: `runs/<run>/workflow.yaml` means the same, and
it is checked that it still gives the same run. Whether a run is at work is for its lock to say in the end: of two who
resume it at once, the second is refused.
"""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from layerwise.errors import ClusterError, LayerwiseError, StoreError, UsageError
from layerwise.pipeline.cluster.jobs import Jobs
from layerwise.pipeline.cluster.liveness import Clusters
from layerwise.pipeline.cluster.submission import Submission, read_submission, submission_numbers
from layerwise.pipeline.consent import NotNamed, name_model, trusts_model
from layerwise.pipeline.display import Display
from layerwise.pipeline.runs.attempt import attempt_numbers, read_attempt
from layerwise.pipeline.runs.kept_workflow import kept_workflow
from layerwise.pipeline.runs.log import log_file
from layerwise.pipeline.runs.process import Process
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.runs.status import LIVE, RunState, attempt_status, run_state
from layerwise.pipeline.workflow import load_workflow
from layerwise.pipeline.workflow.report import suggest
from layerwise.results.links import open_plain
from layerwise.results.store import Store

SECONDS_BETWEEN_LOOKS = 0.2
"""How often a log is read that is being followed; a line or two behind is no matter to who reads along."""

SECONDS_BETWEEN_STORE_LOOKS = 2.0
"""How often the tables are asked about it; each time costs some milliseconds per attempt."""

SECONDS_OF_PATIENCE = 60.0
"""How long a cluster may be silent while a log is followed: a tunnel that is opened anew is no reason to give up."""


def resume_command(store: Store, run: str) -> str:
    """What to type to go on with a run."""
    return shlex.join(["layerwise", "resume", run, "--results", str(store.root)])


# --- stop ---


def stop(store: Store, run: str, timeout: float) -> RunState:
    """End a run in good order, as Ctrl-C in its window would; what is finished is kept. One that is stopped stays so.

    Args:
        store: where the run is.
        run: its id, the start of it, or the name of a workflow.
        timeout: how many seconds to wait for its end.
    Returns:
        How it stands at the end; `ok` or `failed` if it was faster.
    Raises:
        UsageError: it has ended otherwise or never begun, or its process is out of reach.
        ClusterError: the cluster that it was submitted to cannot be reached.
        LayerwiseError: it is still at work after that time.
    """
    state = run_state(store, run)
    if state.status == "stopped":
        return state
    if state.submission is not None and state.live:
        return _stop_job(store, state, state.submission, timeout)
    process = _running(store, state)
    try:
        os.kill(process.pid, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it ended this moment
    except PermissionError as error:
        raise UsageError(f"process {process.pid} of run {state.run} belongs to another user") from error
    until = time.monotonic() + timeout
    while process.alive():
        if time.monotonic() > until:
            raise LayerwiseError(
                f"process {process.pid} of run {state.run} was told to stop {timeout:.0f} s ago and is still there",
                hint="it may be within one long computation: look again with `layerwise status`, or kill the process; "
                "what is finished is kept either way",
            )
        time.sleep(0.05)
    return run_state(store, state.run)


def _stop_job(store: Store, state: RunState, submission: Submission, timeout: float) -> RunState:
    """End a submitted run by Ray's own means, which gives its driver half a minute to end in good order."""
    jobs, until = Jobs.recorded(submission.address, in_clear=submission.in_clear), time.monotonic() + timeout
    jobs.stop(submission.job)
    while True:
        job, state = jobs.find(submission.job), run_state(store, state.run)
        if (job is None or job.over) and not state.live:
            return state
        if time.monotonic() > until:
            raise LayerwiseError(
                f"job {submission.job} of run {state.run} was told to stop {timeout:.0f} s ago and is still there",
                hint="look again with `layerwise status`; what is finished is kept either way",
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _running(store: Store, state: RunState) -> Process:
    """The process of a run that is at work here."""
    again = resume_command(store, state.run)
    if state.status in ("ok", "failed"):
        hint = None if state.status == "ok" else f"to run it again: {again}"
        raise UsageError(f"run {state.run} is already finished ({state.status})", hint=hint)
    if state.status in ("interrupted", "not started"):
        why = "its process is gone" if state.attempt is not None else state.remark or "it has not been started"
        raise UsageError(f"run {state.run} is not at work: {why}", hint=f"to go on: {again}")
    if state.attempt is None or not state.checked:
        raise UsageError(
            f"run {state.run} is said to be at work on {state.host}, which cannot be reached from here",
            hint="stop it there, with the same command",
        )
    return state.attempt.process


# --- logs ---


def find_attempt(store: Store, run: str, number: int | None = None) -> int:
    """The number of an attempt at a run, by default the latest.

    Raises:
        UsageError: there is no such attempt.
    """
    folder = store.root / "runs" / run
    known = sorted({*attempt_numbers(folder), *submission_numbers(folder)})
    if number is None and known:
        return known[-1]
    if number not in known:
        raise UsageError(f"run {run} has no attempt {number or 1}", hint=f"it has {len(known)}")
    return number


def check_stage(state: RunState, stage: str) -> None:
    """Refuse the name of a stage that a run does not have; `search` stands for all of `search@a`, `search@b`."""
    known = [entry.stage for entry in state.stages]
    if stage not in {name for entry in known for name in (entry, entry.partition("@")[0])}:
        raise UsageError(f"run {state.run} has no stage '{stage}'{suggest(stage, known)}")


def read_log(store: Store, run: str, number: int, stage: str | None = None) -> Iterator[str]:
    """The lines of an attempt's log, without their line breaks.

    Args:
        store: where the run is.
        run: its id.
        number: of the attempt.
        stage: only lines about this stage, or about all of a `foreach` by its name.
    Raises:
        UsageError: there is no log.
    """
    path = log_file(store.root / "runs" / run, number)
    if path.is_file():
        lines, _ = _lines(path, 0)
    else:
        lines = _printed(store, run, number).splitlines()
        if not lines:
            raise UsageError(f"attempt {number} of run {run} left no log: {path} is missing")
    return (line for line in lines if _about(line, stage))


def follow_log(store: Store, run: str, number: int, stage: str | None = None) -> Iterator[str]:
    """The same lines, and those that follow, until the attempt has ended; `attempt_status` then says how.

    Raises:
        ClusterError: only its cluster can say whether it goes on, and it has not answered for a while.
    """
    path, clusters = log_file(store.root / "runs" / run, number), Clusters()
    position, next_look, silent_since = 0, 0.0, None
    while True:
        attempt = read_attempt(store.root / "runs" / run, number)
        ended = attempt is not None and attempt.process.alive() is False
        if not ended and time.monotonic() >= next_look:
            try:
                ended, silent_since = attempt_status(store, run, number, clusters) not in LIVE, None
            except NotNamed:
                raise
            except ClusterError:
                clusters.forget()
                silent_since = time.monotonic() if silent_since is None else silent_since
                if time.monotonic() - silent_since > SECONDS_OF_PATIENCE:
                    raise
            next_look = time.monotonic() + SECONDS_BETWEEN_STORE_LOOKS
        lines, position = _lines(path, position)  # after the look, so that the last line is not missed
        yield from (line for line in lines if _about(line, stage))
        if ended:
            if position == 0:
                yield from (line for line in _printed(store, run, number).splitlines() if _about(line, stage))
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _printed(store: Store, run: str, number: int) -> str:
    """What the job of an attempt has printed, which is all there is of one that ended before its run began."""
    submission = read_submission(store.root / "runs" / run, number)
    return (
        ""
        if submission is None
        else Jobs.recorded(submission.address, in_clear=submission.in_clear).log(submission.job)
    )


def _lines(path: Path, position: int) -> tuple[list[str], int]:
    """The whole lines from a position on, and where they end."""
    try:
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
            file.seek(position)
            text = file.read()
    except FileNotFoundError:
        return [], position
    whole = text[: text.rfind(b"\n") + 1]
    return whole.decode(errors="replace").split("\n")[:-1], position + len(whole)


def _about(line: str, stage: str | None) -> bool:
    if stage is None:
        return True
    _, _, rest = line.partition(" ")
    name = rest.partition(" ")[0]
    return name == f"[{stage}]" or name.startswith(f"[{stage}@")


# --- resume ---


def reopen(store: Store, state: RunState, display: Display, trust: bool = False) -> Run:
    """A run as its folder has it, to be executed with `wait=False`.

    Args:
        store: where the run is.
        state: how it stands.
        display: is told what happens.
        trust: the user lets code of the run's model run, as the run's workflow asks.
    Raises:
        StoreError: it is at work.
        UsageError: an older layerwise made it, its model or texts have changed, or it wants to run code of a model that
            the user has not named as one that he trusts.
        WorkflowError: its model or texts are no longer there.
    """
    if state.live and state.checked:
        where = "" if state.attempt is None else f", in process {state.attempt.process.pid}"
        if state.submission is not None:
            where = f", as job {state.submission.job} at {state.submission.address}"
        raise StoreError(
            f"run {state.run} is at work{where}", hint="`layerwise logs -f` follows it, `layerwise stop` ends it"
        )
    if state.live:
        display.note(f"{state.host} cannot be asked whether it still runs {state.run}; its lock will say")
    path = kept_workflow(store, state.run)
    workflow = load_workflow(path)
    if trust and workflow.model.trust:
        name_model(workflow.model.name)
    if workflow.model.trust and not trusts_model(workflow.model.name):
        raise UsageError(
            f"run {state.run} lets the model {workflow.model.name} run code of its own, and only its folder says so",
            hint=f"read that code; then, if you trust it: {resume_command(store, state.run)} --trust",
        )
    run = Run(workflow, store.root, display)
    if run.id != state.run:
        raise UsageError(
            f"the model, a text or layerwise has changed since: this would be another run, {run.id}",
            hint=f"put the files back, or start that run: layerwise run {path} --results {store.root}",
        )
    return run
