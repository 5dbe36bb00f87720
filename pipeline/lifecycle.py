"""What can be done to a run that somebody started: follow its log, stop it, run it again from its own folder.

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

from layerwise.errors import LayerwiseError, StoreError, UsageError
from layerwise.pipeline.attempt import attempt_numbers, read_attempt
from layerwise.pipeline.display import Display
from layerwise.pipeline.process import Process
from layerwise.pipeline.run import WORKFLOW, Run
from layerwise.pipeline.runlog import log_file
from layerwise.pipeline.status import RunState, attempt_status, run_state
from layerwise.pipeline.workflow import load_workflow
from layerwise.results.store import Store
from layerwise.stages.registry import nearest

SECONDS_BETWEEN_LOOKS = 0.2
"""How often a log is read that is being followed; a line or two behind is no matter to who reads along."""

SECONDS_BETWEEN_STORE_LOOKS = 2.0
"""How often the tables are asked about it; each time costs some milliseconds per attempt."""


def resume_command(store: Store, run: str) -> str:
    """What to type to go on with a run."""
    return shlex.join(["layerwise", "resume", run, "--results", str(store.root)])


# --- stop ---


def stop(store: Store, run: str, timeout: float) -> RunState:
    """End a run in good order, as Ctrl-C in its window would; what is finished is kept.

    Args:
        store: where the run is.
        run: its id, the start of it, or the name of a workflow.
        timeout: how many seconds to wait for its end.
    Returns:
        How it stands at the end; `ok` or `failed` if it was faster.
    Raises:
        UsageError: it is not at work, or its process is out of reach.
        LayerwiseError: it is still at work after that time.
    """
    state = run_state(store, run)
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


def _running(store: Store, state: RunState) -> Process:
    """The process of a run that is at work here."""
    again = resume_command(store, state.run)
    if state.status in ("ok", "failed"):
        hint = None if state.status == "ok" else f"to run it again: {again}"
        raise UsageError(f"run {state.run} is already finished ({state.status})", hint=hint)
    if state.status == "stopped":
        raise UsageError(f"run {state.run} is already stopped", hint=f"to go on: {again}")
    if state.status == "interrupted":
        raise UsageError(f"run {state.run} is not at work: its process is gone", hint=f"to go on: {again}")
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
    known = attempt_numbers(store.root / "runs" / run)
    if number is None and known:
        return known[-1]
    if number not in known:
        raise UsageError(f"run {run} has no attempt {number or 1}", hint=f"it has {len(known)}")
    return number


def check_stage(state: RunState, stage: str) -> None:
    """Refuse the name of a stage that a run does not have; `search` stands for all of `search@a`, `search@b`."""
    known = [entry.stage for entry in state.stages]
    if stage not in {name for entry in known for name in (entry, entry.partition("@")[0])}:
        raise UsageError(f"run {state.run} has no stage '{stage}' ({nearest(stage, known)})")


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
    if not path.is_file():
        raise UsageError(f"attempt {number} of run {run} left no log: {path} is missing")
    lines, _ = _lines(path, 0)
    return (line for line in lines if _about(line, stage))


def follow_log(store: Store, run: str, number: int, stage: str | None = None) -> Iterator[str]:
    """The same lines, and those that follow, until the attempt has ended; `attempt_status` then says how."""
    path, attempt = log_file(store.root / "runs" / run, number), read_attempt(store.root / "runs" / run, number)
    position, next_look = 0, 0.0
    while True:
        ended = attempt is not None and attempt.process.alive() is False
        if not ended and time.monotonic() >= next_look:
            ended = attempt_status(store, run, number) != "running"
            next_look = time.monotonic() + SECONDS_BETWEEN_STORE_LOOKS
        lines, position = _lines(path, position)  # after the look, so that the last line is not missed
        yield from (line for line in lines if _about(line, stage))
        if ended:
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _lines(path: Path, position: int) -> tuple[list[str], int]:
    """The whole lines from a position on, and where they end."""
    try:
        with path.open("rb") as file:
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


def reopen(store: Store, state: RunState, display: Display) -> Run:
    """A run as its folder has it, to be executed with `wait=False`.

    Args:
        store: where the run is.
        state: how it stands.
        display: is told what happens.
    Raises:
        StoreError: it is at work.
        UsageError: an older layerwise made it, or its model or texts have changed.
        WorkflowError: its model or texts are no longer there.
    """
    if state.status == "running" and state.checked:
        pid = "" if state.attempt is None else f", in process {state.attempt.process.pid}"
        raise StoreError(
            f"run {state.run} is at work{pid}", hint="`layerwise logs -f` follows it, `layerwise stop` ends it"
        )
    if state.status == "running":
        display.note(f"{state.host} cannot be asked whether it still runs {state.run}; its lock will say")
    path = store.root / "runs" / state.run / WORKFLOW
    if not path.is_file():
        raise UsageError(f"{path} is missing", hint="run the workflow file again: what is finished is found")
    run = Run(load_workflow(path), store.root, display)
    if run.id != state.run:
        raise UsageError(
            f"the model, a text or layerwise has changed since: this would be another run, {run.id}",
            hint=f"put the files back, or start that run: layerwise run {path} --results {store.root}",
        )
    return run
