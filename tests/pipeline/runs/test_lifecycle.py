"""Runs are watched, stopped and resumed by what their folder holds, whoever started them and however they ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from layerwise import stages
from layerwise.errors import LayerwiseError, StoreError, UsageError
from layerwise.pipeline.display import SilentDisplay
from layerwise.pipeline.runs import attempt as attempt_module
from layerwise.pipeline.runs import lifecycle
from layerwise.pipeline.runs.attempt import read_attempt
from layerwise.pipeline.runs.kept_workflow import damage_of
from layerwise.pipeline.runs.lifecycle import follow_log, read_log, reopen, stop
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.runs.status import attempt_status, run_state, run_states
from layerwise.pipeline.workflow import load_workflow
from layerwise.results.frontier import frontier_table
from layerwise.results.sealed import sealed
from layerwise.results.store import Store

SCRIPT = Path(__file__).parents[1] / "fake_stages.py"
STAGES = ["numbers", "parity", "sum", "aside"]


Layerwise = Callable[..., Any]


@pytest.fixture(autouse=True)
def known_stages(fake_stages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fake stages are there under their names; what commands change in this process is put back."""
    before = signal.getsignal(signal.SIGTERM)
    for name, stage in fake_stages.STAGES.items():
        monkeypatch.setitem(stages.STAGES, name, stage)
    monkeypatch.setattr("logging.basicConfig", lambda **options: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def layerwise(workshop: Any, in_process: Layerwise) -> Layerwise:
    """The `layerwise` command, on the results of the workshop."""
    return lambda *arguments: in_process(*arguments, "--results", workshop.results)


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that end with the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def begin(workshop: Any, processes: list[subprocess.Popen[str]]) -> Callable[..., subprocess.Popen[str]]:
    """Starts a command with the fake stages in a process of its own."""

    def begin(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), *map(str, arguments), "--results", str(workshop.results)]
        processes.append(subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return processes[-1]

    return begin


@pytest.fixture
def at_work(workshop: Any, begin: Callable[..., subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """A process within the third item of the first stage, where it stays."""
    workshop.switch("n-2", "wait")
    process = begin("run", workshop.flow, "--executor", "inline")
    wait_for_trace(workshop, "n-2", process)
    return process


def wait_for_trace(workshop: Any, item: str, process: subprocess.Popen[str]) -> None:
    while not list((workshop.folder / "traces").glob(f"{item}:*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def statuses(store: Store, run: str = "flow") -> dict[str, str]:
    return {stage.stage: stage.status for stage in run_state(store, run).stages}


def wait_for_progress(store: Store, done: int) -> None:
    """Until the run has said how many items are done; it says so within a second or two."""
    while (present := run_state(store, "flow").present) is None or present.done != done:
        time.sleep(0.05)


def forge(run: Any, number: int, **changes: Any) -> None:
    """Change who made an attempt."""
    path = run.folder / "attempts" / f"{number:04}.json"
    record = json.loads(path.read_bytes())
    record["process"] |= changes
    del record["sha256"]
    path.write_bytes(sealed(record))


def seem_running(run: Any, number: int = 1) -> None:
    """A run that says it is at work, as this process."""
    for tree in ("tables", "copies"):
        shutil.rmtree(run.store.root / tree / "runs")
    facts = {"name": "flow", "status": "running", "resolved": json.dumps(run.resolved), "executor": "inline"}
    attempt = read_attempt(run.folder, number)
    assert attempt is not None
    facts["started_at"] = attempt.started_at
    run.store.append("runs", [facts], run_id=run.id, attempt=number, first_seq=0)


# --- what is kept ---


def test_the_kept_workflow_gives_the_same_run(workshop: Any, fake_stages: ModuleType) -> None:
    run, _ = workshop.run("stages.numbers.with.scale=3")
    again = load_workflow(run.folder / "workflow.yaml", find_stage=fake_stages.STAGES)
    assert type(run)(again, workshop.results, SilentDisplay()).id == run.id
    attempt = read_attempt(run.folder, 1)
    assert attempt is not None
    assert (attempt.executor, attempt.process.pid, attempt.process.alive()) == ("inline", os.getpid(), True)


def test_the_kept_workflow_of_a_real_run_gives_the_same_run(tiny_workflow: Path, tmp_path: Path) -> None:
    from layerwise.pipeline.runs.run import Run

    run = Run(load_workflow(tiny_workflow, profile="short", params={"bits": "[3, 5]"}), tmp_path, SilentDisplay())
    run.keep_workflow()
    assert Run(load_workflow(run.folder / "workflow.yaml"), tmp_path, SilentDisplay()).id == run.id


# --- each state, seen ---


def test_a_run_at_work_is_seen_stage_by_stage(
    workshop: Any, at_work: subprocess.Popen[str], layerwise: Layerwise
) -> None:
    store = Store.open(workshop.results)
    wait_for_progress(store, 2)
    (state,) = run_states(store)
    assert state == replace(run_state(store, state.run), seconds=state.seconds, stages=state.stages)
    assert (state.status, state.checked, state.number) == ("running", True, 1)
    assert state.attempt is not None
    assert state.attempt.process.pid == at_work.pid
    assert statuses(store) == {"numbers": "running", "parity": "waiting", "sum": "waiting", "aside": "waiting"}
    outcome = layerwise("status")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.search(r"flow-\w+ +running +0/4 +numbers 2/4 numbers", outcome.out)
    outcome = layerwise("status", "flow")
    assert outcome.out.startswith(f"run {state.run}: running, attempt 1 (inline), started ")
    assert re.search(r"numbers +running +2/4 numbers.* not there yet\n", outcome.out)
    assert re.search(r"^[^ ]+Z \[numbers\] count \(not there yet\)\n$", layerwise("logs", "--stage", "numbers").out)


def test_a_finished_run_is_seen_and_its_log_ends(workshop: Any, layerwise: Layerwise) -> None:
    run, _ = workshop.run()
    assert set(statuses(run.store).values()) == {"ok"}
    found = json.loads(layerwise("status", run.id, "--format", "json").out)
    assert (found["run"]["status"], found["run"]["stages_done"], found["run"]["stage"]) == ("ok", 4, None)
    assert [(stage["done"], stage["total"]) for stage in found["stages"]] == [(4, 4), (None,) * 2, (None,) * 2, (2, 2)]
    (listed,) = json.loads(layerwise("status", "--format", "json").out)
    assert (listed["run"], listed["pid"], listed["checked"]) == (run.id, os.getpid(), True)
    assert layerwise("status", "flow", "--format", "csv").out.startswith("stage,uses,status,done,total,note,")
    followed = layerwise("logs", "-f")
    assert followed.code == 0
    assert followed.out == layerwise("logs", "flow").out
    assert "- finished after" in followed.out.splitlines()[-1]
    assert followed.err == ""  # no stage of it makes candidates, so it has no frontier


def test_why_a_stage_had_to_be_made_is_not_shown_once_it_is_made(workshop: Any, layerwise: Layerwise) -> None:
    workshop.run()
    assert "not there yet" not in layerwise("status", "flow").out
    told = json.loads(layerwise("status", "flow", "--format", "json").out)["stages"]
    assert [stage["reason"] for stage in told] == ["not there yet"] * 4


def test_stages_that_another_run_made_are_cached(workshop: Any) -> None:
    first, _ = workshop.run()
    second, _ = workshop.run("stages.parity.with.base=3")
    assert statuses(second.store, second.id)["numbers"] == "cached"
    assert statuses(first.store, first.id)["numbers"] == "ok"


def test_a_failed_run_is_seen_with_its_error(workshop: Any, layerwise: Layerwise) -> None:
    workshop.switch("n-3", "refuse")
    run, _ = workshop.prepare()
    with pytest.raises(LayerwiseError):
        run.execute("inline")
    assert list(statuses(run.store).values()) == ["failed", "not started", "not started", "not started"]
    outcome = layerwise("status", "flow")
    assert re.search(r"numbers +failed +3/4 numbers +[\d.]+ s +stage numbers: budget 1 bits is below", outcome.out)
    assert f"{run.id}: failed; to go on: layerwise resume {run.id} --results {workshop.results}" in outcome.err
    assert "[numbers] hint: raise the budget" in layerwise("logs").out
    assert layerwise("logs", "-f").code == 1
    refused = layerwise("stop", "flow")
    assert refused.code == 2
    assert "is already finished (failed)\nhint: to run it again: layerwise resume" in refused.err


def test_a_failure_of_an_earlier_attempt_is_no_failure_of_the_present_one(workshop: Any) -> None:
    workshop.switch("n-1", "refuse")
    run, _ = workshop.prepare()
    with pytest.raises(LayerwiseError):
        run.execute("inline")
    facts = {"name": "flow", "status": "stopped", "resolved": json.dumps(run.resolved), "executor": "inline"}
    run.store.append("runs", [facts], run_id=run.id, attempt=2, first_seq=0)
    assert set(statuses(run.store).values()) == {"not started"}


def test_a_killed_run_is_interrupted_and_says_how_to_go_on(
    workshop: Any, at_work: subprocess.Popen[str], layerwise: Layerwise
) -> None:
    store = Store.open(workshop.results)
    wait_for_progress(store, 2)
    at_work.kill()
    at_work.communicate()
    run = run_state(store, "flow").run
    assert list(statuses(store).values()) == ["interrupted", "not started", "not started", "not started"]
    outcome = layerwise("status")
    assert re.search(r"flow-\w+ +interrupted +0/4 +numbers 2/4 numbers", outcome.out)
    assert [row["status"] for row in json.loads(layerwise("runs", "--format", "json").out)] == ["interrupted"]
    assert store.rows("runs")[-1]["status"] == "running"  # which is the last word of the dead
    assert f"run {run}: interrupted; to go on: layerwise resume {run} --results {workshop.results}" in outcome.err
    assert layerwise("logs", "-f").code == 3
    refused = layerwise("stop", "flow")
    assert refused.code == 2
    assert "is not at work: its process is gone" in refused.err
    workshop.switch("n-2", None)
    workshop.flow.unlink()
    workshop.traces()
    resumed = layerwise("resume", run)
    assert (resumed.code, resumed.out) == (0, "")
    assert "2 of 4 items were already done" in resumed.err
    assert workshop.traces() == {"count": 2, "n-0": 1, "n-1": 1, "n-2": 1, "n-3": 1, "modulo": 1, "total": 1}
    assert attempt_status(store, run, 1) == "interrupted"
    assert attempt_status(store, run, 2) == "ok"


def test_a_process_with_the_same_id_is_not_taken_for_the_run(workshop: Any, layerwise: Layerwise) -> None:
    run, _ = workshop.run()
    seem_running(run)
    assert run_state(run.store, None).status == "running"
    forge(run, 1, started="1")
    assert run_state(run.store, None).status == "interrupted"
    assert layerwise("stop", "flow").code == 2  # and this process, which has that id, is still here


def test_a_run_on_another_host_is_believed_and_not_touched(workshop: Any, layerwise: Layerwise) -> None:
    run, _ = workshop.run()
    seem_running(run)
    forge(run, 1, host="far-away")
    state = run_state(run.store, None)
    assert (state.status, state.checked) == ("running", False)
    assert "far-away (not checked)" in layerwise("status").out
    refused = layerwise("stop", "flow")
    assert refused.code == 2
    assert "is said to be at work on far-away, which cannot be reached from here" in refused.err
    resumed = layerwise("resume", "flow")  # its lock is free, so nobody runs it
    assert resumed.code == 0
    assert "far-away cannot be asked whether it still runs" in resumed.err


def test_a_record_of_an_older_layerwise_proves_nothing(workshop: Any, layerwise: Layerwise) -> None:
    run, _ = workshop.run()
    seem_running(run)
    (run.folder / "attempts" / "0001.json").write_text("{}\n")
    assert "an unknown host (not checked)" in layerwise("status").out
    shutil.rmtree(run.folder / "log")
    assert "left no log" in layerwise("logs").err


def spoil_a_digit(path: Path) -> None:
    path.write_text(path.read_text().replace("scale: 10", "scale: 11"))


def spoil_the_end(path: Path) -> None:
    path.write_text(path.read_text()[:-100])


@pytest.mark.parametrize("spoil", [spoil_a_digit, spoil_the_end, Path.unlink])
def test_a_kept_workflow_that_is_damaged_or_missing_comes_back_from_the_tables(
    workshop: Any, layerwise: Layerwise, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    run, _ = workshop.run()
    seem_running(run)
    forge(run, 1, started="1")
    path = run.folder / "workflow.yaml"
    spoil(path)
    resumed = layerwise("resume", "flow")
    assert resumed.code == 0, resumed.err
    assert damage_of(path) is None
    assert Run(load_workflow(path), workshop.results, SilentDisplay()).id == run.id
    assert f"{path} is" in caplog.text
    assert "written again, from the tables" in caplog.text
    for tree in ("tables", "copies"):
        shutil.rmtree(workshop.results / tree / "runs")
    assert layerwise("status").code == 0
    spoil(path)
    refused = layerwise("resume", "flow")
    assert refused.code == 2
    assert "Traceback" not in refused.err


def test_looking_at_runs_loads_neither_torch_nor_ray(workshop: Any) -> None:
    workshop.run()
    script = "import sys; from layerwise.pipeline.cli import app; app(standalone_mode=False); " + (
        "print('heavy:', sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    for command in (["status"], ["status", "flow"], ["logs"], ["resume", "flow"]):
        arguments = [sys.executable, "-c", script, *command, "--results", str(workshop.results)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
        assert "heavy: []" in done.stdout, done.stderr


def test_an_attempt_number_that_is_taken_is_not_taken_twice(
    workshop: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, _ = workshop.run()
    monkeypatch.setattr(attempt_module, "attempt_numbers", lambda folder: [])
    assert attempt_module.begin_attempt(run.folder, "inline", [], tmp_path).number == 2


def test_an_empty_results_folder_has_no_runs(workshop: Any, layerwise: Layerwise) -> None:
    Store.open(workshop.results, create=True)
    assert layerwise("status").code == 0
    assert "holds no run yet" in layerwise("status", "flow").err


# --- stop ---


def test_a_stopped_run_says_so_everywhere_and_its_follower_ends(
    workshop: Any, at_work: subprocess.Popen[str], layerwise: Layerwise, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    follower = begin("logs", "flow", "-f")
    assert follower.stdout is not None
    assert ": 4 stages" in follower.stdout.readline()
    outcome = layerwise("stop", "flow")
    assert (outcome.code, outcome.out) == (0, "")
    assert ": stopped; to go on: layerwise resume flow-" in outcome.err
    assert at_work.wait(timeout=120) == 3
    out, err = follower.communicate(timeout=120)
    assert follower.returncode == 3, err
    assert "- stopped after" in out.splitlines()[-1]
    store = Store.open(workshop.results)
    assert store.rows("runs")[-1]["status"] == "stopped"
    assert [(row["stage"], row["status"]) for row in store.rows("stages")] == [("numbers", "stopped")]
    assert list(statuses(store).values()) == ["stopped", "not started", "not started", "not started"]
    assert layerwise("stop", "flow") == outcome
    assert store.rows("runs")[-1]["status"] == "stopped"


def test_a_finished_run_cannot_be_stopped(workshop: Any, layerwise: Layerwise) -> None:
    workshop.run()
    outcome = layerwise("stop", "flow")
    assert outcome.code == 2
    assert "is already finished (ok)" in outcome.err


def test_a_run_that_does_not_end_in_time_is_told(workshop: Any, at_work: subprocess.Popen[str]) -> None:
    at_work.send_signal(signal.SIGSTOP)
    with pytest.raises(LayerwiseError, match=f"process {at_work.pid} of run flow-.* is still there") as caught:
        stop(Store.open(workshop.results), "flow", timeout=0)
    assert caught.value.hint
    at_work.send_signal(signal.SIGCONT)
    assert at_work.wait(timeout=120) == 3


@pytest.mark.parametrize(("error", "wanted"), [(PermissionError, UsageError), (ProcessLookupError, None)])
def test_a_signal_that_does_not_arrive(
    workshop: Any, monkeypatch: pytest.MonkeyPatch, error: type[OSError], wanted: type[Exception] | None
) -> None:
    run, _ = workshop.run()
    seem_running(run)

    def kill(pid: int, number: int) -> None:
        forge(run, 1, started="1")
        raise error

    monkeypatch.setattr(lifecycle.os, "kill", kill)
    monkeypatch.setattr(lifecycle, "_running", lambda store, state: replace(state.attempt.process, boot="old"))
    if wanted is None:
        assert stop(run.store, "flow", 1).status == "interrupted"
    else:
        with pytest.raises(wanted, match="belongs to another user"):
            stop(run.store, "flow", 1)


# --- resume ---


def test_a_run_at_work_is_not_resumed(workshop: Any, at_work: subprocess.Popen[str], layerwise: Layerwise) -> None:
    outcome = layerwise("resume", "flow")
    assert outcome.code == 4
    assert f"is at work, in process {at_work.pid}\nhint: `layerwise logs -f` follows it" in outcome.err
    assert "go on with" not in outcome.err
    assert len(list(workshop.results.glob("runs/*/attempts/*"))) == 1


def test_of_two_who_resume_at_once_the_second_is_refused(
    workshop: Any, at_work: subprocess.Popen[str], layerwise: Layerwise
) -> None:
    """The second looks before the first has written that it runs, so that only the lock can tell."""
    store = Store.open(workshop.results)
    at_work.kill()
    at_work.communicate()
    state = run_state(store, "flow")
    first, second = (reopen(store, state, SilentDisplay()) for _ in range(2))
    worker = threading.Thread(target=first.execute, args=("inline",), kwargs={"wait": False})
    workshop.traces()
    worker.start()
    while not list((workshop.folder / "traces").glob("n-2:*")):
        time.sleep(0.01)
    with pytest.raises(StoreError, match=f"is at work already, in process {os.getpid()}") as caught:
        second.execute("inline", wait=False)
    assert caught.value.exit_code == 4
    assert layerwise("resume", "flow").code == 4
    workshop.switch("n-2", None)
    worker.join()
    assert run_state(store, "flow").status == "ok"
    assert workshop.traces()["n-2"] == 1


def test_a_finished_run_is_not_run_again(workshop: Any, layerwise: Layerwise) -> None:
    run, _ = workshop.run()
    outcome = layerwise("resume", "flow")
    assert (outcome.code, outcome.err) == (0, f"run {run.id} is finished already\n")
    assert len(list((run.folder / "attempts").iterdir())) == 1


def test_a_run_whose_text_has_changed_is_another_run(workshop: Any, layerwise: Layerwise) -> None:
    workshop.switch("n-1", "refuse")
    run, _ = workshop.prepare()
    with pytest.raises(LayerwiseError):
        run.execute("inline")
    (workshop.folder / "calibration.txt").write_text("something else")
    outcome = layerwise("resume", "flow")
    assert outcome.code == 2
    assert "this would be another run, flow-" in outcome.err
    (workshop.folder / "calibration.txt").unlink()
    outcome = layerwise("resume", "flow")
    assert outcome.code == 2
    assert "data.calibration.text" in outcome.err
    assert "file not found" in outcome.err


def test_a_resumed_run_that_fails_again_says_how_to_go_on(workshop: Any, layerwise: Layerwise) -> None:
    workshop.switch("n-1", "refuse")
    run, _ = workshop.prepare()
    with pytest.raises(LayerwiseError):
        run.execute("inline")
    outcome = layerwise("resume", "flow", "--executor", "inline")
    assert outcome.code == 2
    assert f"go on with: layerwise resume flow --executor inline --results {workshop.results}" in outcome.err
    assert "--attempt 1 shows the one before" in layerwise("logs").err
    assert len(layerwise("logs", "--attempt", 1).out.splitlines()) == 6
    assert "did you mean 'ray'?" in layerwise("resume", "flow", "--executor", "rai").err


# --- names ---


@pytest.mark.parametrize("command", ["status", "logs", "stop", "resume"])
def test_an_unknown_run_is_answered_with_the_nearest(workshop: Any, layerwise: Layerwise, command: str) -> None:
    run, _ = workshop.run()
    outcome = layerwise(command, "flaw-12")
    assert outcome.code == 2
    assert f"there is no run 'flaw-12'\nhint: the nearest: {run.id}\n" in outcome.err
    other, _ = workshop.run("stages.parity.with.base=3")
    outcome = layerwise(command, "flow-"[:3])
    assert outcome.code == 2
    assert f"is ambiguous: {other.id}, {run.id}" in outcome.err


def test_an_unknown_stage_or_attempt_is_answered_with_what_there_is(workshop: Any, layerwise: Layerwise) -> None:
    workshop.run()
    outcome = layerwise("logs", "--stage", "numbrs")
    assert outcome.code == 2
    assert "has no stage 'numbrs' (did you mean 'numbers'?)" in outcome.err
    outcome = layerwise("logs", "--attempt", 2)
    assert outcome.code == 2
    assert "has no attempt 2\nhint: it has 1" in outcome.err


def test_a_stage_of_a_foreach_is_found_by_either_name(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    log = tmp_path / "runs" / "r" / "log" / "0001.log"
    log.parent.mkdir(parents=True)
    log.write_text("T [search@ilp] a [search]\nT [searching] b\nT - c\nT [search@evolve] d\nT [sea")
    assert list(read_log(store, "r", 1, "search")) == ["T [search@ilp] a [search]", "T [search@evolve] d"]
    assert list(read_log(store, "r", 1, "search@ilp")) == ["T [search@ilp] a [search]"]
    assert len(list(read_log(store, "r", 1))) == 4


def test_whoever_follows_sees_each_line_once_and_then_the_end(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = workshop.run()
    statuses = iter(["running", "running", "ok"])
    monkeypatch.setattr(lifecycle, "attempt_status", lambda *arguments: next(statuses))
    monkeypatch.setattr(lifecycle, "SECONDS_BETWEEN_LOOKS", 0)
    monkeypatch.setattr(lifecycle, "SECONDS_BETWEEN_STORE_LOOKS", 0)
    log = run.folder / "log" / "0001.log"
    whole = log.read_text().splitlines(keepends=True)
    log.write_text(whole[0] + whole[1][:10])
    seen = []
    for line in follow_log(run.store, run.id, 1):
        seen.append(line)
        log.write_text("".join(whole))
    assert seen == [line.rstrip("\n") for line in whole]


# --- the real thing ---


def test_a_real_run_stopped_in_the_middle_and_resumed_without_its_file_ends_with_the_same_frontier(
    tiny_workflow: Path, tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    project = tmp_path / "project"
    shutil.copytree(tiny_workflow.parent, project)
    results, undisturbed = tmp_path / "results", tmp_path / "undisturbed"

    def layerwise(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "layerwise", *map(str, arguments)]
        processes.append(subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return processes[-1]

    plain = layerwise("run", project / "flow.yaml", "--results", undisturbed, "--executor", "inline")
    assert plain.wait(timeout=600) == 0

    run = layerwise("run", project / "flow.yaml", "--results", results, "--executor", "inline")
    while len(list(results.glob("work/*/journal/*/*.json"))) < 3:
        assert run.poll() is None, run.communicate()
        time.sleep(0.001)
    run.send_signal(signal.SIGSTOP)  # so that it cannot get away before it is stopped for good
    stopping = layerwise("stop", "flow", "--results", results)
    while not has_pending_signal(run.pid):
        assert stopping.poll() is None, stopping.communicate()
        time.sleep(0.01)
    run.send_signal(signal.SIGCONT)
    assert run.wait(timeout=120) == 3
    _, err = stopping.communicate(timeout=120)
    assert stopping.returncode == 0, err
    store = Store.open(results)
    (stopped,) = [row for row in store.rows("stages") if row["status"] == "stopped"]
    finished = {path.name for path in results.glob(f"work/{stopped['stage_key']}/journal/*/*.json")}
    assert len(finished) >= 1

    (project / "flow.yaml").unlink()
    resumed = layerwise("resume", "flow", "--results", results)
    out, err = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, err
    assert "Pareto frontier" in out
    rows = [row for row in store.rows("stages") if row["stage"] == stopped["stage"]]
    assert (rows[-1]["cache"], rows[-1]["status"]) == ("partial", "ok")
    assert rows[-1]["items_cached"] >= len(finished)
    made = [row["stage_key"] for row in store.rows("stages") if row["status"] == "ok" and row["cache"] != "hit"]
    assert len(made) == len(set(made)) == 8
    tables = [frontier_table(Store.open(root), dominated=True).to_csv(index=False) for root in (results, undisturbed)]
    assert tables[0] == tables[1]


def has_pending_signal(pid: int) -> bool:
    with suppress(FileNotFoundError):
        status = Path(f"/proc/{pid}/status").read_text()
        return any(int(mask, 16) for mask in re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)$", status, re.MULTILINE))
    return False
