"""Hands a run to a Ray cluster as a job, so that whoever submitted it can go home.

The results folder is where submitter and job meet: its machines must see it under the same path. The workflow and the
number of the attempt are written into it first; the job begins the attempt of that number, and no other. So nothing is
run twice: two submitters on this folder wait for each other, the later one finds the job of the first, and a job that
was handed over twice would find its attempt begun. Whether the job began shows in the same place.

Secrets go nowhere: what a job's description holds, everybody who reaches the dashboard can read.

Left out: retries. A job dies with its cluster; `layerwise resume` goes on, there or on another one.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layerwise.errors import ClusterError, LayerwiseError, StoreError, UsageError
from layerwise.pipeline.artifacts import locked
from layerwise.pipeline.cluster.connection import plain_address, travels_safely
from layerwise.pipeline.cluster.jobs import RESULTS, Job, Jobs, check_variables, check_version
from layerwise.pipeline.cluster.liveness import refusal
from layerwise.pipeline.cluster.shipping import (
    ENTRYPOINT,
    SHIP_LIMIT_BYTES,
    Cargo,
    cargo,
    named_paths,
    stage_job,
    stage_package,
)
from layerwise.pipeline.cluster.submission import Submission, job_id, publish_submission
from layerwise.pipeline.consent import Consent, NotNamed, consent_to, name_cluster
from layerwise.pipeline.runs.attempt import last_number, read_attempt
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.runs.status import RunState, run_state

JOB_ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": "30", "RAY_task_oom_retries": "1", "PYTHONUNBUFFERED": "1"}
"""Of every job: time to end in good order, which is 3 s by default; one retry after running out of memory, which are
endless by default; lines that appear when they are printed."""

SECONDS_TO_BEGIN = 120.0
"""How long a submitter waits to see the attempt begin; a cluster that grows first may take longer."""

_SECRET = re.compile(r"RAY_AUTH_.*|RAY_ADDRESS|RAY_API_SERVER_ADDRESS|PYTHONPATH")
_SECONDS_BETWEEN_LOOKS = 0.3


@dataclass(frozen=True)
class Options:
    """How to submit.

    Args:
        address: of the dashboard, plain.
        ships: whether to send the local files that the workflow names.
        require_auth: whether a cluster that asks for no token is refused.
        pass_env: names of variables to hand on.
        in_clear: whether the token may be sent over plain HTTP to another machine.
        argv: the command, for the record.
        recorded: whether the address is that of the submission before, and not one that was given.
        withheld: names of variables that the submission before handed on, and that the user has not agreed to hand on
            to this cluster.
    """

    address: str
    ships: bool = True
    require_auth: bool = False
    pass_env: tuple[str, ...] = ()
    in_clear: bool = False
    argv: tuple[str, ...] = ()
    recorded: bool = False
    withheld: tuple[str, ...] = ()


@dataclass(frozen=True)
class Changes:
    """What is said anew of a run that is submitted again; None for what stays as it was.

    Args:
        ships, pass_env, require_auth, in_clear: as in `Options`.
        wait: whether to follow the run; not a matter of the submission.
    """

    ships: bool | None = None
    pass_env: tuple[str, ...] | None = None
    require_auth: bool | None = None
    in_clear: bool | None = None
    wait: bool | None = None

    def said(self) -> list[str]:
        """The options of the command line that were given."""
        options = ("--ship/--no-ship", "--pass-env", "--require-auth", "--allow-insecure-http", "--wait")
        values = (self.ships, self.pass_env, self.require_auth, self.in_clear, self.wait)
        return [option for option, value in zip(options, values, strict=True) if value is not None]

    def applied(self, options: Options) -> Options:
        """Other options with what was said."""
        names = ("ships", "pass_env", "require_auth", "in_clear")
        said = {name: getattr(self, name) for name in names}
        return replace(options, **{name: value for name, value in said.items() if value is not None})


def submit(run: Run, options: Options, tell: Callable[[str], None]) -> tuple[Submission, bool]:
    """Start a job that makes the next attempt at a run, unless one is live.

    Args:
        run: what to run; its id says whether it is there already.
        options: how.
        tell: is told what to know: warnings, what is shipped.
    Returns:
        The submission, and whether it was made just now.
    Raises:
        UsageError: a variable that is to be handed on is not set, or one leads Ray's client to another cluster.
        ClusterError: the cluster cannot be reached, does not let us in, or does not take the job.
        StoreError: the run is at work, but not as a job.
    """
    check_variables(options.address)
    passed = _passed(options.pass_env, tell)
    for name in options.withheld:
        tell(f"warning: {name} is not handed on, for only the results folder asks for it; --pass-env {name} does it")
    name_cluster(options.address, in_clear=options.in_clear, pass_env=options.pass_env)
    jobs = _visited(options)
    if jobs.token is not None and not travels_safely(options.address):
        tell(f"warning: the token travels in clear to {options.address}")
    _look_at(jobs, options.require_auth, tell)

    def waiting(pid: int | None) -> None:
        tell(f"waiting: process {pid} submits {run.id}")

    with locked(run.folder / "submit.lock", waiting, root=run.store.root):
        live = _live(run, tell)
        if live is not None:
            return live, False
        submission, load = _record(run, jobs, options, tell)
        tell(f"submitting {run.id} to {options.address} as {submission.job}")
        with tempfile.TemporaryDirectory(prefix="lw-submit-") as folder:
            environment = {
                "working_dir": str(stage_job(Path(folder), run.workflow, load)),
                "py_modules": [str(stage_package(Path(folder)))],
                "env_vars": {**JOB_ENVIRONMENT, **passed},
            }
            arguments = [str(run.store.root.absolute()), run.id, str(submission.number), submission.nonce]
            metadata = {"layerwise_run": run.id, "attempt": str(submission.number), RESULTS: arguments[0]}
            jobs.submit(submission.job, f"{ENTRYPOINT} {shlex.join(arguments)}", environment, metadata)
    return submission, True


def _visited(options: Options) -> Jobs:
    """The cluster to submit to; if it was not named just now, the refusal says how to name another place."""
    try:
        return Jobs.at(options.address, in_clear=options.in_clear)
    except ClusterError as error:
        if options.recorded:
            elsewhere = "--address URL for another cluster, --executor ray to go on here"
            error.hint = elsewhere if error.hint is None else f"{error.hint}; or {elsewhere}"
        raise


def await_start(run: Run, submission: Submission, tell: Callable[[str], None]) -> bool:
    """Wait until the attempt has begun, which the results folder shows.

    Args:
        run: what was submitted.
        submission: its record.
        tell: is told how the job stands while it waits.
    Returns:
        Whether it has; False if it is still pending after a while, and that is no error.
    Raises:
        LayerwiseError: the job ended before; with its own words, and its exit code.
        ClusterError: the cluster went away, or forgot the job.
    """
    jobs, until, told = (
        Jobs.recorded(submission.address, in_clear=submission.in_clear),
        time.monotonic() + SECONDS_TO_BEGIN,
        "",
    )
    while time.monotonic() < until:
        job = jobs.find(submission.job)
        if read_attempt(run.folder, submission.number) is not None:
            return True
        if job is None:
            raise ClusterError(f"{submission.address} forgot the job {submission.job}", hint="was it started anew?")
        if job.over:
            raise _not_begun(jobs, submission, job)
        stands = f"{job.status.lower()}: {job.message}".rstrip(": ")
        if stands != told:
            tell(stands)
            told = stands
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return False


def _not_begun(jobs: Jobs, submission: Submission, job: Job) -> LayerwiseError:
    """Why a job ended without beginning its attempt, with the exit code that it had."""
    said = refusal(jobs.log(submission.job)) or job.message or job.status
    error = LayerwiseError(f"job {submission.job} ended before the run began: {said}")
    error.exit_code = job.exit_code or (3 if job.status == "STOPPED" else 1)
    return error


def _passed(names: Sequence[str], tell: Callable[[str], None]) -> dict[str, str]:
    """The variables that are handed on."""
    for name in names:
        if name in JOB_ENVIRONMENT or _SECRET.fullmatch(name):
            raise UsageError(f"--pass-env {name}: the job has its own", hint="leave it out")
        if name not in os.environ:
            raise UsageError(f"--pass-env {name}: it is not set here", hint=f"export {name}=...")
    if names:
        tell(f"warning: everybody who reaches the dashboard can read the values of {', '.join(names)}")
    return {name: os.environ[name] for name in names}


def _look_at(jobs: Jobs, require_auth: bool, tell: Callable[[str], None]) -> None:
    """Refuse a cluster that is too old, warn of one that lets everybody in or runs another Ray."""
    warning = check_version(jobs)
    if warning is not None:
        tell(f"warning: {warning}")
    if jobs.token is None:
        found = f"{jobs.address} lets anyone in: whoever can reach it runs code there"
        hint = "start it with RAY_AUTH_MODE=token on every machine"
        if require_auth:
            raise ClusterError(found, hint=hint)
        tell(f"warning: {found}; {hint}")


def _live(run: Run, tell: Callable[[str], None]) -> Submission | None:
    """The submission that is at work on this run."""
    state = _state(run)
    if state is None or not state.live:
        return None
    if state.checked and state.submission is not None:
        return state.submission
    if state.checked:
        process = "" if state.attempt is None else f", in process {state.attempt.process.pid} of {state.host}"
        raise StoreError(f"run {run.id} is at work{process}", hint="`layerwise logs -f` follows it")
    tell(f"{state.host} cannot be asked whether it still runs {run.id}; its lock will say")
    return None


def _state(run: Run) -> RunState | None:
    known = run.store.rows("runs", run=run.id) or last_number(run.folder)
    return run_state(run.store, run.id) if known else None


def _record(run: Run, jobs: Jobs, options: Options, tell: Callable[[str], None]) -> tuple[Submission, Cargo | None]:
    """Claim the number of the attempt, and keep what it takes to make it."""
    load = _load(run, options.ships, tell)
    run.keep_workflow()
    number = last_number(run.folder)
    while True:
        number += 1
        submission = Submission(
            number=number,
            job=_free_id(run, number, jobs),
            address=options.address,
            argv=options.argv,
            ships=options.ships,
            elsewhere=() if load is not None else tuple(map(str, named_paths(run.workflow))),
            pass_env=options.pass_env,
            in_clear=options.in_clear,
        )
        if publish_submission(run.folder, submission, run.artifacts.tmp):
            return submission, load


def _free_id(run: Run, number: int, jobs: Jobs) -> str:
    """The id of the job; Ray takes an id but once, so the same run in a second results folder gets a longer one.

    Raises:
        StoreError: a job of that id works on this folder, which does not know of it.
    """
    plain = job_id(run.id, number)
    found = jobs.find(plain)
    if found is None:
        return plain
    if not found.over and found.results == str(run.store.root.absolute()):
        raise StoreError(
            f"job {plain} at {jobs.address} works on {run.store.root}, which has no record of it",
            hint=f"stop it first: ray job stop --address {jobs.address} {plain}",
        )
    return f"{plain}-{secrets.token_hex(4)}"


def _load(run: Run, ships: bool, tell: Callable[[str], None]) -> Cargo | None:
    """The files to ship; None if the cluster must see them."""
    load = cargo(run.workflow)
    if ships and load.fits:
        tell(f"shipping {len(load.files)} files, {load.size_bytes / 2**20:.1f} MiB")
        return load
    if not ships and load.files:
        tell("the cluster must see the model and the texts under the paths that they have here")
    elif load.files:
        tell(
            f"the model and the texts are too large to ship ({load.size_bytes / 2**20:.0f} MiB, at most "
            f"{SHIP_LIMIT_BYTES // 2**20}): the cluster must see them under the paths that they have here"
        )
    return None


def is_finished(run: Run) -> bool:
    """Whether there is nothing to submit."""
    state = _state(run)
    return state is not None and state.status == "ok"


def again(
    state: RunState, address: str | None, executor: str | None, argv: Sequence[str], changes: Changes
) -> Options | None:
    """How to submit a run again: as the last time, except for what is said anew. None if it is to run here.

    Args:
        state: how it stands.
        address: that was given; `http...` for a cluster to submit it to.
        executor: that was given; with one it runs here.
        argv: the command, for the record.
        changes: what is said anew.
    Raises:
        UsageError: options of both ways together.
        NotNamed: only the results folder names the cluster.
    """
    there = address is not None and address.startswith(("http://", "https://"))
    if there and executor is not None:
        raise UsageError(f"--executor {executor} runs it here, and --address {address} there", hint="leave one out")
    last = state.submission
    if executor is not None or not (there or (address is None and last is not None)):
        if changes.said():
            names = ", ".join(changes.said())
            raise UsageError(f"{names}: only for a run that is submitted", hint="say where with --address http://...")
        return None
    plain = plain_address(address) if address is not None else "" if last is None else last.address
    options = Options(plain, argv=tuple(argv), recorded=address is None)
    if last is not None:
        consent = _consent(plain, recorded=address is None)
        options = replace(
            options,
            ships=last.ships,
            in_clear=last.in_clear and consent.in_clear,
            pass_env=tuple(name for name in last.pass_env if name in consent.pass_env),
        )
    changed = changes.applied(options)
    if last is not None and changes.pass_env is None:
        changed = replace(changed, withheld=tuple(name for name in last.pass_env if name not in changed.pass_env))
    return changed


def _consent(address: str, recorded: bool) -> Consent:
    """What the user agreed to send there; of an address that he names this moment, nothing yet."""
    try:
        return consent_to(address)
    except NotNamed as error:
        if not recorded:
            return Consent()
        error.hint = f"{error.hint}; or --executor ray to go on here"
        raise
