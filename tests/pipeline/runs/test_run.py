"""The engine: what is run, what is found, what is told, and what is left when something goes wrong."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import CorruptArtifact, DiskFull, InfeasibleBudget, StoreError, UnsupportedModel
from layerwise.pipeline.runs import run as run_module
from layerwise.results.store import MARKER

STAGES = ["numbers", "parity", "sum", "aside"]
SCRIPT = Path(__file__).parents[1] / "fake_stages.py"


def start(workshop: Any, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """The command line with the fake stages, in a process of its own."""
    command = [sys.executable, str(SCRIPT), *arguments, str(workshop.flow), "--results", str(workshop.results)]
    return subprocess.Popen(
        [*command, "--executor", "inline"], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def wait_until(holds: Any) -> None:
    while not holds():
        time.sleep(0.01)


def latest(run: Any) -> dict[str, dict[str, Any]]:
    """The last row of every stage of a run."""
    return {row["stage"]: row for row in run.store.rows("stages", run=run.id)}


# --- what is run ---


def test_everything_runs_once_and_then_never_again(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, display = workshop.run()
    assert list(display.started) == STAGES
    assert set(display.started.values()) == {"not there yet"}
    assert workshop.traces() == {"count": 2, "n-0": 2, "n-1": 2, "n-2": 1, "n-3": 1, "modulo": 1, "total": 1}
    assert workshop.output(run, "sum") == 2
    assert workshop.output(run, "aside") == [0, 10]

    opened: list[str] = []
    monkeypatch.setattr(run_module, "open_executor", opened.append)
    again, display = workshop.run()
    assert again.id == run.id
    assert display.of("cached") == STAGES
    assert not display.started
    assert not workshop.traces()
    assert not opened


def test_the_same_bytes_from_a_changed_stage_leave_the_rest_cached(workshop: Any) -> None:
    workshop.run()
    run, display = workshop.run("stages.numbers.with.scale=3")
    assert list(display.started) == ["numbers", "parity"]
    assert display.of("cached") == ["sum", "aside"]
    assert workshop.output(run, "numbers") == [0, 3, 6, 9]
    assert workshop.output(run, "sum") == 2


def test_going_back_to_an_earlier_parameter_finds_everything(workshop: Any) -> None:
    first, _ = workshop.run()
    workshop.run("stages.numbers.with.scale=2")
    workshop.traces()
    back, display = workshop.run("stages.numbers.with.scale=1")
    assert back.id == first.id
    assert display.of("cached") == STAGES
    assert not workshop.traces()


def test_a_results_folder_copied_by_a_program_that_follows_links_goes_on(workshop: Any) -> None:
    run, _ = workshop.run()
    copy = workshop.folder / "copy"
    shutil.copytree(workshop.results, copy)  # a stage's link is a folder now
    again, display = workshop.run(results=copy)
    assert display.of("cached") == STAGES
    assert (again.folder / "stages" / "sum").is_symlink()
    assert workshop.output(again, "sum") == workshop.output(run, "sum")


def test_an_artifact_that_was_deleted_is_made_again(workshop: Any) -> None:
    run, _ = workshop.run()
    folder = (run.folder / "stages" / "sum").resolve()
    (folder / "total.json").unlink()
    (folder / "manifest.json").unlink()
    folder.rmdir()
    workshop.traces()
    run, display = workshop.run()
    assert display.started == {"sum": "no longer there"}
    assert workshop.traces() == {"total": 1}
    assert workshop.output(run, "sum") == 2


# --- who a run is ---


def test_a_run_is_the_same_wherever_its_files_stand_and_another_when_they_change(
    workshop: Any, fake_stages: Any, tmp_path: Path
) -> None:
    run, _ = workshop.prepare()
    moved = fake_stages.Workshop(tmp_path / "elsewhere")
    assert moved.prepare()[0].id == run.id
    assert run.id.startswith("flow-")
    (moved.folder / "calibration.txt").write_text("twice upon a time")
    assert moved.prepare()[0].id != run.id
    (workshop.folder / "model" / "config.json").write_text('{"other": 1}')
    assert workshop.prepare()[0].id != run.id


@pytest.mark.parametrize("text", ["stages.numbers.with.scale=2", "data.calibration.sequence_length=7", "name=other"])
def test_another_parameter_another_text_or_another_name_makes_another_run(workshop: Any, text: str) -> None:
    assert workshop.prepare(text)[0].id != workshop.prepare()[0].id


def test_more_memory_for_a_task_changes_neither_run_nor_artifact(workshop: Any) -> None:
    run, _ = workshop.run()
    more, display = workshop.run("resources.memory=1GiB")
    assert more.id == run.id
    assert display.of("cached") == STAGES


def test_a_changed_text_reruns_only_what_reads_it(workshop: Any) -> None:
    workshop.run()
    (workshop.folder / "calibration.txt").write_text("twice upon a time")
    _, display = workshop.run()
    assert list(display.started) == ["numbers", "aside"]
    assert all(reason.startswith("changed: data.data") for reason in display.started.values())
    assert display.of("cached") == ["parity", "sum"]


# --- the account ---


def test_the_tables_tell_the_whole_story(workshop: Any) -> None:
    run, _ = workshop.run(argv=["layerwise", "run", "flow.yaml"])
    begun, ended = run.store.rows("runs", run=run.id)
    assert (begun["status"], ended["status"]) == ("running", "ok")
    assert begun["started_at"] <= ended["ended_at"]
    assert ended["seconds"] > 0
    assert begun["argv"] == ["layerwise", "run", "flow.yaml"]
    assert json.loads(begun["resolved"])["stages"]["numbers"]["with"]["items"] == 4
    rows = latest(run)
    assert list(rows) == STAGES
    assert [rows[stage]["uses"] for stage in STAGES] == ["count", "modulo", "total", "count"]
    for row in rows.values():
        assert (row["status"], row["cache"], row["attempt"]) == ("ok", "miss", 1)
        assert len(row["stage_key"]) == len(row["output_digest"]) == 64
        assert row["peak_rss_bytes"] > 2**20
        assert row["items_cached"] == 0
    assert [rows[stage]["items_total"] for stage in STAGES] == [4, 0, 0, 2]
    units = run.store.rows("units")
    assert sorted((row["stage"], row["unit"], row["n_weights"]) for row in units)[:3] == [
        ("aside", "n-0", 0),
        ("aside", "n-1", 10),
        ("numbers", "n-0", 0),
    ]
    assert len(units) == 6
    workshop.run()
    assert [row["status"] for row in run.store.rows("runs")] == ["running", "ok", "running", "ok"]
    assert latest(run) == rows  # what is known already is not written again
    assert len(run.store.rows("units")) == 6
    assert not (run.store.root / "work").exists() or not any((run.store.root / "work").iterdir())


# --- what goes wrong ---


def test_an_interrupted_stage_goes_on_where_it_was(workshop: Any) -> None:
    workshop.switch("n-2", "refuse")
    run, _ = workshop.prepare()
    with pytest.raises(InfeasibleBudget):
        run.execute("inline")
    assert workshop.traces() == {"count": 1, "n-0": 1, "n-1": 1, "n-2": 1}
    workshop.switch("n-2", None)
    planned = workshop.prepare()[0].plan()[0]
    assert planned.reason == "interrupted before"
    run, display = workshop.run()
    assert display.started["numbers"] == "interrupted before"
    assert workshop.traces() == {"count": 2, "n-2": 1, "n-3": 1, "n-0": 1, "n-1": 1, "modulo": 1, "total": 1}
    rows = latest(run)
    assert (rows["numbers"]["cache"], rows["numbers"]["items_cached"]) == ("partial", 2)
    assert ("numbers", 2, 4) in [(stage, cached, total) for stage, _, cached, total in display.of("finish")]
    assert workshop.output(run, "numbers") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("action", "error", "status", "words"),
    [
        ("refuse", InfeasibleBudget, "failed", "stage numbers: budget 1 bits is below the least reachable 2"),
        ("break", ValueError, "failed", "a mistake of ours"),
        ("interrupt", KeyboardInterrupt, "stopped", ""),
        ("fill the disk", DiskFull, "failed", "stage numbers: cannot write"),
    ],
)
def test_a_stage_that_stops_leaves_its_error_in_the_tables(
    workshop: Any, action: str, error: type[BaseException], status: str, words: str
) -> None:
    workshop.switch("n-1", action)
    run, display = workshop.prepare()
    with pytest.raises(error) as caught:
        run.execute("inline")
    assert str(caught.value).startswith(words)
    if hasattr(caught.value, "hint"):
        assert caught.value.hint
    row = latest(run)["numbers"]
    assert (row["status"], row["error_type"], row["output_digest"]) == (status, error.__name__, None)
    last = run.store.rows("runs")[-1]
    assert (last["status"], last["error_type"]) == (status, error.__name__)
    assert display.events[-1] == ("end",)
    assert list(latest(run)) == ["numbers"]


def test_a_failure_after_finished_stages_keeps_them(workshop: Any) -> None:
    workshop.switch("n-3", "refuse")
    workshop.run("stages.numbers.with.items=3")
    workshop.traces()
    run, _ = workshop.prepare("stages.aside.with.items=4", "stages.numbers.with.items=3")
    with pytest.raises(InfeasibleBudget, match="stage aside"):
        run.execute("inline")
    rows = latest(run)
    assert [rows[stage]["cache"] for stage in STAGES[:3]] == ["hit"] * 3
    assert rows["aside"]["status"] == "failed"


def test_a_table_that_cannot_be_written_stops_the_run_and_a_later_one_goes_on(
    workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = workshop.prepare()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFull, match="no space left"):
            run.execute("inline")
    run, display = workshop.run()
    assert list(display.started) == STAGES
    assert workshop.output(run, "sum") == 2


@pytest.mark.parametrize("moment", range(1, 60, 7))
def test_a_disk_that_fills_up_at_any_write_loses_nothing(
    workshop: Any, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """The disk is full from some flush on; after that the run goes on and ends as if nothing had been."""
    flushed = 0
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal flushed
        flushed += 1
        if flushed >= moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DiskFull) as caught:
            workshop.run()
    assert caught.value.hint
    before = workshop.traces()
    run, _ = workshop.run()
    assert workshop.output(run, "sum") == 2
    assert workshop.output(run, "numbers") == [0, 1, 2, 3]
    assert len(run.store.rows("units")) == 6
    finished = {row["stage_key"]: row for row in run.store.rows("stages") if row["status"] == "ok"}
    assert len(finished) == 4
    calls = [*before.items(), *workshop.traces().items()]
    assert sum(times for name, times in calls if name.startswith("n-")) <= 6 + 1  # the item in flight at most
    assert not list((workshop.results / "tmp").iterdir())


def test_a_real_file_size_limit_ends_in_one_message_and_the_run_goes_on_without_it(workshop: Any) -> None:
    workshop.switch("n-2", "write a megabyte")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    process = start(workshop, "run", preexec_fn=limit)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert out == ""
    assert "error: stage numbers: cannot write" in err
    assert "hint: free space" in err
    assert "go on with: layerwise run" in err
    assert "Traceback" not in err
    workshop.traces()
    process = start(workshop, "run")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "numbers: count (interrupted before)" in err
    assert "2 of 4 items were already done" in err
    assert workshop.traces()["n-2"] == 1


def test_a_killed_process_resumes_at_the_item_that_was_in_flight(workshop: Any) -> None:
    workshop.switch("n-3", "die")
    process = start(workshop, "run")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert workshop.traces() == {"count": 1, "n-0": 1, "n-1": 1, "n-2": 1, "n-3": 1}
    workshop.switch("n-3", None)
    run, display = workshop.run()
    assert len(list((run.folder / "attempts").glob("*.json"))) == 2
    assert display.started["numbers"] == "interrupted before"
    assert workshop.traces()["n-3"] == 1
    assert latest(run)["numbers"]["items_cached"] == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_how_to_go_on(workshop: Any, number: signal.Signals) -> None:
    workshop.switch("n-1", "wait")
    process = start(workshop, "run")
    wait_until(lambda: list((workshop.folder / "traces").glob("n-1:*")) or process.poll() is not None)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert out == ""
    assert f"stopped; to go on: layerwise run {workshop.flow}" in err
    assert "Traceback" not in err
    workshop.switch("n-1", None)
    run, _ = workshop.run()
    assert [row["status"] for row in run.store.rows("runs")] == ["running", "stopped", "running", "ok"]
    assert workshop.output(run, "sum") == 2


def test_a_second_run_of_the_same_file_waits_and_finds_everything(workshop: Any) -> None:
    workshop.switch("n-1", "wait")
    first = start(workshop, "run")
    wait_until(lambda: list((workshop.folder / "traces").glob("n-1:*")) or first.poll() is not None)
    second = start(workshop, "run")
    assert second.stderr is not None
    line = second.stderr.readline()
    assert line.startswith(f"waiting: process {first.pid} runs flow-"), line
    workshop.switch("n-1", None)
    assert first.wait(timeout=120) == 0
    _, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert err.count(": cached") == 4
    assert workshop.traces() == {"count": 2, "n-0": 2, "n-1": 2, "n-2": 1, "n-3": 1, "modulo": 1, "total": 1}


def test_another_run_with_a_stage_in_common_waits_for_that_stage(workshop: Any) -> None:
    workshop.switch("n-1", "wait")
    first = start(workshop, "run")
    wait_until(lambda: list((workshop.folder / "traces").glob("n-1:*")) or first.poll() is not None)
    second = start(workshop, "run", "-s", "stages.parity.with.base=3")
    assert second.stderr is not None
    lines = [second.stderr.readline(), second.stderr.readline()]
    assert lines[1] == f"waiting: process {first.pid} makes stage numbers\n", lines
    workshop.switch("n-1", None)
    first.communicate(timeout=120)
    _, err = second.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (0, 0), err
    assert "numbers: cached" in err
    assert workshop.traces() == {"count": 2, "n-0": 2, "n-1": 2, "n-2": 1, "n-3": 1, "modulo": 2, "total": 2}


def test_a_results_folder_of_a_newer_version_is_left_alone(workshop: Any) -> None:
    workshop.results.mkdir()
    (workshop.results / MARKER).write_text('{"format": 2}\n')
    with pytest.raises(StoreError, match="was written by a newer layerwise") as caught:
        workshop.prepare()
    assert caught.value.exit_code == 4
    assert caught.value.hint
    assert [path.name for path in workshop.results.iterdir() if path.name != "tmp"] == [MARKER]


def test_a_model_folder_without_a_model_is_refused_before_anything_runs(workshop: Any) -> None:
    (workshop.folder / "model" / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"holds no config\.json"):
        workshop.prepare()


def damage(path: Path, how: str) -> None:
    """Spoil a published file, which is read-only."""
    path.chmod(0o644)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "missing":
        path.unlink()
    elif how == "no manifest":
        path.with_name("manifest.json").unlink()
    else:
        path.with_name("manifest.json").write_text(how)


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "no manifest", "{", "[]", '{"files": {"a": 1}}'])
def test_a_damaged_artifact_is_set_aside_made_again_and_named(workshop: Any, how: str) -> None:
    run, _ = workshop.run()
    key = latest(run)["parity"]["stage_key"]
    folder = (run.folder / "stages" / "parity").resolve()
    damage(folder / "numbers.json", how)
    with pytest.raises(CorruptArtifact):
        run.artifacts.find(key)
    workshop.traces()
    run, display = workshop.run()
    (warning,) = display.of("warn")
    assert str(folder / ("numbers.json" if how in ("truncated", "flipped", "missing") else "manifest.json")) in warning
    assert "quarantine" in warning
    assert list(display.started) == ["parity"]
    assert display.of("cached") == ["numbers", "sum", "aside"]
    assert workshop.traces() == {"modulo": 1}
    assert len(list((workshop.results / "quarantine").iterdir())) == 1
    assert workshop.output(run, "sum") == 2
    assert workshop.run()[1].of("cached") == STAGES


def test_a_cached_run_reads_no_file_that_did_not_change(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.run()
    workshop.run()
    hashed: list[Any] = []
    monkeypatch.setattr("hashlib.file_digest", lambda stream, name: hashed.append(stream.name))
    workshop.run()
    assert not hashed


def test_rows_of_a_deleted_table_come_back(workshop: Any) -> None:
    run, _ = workshop.run()
    before = {table: run.store.rows(table) for table in ("runs", "stages", "units")}
    shutil.rmtree(workshop.results / "tables")
    run, display = workshop.run()
    assert display.of("cached") == STAGES
    for table, rows in before.items():
        assert run.store.rows(table)[: len(rows)] == rows
        assert list((workshop.results / "tables" / table).rglob("*.parquet"))


def test_rows_that_are_lost_for_good_are_missed_and_made_again(workshop: Any) -> None:
    run, _ = workshop.run()
    rows = run.store.read("units").drop(columns=["attempt", "written_at"])
    for tree in ("tables", "copies"):
        shutil.rmtree(workshop.results / tree / "units")
    run, display = workshop.run()
    assert display.started == dict.fromkeys(("numbers", "aside"), "its rows are missing")
    assert run.store.read("units").drop(columns=["attempt", "written_at"]).equals(rows)
    assert workshop.run()[1].of("cached") == STAGES
