"""Runs that are submitted to a real head node: watched, stopped, resumed and refused from the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from layerwise.pipeline.runs.attempt import read_attempt
from layerwise.results.frontier import frontier_table
from layerwise.results.sealed import sealed, unsealed
from layerwise.results.store import Store

pytestmark = pytest.mark.ray

MARK = "+second"
"""At the end of the version of the second installation."""


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def project(tiny_workflow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny workflow, its model and its texts."""
    folder = tmp_path_factory.mktemp("submitted") / "project"
    shutil.copytree(tiny_workflow.parent, folder)
    return folder


@pytest.fixture(scope="module")
def layerwise(head: Any) -> Command:
    """The `layerwise` command of somebody who has the cluster's token."""

    def call(*arguments: object, env: dict[str, str] | None = None) -> Outcome:
        command = [sys.executable, "-m", "layerwise", *map(str, arguments)]
        done = subprocess.run(command, env=env or head.env(), text=True, capture_output=True, timeout=300, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="module")
def undisturbed(project: Path, layerwise: Command) -> str:
    """The frontier that one process finds."""
    results = project.parent / "undisturbed"
    outcome = layerwise("run", project / "flow.yaml", "--results", results, "--executor", "inline")
    assert outcome.code == 0, outcome.err
    return frontier_of(results)


@pytest.fixture(scope="module")
def finished(head: Any, project: Path, layerwise: Command) -> tuple[Path, Outcome]:
    """The results of a run that was submitted and waited for, and how that ended."""
    results = project.parent / "submitted"
    outcome = layerwise(
        "submit", project / "flow.yaml", "--address", head.dashboard, "--results", results, "--wait", "--require-auth"
    )
    return results, outcome


def frontier_of(results: Path) -> str:
    text = frontier_table(Store.open(results), dominated=True).drop(columns="run").to_csv(index=False)
    assert text.count("\n") > 5
    return text


def job_id_of(results: Path, number: int = 1) -> str:
    """The id of the job of an attempt: that of run and attempt, with an end where another folder has had it."""
    (record,) = results.glob(f"runs/*/submissions/{number:04}.json")
    job = str(json.loads(record.read_bytes())["job"])
    assert re.fullmatch(rf"lw-{record.parents[1].name}-a{number}(-\w+)?", job)
    return job


def job_of(head: Any, job: str) -> dict[str, Any]:
    """What Ray itself says of a job."""
    request = urllib.request.Request(
        f"{head.dashboard}/api/jobs/{job}", headers={"Authorization": f"Bearer {head.token}"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


# --- from the submission to the frontier ---


def test_a_submitted_run_is_followed_to_the_frontier_of_a_run_in_one_process(
    finished: tuple[Path, Outcome], undisturbed: str
) -> None:
    results, outcome = finished
    assert outcome.code == 0, outcome.err
    run = re.search(r"^run: (flow-\w+)\njob: lw-\1-a1(-\w+)?$", outcome.out, re.MULTILINE)
    assert run is not None
    assert f"layerwise logs -f {run[1]} --results {results}" in outcome.err
    assert "warning" not in outcome.err
    assert outcome.err.endswith(f"\nlayerwise frontier {run[1]} --results {results}\n")
    assert "- finished after" in outcome.out.splitlines()[-1]
    assert frontier_of(results) == undisturbed


def test_every_stage_of_a_submitted_run_is_in_its_status(
    finished: tuple[Path, Outcome], layerwise: Command, head: Any
) -> None:
    results, _ = finished
    state = json.loads(layerwise("status", "flow", "--results", results, "--format", "json").out)
    assert (state["run"]["status"], state["run"]["job"], state["run"]["address"], state["run"]["remark"]) == (
        *("ok", job_id_of(results), head.dashboard),
        None,
    )
    assert {stage["stage"] for stage in state["stages"]} == {
        *("statistics", "levels", "profile", "search@ilp", "search@evolve", "score", "best", "model")
    }
    assert {stage["status"] for stage in state["stages"]} == {"ok"}
    assert "[levels] done in" in layerwise("logs", "--results", results).out


def test_what_was_shipped_has_the_keys_of_what_is_here(finished: tuple[Path, Outcome], project: Path) -> None:
    """So a run here finds all that the job made, and what is kept names the files where they are here."""
    from layerwise.pipeline.display import SilentDisplay
    from layerwise.pipeline.runs.run import Run
    from layerwise.pipeline.workflow import load_workflow

    results, _ = finished
    for path in (project / "flow.yaml", next(results.glob("runs/*/workflow.yaml"))):
        run = Run(load_workflow(path), results, SilentDisplay())
        assert run.workflow.model.path == project / "model"
        assert [plan.reason for plan in run.plan()] == [""] * 8
        assert run.folder.is_dir()


def test_a_finished_run_is_neither_submitted_nor_stopped(
    finished: tuple[Path, Outcome], project: Path, layerwise: Command, head: Any
) -> None:
    results, _ = finished
    again = layerwise("submit", project / "flow.yaml", "--address", head.dashboard, "--results", results)
    assert again.code == 0
    assert "is finished already" in again.err
    assert "Pareto frontier" in again.out
    assert "is finished already" in layerwise("resume", "flow", "--results", results).err
    refused = layerwise("stop", "flow", "--results", results)
    assert refused.code == 2
    assert "is already finished (ok)" in refused.err
    assert len(list(results.glob("runs/*/submissions/*"))) == 1


def test_nothing_secret_is_in_the_job_or_in_the_results(finished: tuple[Path, Outcome], head: Any) -> None:
    results, _ = finished
    job = job_of(head, job_id_of(results))
    assert head.token not in json.dumps(job)
    assert job["runtime_env"]["env_vars"] == {
        **{"RAY_JOB_STOP_WAIT_TIME_S": "30", "RAY_task_oom_retries": "1", "PYTHONUNBUFFERED": "1"}
    }
    texts = [path for path in results.rglob("*") if path.suffix in (".json", ".yaml", ".log", ".parquet")]
    assert {path.parent.name for path in texts} >= {"submissions", "attempts", "log"}
    assert not [path for path in texts if head.token.encode() in path.read_bytes()]


def test_the_job_ran_on_the_python_of_the_clusters_ray_and_on_the_code_that_was_shipped(
    finished: tuple[Path, Outcome], head: Any
) -> None:
    results, _ = finished
    job = job_of(head, job_id_of(results))
    assert len(job["runtime_env"]["py_modules"]) == 1
    assert job["driver_exit_code"] == 0  # and the `python` of the cluster's PATH would have said 1


# --- from a wheel ---


@pytest.fixture(scope="module")
def installed(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a second environment, in which layerwise is installed from a wheel and the checkout is not known.

    The packages that it depends on are those of the present environment, without the hook of its editable install.
    """
    folder = tmp_path_factory.mktemp("second") / "venv"
    venv.create(folder, symlinks=True)
    python, here = folder / "bin" / "python", sysconfig.get_path("purelib")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel_file)]
    subprocess.run(pip, check=True, timeout=120)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    place = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    Path(place, "packages.pth").write_text(f"{here}\n")
    front_door = Path(place, "layerwise", "__init__.py")
    front_door.write_text(front_door.read_text() + f'\n__version__ += "{MARK}"\n')
    return python


def test_a_wheel_without_its_checkout_submits_itself_and_finds_the_same_frontier(
    installed: Path, head: Any, project: Path, undisturbed: str, tmp_path: Path
) -> None:
    """The mark in the installed package is in the job's own record, so the job ran what is installed here."""
    layerwise = str(installed.with_name("layerwise"))
    command = [layerwise, "submit", project / "flow.yaml", "--address", head.dashboard, "--wait"]
    command += ["--results", tmp_path / "results"]
    env = {name: value for name, value in head.env().items() if name != "PYTHONPATH"}
    run = partial(subprocess.run, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    where = run([str(installed), "-c", "import layerwise; print(layerwise.__file__)"])
    assert Path(where.stdout.strip()).is_relative_to(installed.parents[1]), where.stderr
    done = run(list(map(str, command)))
    assert done.returncode == 0, done.stderr
    rows = Store.open(tmp_path / "results").rows("runs")
    assert {str(row["layerwise_version"]).endswith(MARK) for row in rows} == {True}
    assert frontier_of(tmp_path / "results") == undisturbed
    (record,) = (tmp_path / "results").glob("runs/*/attempts/*.json")
    assert json.loads(record.read_bytes())["executor"] == "ray"


# --- stop and resume ---


@pytest.fixture
def at_work(
    head: Any, project: Path, tmp_path: Path, layerwise: Command
) -> Iterator[tuple[Path, str, int, dict[str, set[str]]]]:
    """Results, run, process, and finished items by stage key of a job that is held in the middle of a stage."""
    results = tmp_path / "results"
    outcome = layerwise("submit", project / "flow.yaml", "--address", head.dashboard, "--results", results)
    assert outcome.code == 0, outcome.err
    run = outcome.out.split()[1]
    attempt = read_attempt(results / "runs" / run, 1)
    assert attempt is not None
    pid = attempt.process.pid
    try:
        while True:
            assert attempt.process.alive(), "it must be caught before its end"
            if finished_items(results):
                os.kill(pid, signal.SIGSTOP)
                wait_until(lambda: "T (stopped)" in Path(f"/proc/{pid}/status").read_text())
                if finished_items(results):
                    break  # else the stage was just over
                os.kill(pid, signal.SIGCONT)
        yield results, run, pid, finished_items(results)
    finally:
        if attempt.process.alive():
            os.kill(pid, signal.SIGKILL)


def finished_items(results: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in results.glob("work/*/journal/*/*.json"):
        found.setdefault(path.parents[2].name, set()).add(path.name)
    return found


def wait_until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.01)


def has_pending_signal(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return any(int(mask, 16) for mask in re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)$", status, re.MULTILINE))


def test_a_job_that_is_stopped_in_the_middle_ends_in_good_order_and_is_resumed_to_the_same_frontier(
    head: Any, project: Path, at_work: tuple[Path, str, int, dict[str, set[str]]], layerwise: Command, undisturbed: str
) -> None:
    results, run, pid, items = at_work
    live = layerwise("status", run, "--results", results)
    assert f"{run}: running, attempt 1 (ray), started " in live.out
    assert f"as job {job_id_of(results)} at {head.dashboard}" in live.out

    twice = layerwise("submit", project / "flow.yaml", "--address", head.dashboard, "--results", results)
    assert twice.code == 0, twice.err
    assert f"is at work already, as job {job_id_of(results)}" in twice.err
    refused = layerwise("resume", run, "--results", results)
    assert refused.code == 4
    assert f"is at work, as job {job_id_of(results)} at {head.dashboard}" in refused.err
    assert len(list(results.glob("runs/*/submissions/*"))) == 1

    command = [sys.executable, "-m", "layerwise", "stop", run, "--results", str(results)]
    stopping = subprocess.Popen(command, env=head.env(), text=True, stderr=subprocess.PIPE)
    wait_until(lambda: has_pending_signal(pid) or stopping.poll() is not None)
    os.kill(pid, signal.SIGCONT)
    _, err = stopping.communicate(timeout=120)
    assert stopping.returncode == 0, err
    assert f"run {run}: stopped; to go on: layerwise resume {run} --results {results}" in err
    store = Store.open(results)
    assert store.rows("runs")[-1]["status"] == "stopped"  # which only the driver itself can have written
    assert job_of(head, job_id_of(results))["status"] == "STOPPED"
    assert layerwise("stop", run, "--results", results).code == 0
    assert layerwise("logs", "-f", run, "--results", results).code == 3
    kept = finished_items(results)
    assert {key: names <= kept.get(key, set()) for key, names in items.items()} == dict.fromkeys(items, True)

    resumed = layerwise("resume", run, "--results", results, "--wait")
    assert resumed.code == 0, resumed.err
    assert f"job: {job_id_of(results, 2)}" in resumed.out
    (stopped,) = [row for row in store.rows("stages") if row["status"] == "stopped"]
    rows = [row for row in store.rows("stages") if row["stage_key"] == stopped["stage_key"]]
    assert (rows[-1]["cache"], rows[-1]["status"]) == ("partial", "ok")
    assert rows[-1]["items_cached"] >= len(kept[stopped["stage_key"]])
    made = [row["stage_key"] for row in store.rows("stages") if row["status"] == "ok" and row["cache"] != "hit"]
    assert len(made) == len(set(made)) == 8
    assert frontier_of(results) == undisturbed


def test_of_two_who_submit_at_once_one_starts_a_job_and_both_are_told_of_it(
    head: Any, project: Path, tmp_path: Path, layerwise: Command
) -> None:
    results = tmp_path / "results"
    command = [sys.executable, "-m", "layerwise", "submit", str(project / "flow.yaml"), "--profile", "short"]
    command += ["--address", head.dashboard, "--results", str(results)]
    both = [subprocess.Popen(command, env=head.env(), text=True, stdout=-1, stderr=-1) for _ in range(2)]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert len({out for out, _ in told}) == 1, told
    assert sum("is at work already, as job lw-" in err for _, err in told) == 1
    assert len(list(results.glob("runs/*/attempts/*"))) == 1
    assert layerwise("stop", "flow", "--results", results).code == 0


# --- what is refused ---


def test_a_path_that_the_cluster_cannot_see_is_named_with_exit_code_2(
    head: Any, project: Path, tmp_path: Path, layerwise: Command
) -> None:
    """The cluster is on this machine, so what it cannot see is what has gone by the time that the job begins."""
    copy = tmp_path / "project"
    shutil.copytree(project, copy)
    late = tmp_path / "late.py"
    late.write_text(
        "import shutil, sys\n"
        "from layerwise.pipeline import cli; from layerwise.pipeline.cluster import handover\n"
        "stage = handover.stage_package\n"
        f"handover.stage_package = lambda folder: (shutil.rmtree({str(copy / 'model')!r}), stage(folder))[1]\n"
        "cli.main()\n"
    )
    command = [sys.executable, late, "submit", copy / "flow.yaml", "--address", head.dashboard, "--no-ship"]
    command += ["--results", tmp_path / "results"]
    done = subprocess.run(
        list(map(str, command)), env=head.env(), text=True, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    assert f", where the job runs: {copy / 'model'}\nhint: put it where every machine" in done.stderr
    state = layerwise("status", "flow", "--results", tmp_path / "results")
    assert ": failed, attempt 1" in state.out
    assert f"where the job runs: {copy / 'model'}" in state.out
    followed = layerwise("logs", "-f", "--results", tmp_path / "results")
    assert followed.code == 1
    assert f"where the job runs: {copy / 'model'}" in followed.out


def test_a_results_folder_that_the_cluster_cannot_see_is_told_with_exit_code_2(
    head: Any, project: Path, tmp_path: Path
) -> None:
    """As above: by the time that the job begins, another folder is at its path."""
    results = tmp_path / "results"
    swap = tmp_path / "swap.py"
    swap.write_text(
        "import pathlib, shutil\n"
        "from layerwise.pipeline import cli; from layerwise.pipeline.cluster import handover\n"
        "stage = handover.stage_package\n"
        "def swapped(folder):\n"
        f"    shutil.copytree({str(results)!r}, {str(results)!r} + '-here')\n"
        f"    (record,) = pathlib.Path({str(results)!r}).glob('runs/*/submissions/*')\n"
        "    record.unlink()\n"
        "    return stage(folder)\n"
        "handover.stage_package = swapped\n"
        "cli.main()\n"
    )
    command = [sys.executable, swap, "submit", project / "flow.yaml", "--address", head.dashboard, "--results", results]
    done = subprocess.run(
        list(map(str, command)), env=head.env(), text=True, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    assert f"the results folder {results} is not visible on " in done.stderr
    assert "hint: name one with --results that every machine of the cluster has" in done.stderr


@pytest.mark.parametrize(
    ("token", "message"),
    [("0" * 32, r"refuses the token from RAY_AUTH_TOKEN \(HTTP 403\)"), ("", "asks for a token, and there is none")],
)
def test_a_wrong_and_a_missing_token_end_with_exit_code_5(
    head: Any, project: Path, tmp_path: Path, layerwise: Command, token: str, message: str
) -> None:
    env = {**head.env(), "RAY_AUTH_TOKEN": token, "HOME": str(tmp_path)}
    command = ["submit", project / "flow.yaml", "--address", head.dashboard, "--results", tmp_path / "results"]
    outcome = layerwise(*command, env=env)
    assert outcome.code == 5
    assert re.search(message, outcome.err)
    assert not list((tmp_path / "results").glob("runs/*/submissions"))


def test_a_killed_job_is_interrupted_everywhere_and_goes_on_at_another_cluster_when_its_own_is_gone(
    head: Any, project: Path, tmp_path: Path, layerwise: Command
) -> None:
    """In the second half its record names an address where nothing listens, and a host that cannot be asked."""
    results, gone = tmp_path / "results", "http://127.0.0.1:9"
    outcome = layerwise("submit", project / "flow.yaml", "--address", head.dashboard, "--results", results)
    assert outcome.code == 0, outcome.err
    run = outcome.out.split()[1]
    folder = results / "runs" / run
    attempt = read_attempt(folder, 1)
    assert attempt is not None
    os.kill(attempt.process.pid, signal.SIGKILL)
    assert layerwise("logs", "-f", run, "--results", results).code == 3
    facts = json.loads(layerwise("status", run, "--results", results, "--format", "json").out)["run"]
    assert (facts["status"], facts["checked"]) == ("interrupted", True)
    refused = layerwise("stop", run, "--results", results)
    assert refused.code == 2
    assert "is not at work: its process is gone" in refused.err

    for path, old, new in (
        (folder / "submissions" / "0001.json", head.dashboard, gone),
        (folder / "attempts" / "0001.json", f'"host": "{attempt.process.host}"', '"host": "far-away"'),
    ):
        text = json.dumps(unsealed(path.read_bytes()))
        assert old in text
        path.write_bytes(sealed(json.loads(text.replace(old, new))))
    state = layerwise("status", run, "--results", results, "--address", gone)
    assert f"{run}: running, attempt 1 (ray), started " in state.out
    assert "far-away (not checked)" in state.out
    assert f"run {run}: {gone} cannot be reached: " in state.err
    assert f"if that cluster is gone: layerwise resume {run} --results {results} --address URL" in state.err
    stopped = layerwise("stop", run, "--results", results)
    assert stopped.code == 5
    assert f"{gone} cannot be reached" in stopped.err
    assert layerwise("resume", run, "--results", results).code == 5
    resumed = layerwise("resume", run, "--results", results, "--address", head.dashboard)
    assert resumed.code == 0, resumed.err
    assert "far-away cannot be asked whether it still runs" in resumed.err
    assert read_attempt(folder, 2) is not None
    assert layerwise("stop", run, "--results", results).code == 0
