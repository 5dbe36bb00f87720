"""What a run leaves for those who watch: whole lines, and the last thing it said of its progress."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from layerwise.errors import UsageError
from layerwise.pipeline.display import SilentDisplay
from layerwise.pipeline.runs import log as runlog
from layerwise.pipeline.runs.log import ProgressFile, log_file, read_progress, recorded

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")


def texts(path: Path) -> list[str]:
    """The lines of a log without their times."""
    lines = path.read_text().splitlines()
    assert all(TIME.match(line) for line in lines)
    return [TIME.sub("", line, count=1) for line in lines]


def test_every_event_is_a_line_with_its_stage(workshop: Any) -> None:
    run, _ = workshop.run()
    assert [re.sub(r"[\d.]+ s$", "T s", line) for line in texts(log_file(run.folder, 1))] == [
        f"- run {run.id}: 4 stages",
        *(
            line
            for stage, uses in [("numbers", "count"), ("parity", "modulo"), ("sum", "total"), ("aside", "count")]
            for line in (f"[{stage}] {uses} (not there yet)", f"[{stage}] done in T s")
        ),
        "- finished after T s",
    ]


def test_each_attempt_has_its_log_and_a_cached_one_leaves_no_other_file(workshop: Any) -> None:
    run, _ = workshop.run()
    before = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*")}
    told = (run.folder / "progress.json").stat().st_mtime_ns
    workshop.run()
    after = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*")}
    assert after - before == {"attempts/0002.json", "log/0002.log"}
    assert (run.folder / "progress.json").stat().st_mtime_ns == told
    assert texts(log_file(run.folder, 2))[1:5] == [
        f"[{stage}] cached" for stage in ("numbers", "parity", "sum", "aside")
    ]


def test_an_error_is_there_with_its_hint_and_a_mistake_of_ours_with_its_place(workshop: Any) -> None:
    for number, action in enumerate(("refuse", "break", "interrupt"), 1):
        workshop.switch("n-1", action)
        run, _ = workshop.prepare()
        with pytest.raises(BaseException):  # noqa: B017 - each its own
            run.execute("inline")
        lines = texts(log_file(run.folder, number))
        if action == "refuse":
            assert lines[-4].startswith("[numbers] error: stage numbers: budget 1 bits is below")
            assert lines[-3].startswith("[numbers] hint: ")
            assert lines[-2] == "[numbers] while working on n-1"
        if action == "break":
            assert any(line.startswith("[numbers]   File ") for line in lines)
            assert "[numbers] ValueError: a mistake of ours" in lines
        assert lines[-1].startswith("- stopped after" if action == "interrupt" else "- failed after")


def test_a_disk_without_room_for_a_line_does_not_stop_the_run(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Path.write_bytes

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_for_progress(path: Path, data: bytes) -> int:
        return full() if path.name.startswith("progress") else write_bytes(path, data)

    monkeypatch.setattr(runlog, "os", SimpleNamespace(**{**vars(os), "write": full}))
    monkeypatch.setattr(Path, "write_bytes", full_for_progress)
    run, _ = workshop.run()
    assert workshop.output(run, "sum") == 2
    assert log_file(run.folder, 1).read_bytes() == b""
    assert read_progress(run.folder) is None


def test_a_folder_that_takes_no_log_does_not_stop_the_run(workshop: Any) -> None:
    run, _ = workshop.prepare()
    run.folder.mkdir(parents=True)
    (run.folder / "log").write_text("in the way")
    run.execute("inline")
    assert workshop.output(run, "sum") == 2


def test_the_display_is_told_the_same_and_the_error_passes(tmp_path: Path) -> None:
    notes: list[str] = []

    class Noting(SilentDisplay):
        def note(self, text: str) -> None:
            notes.append(text)

    with pytest.raises(UsageError), recorded(Noting(), tmp_path, 1) as display:
        display.note("waiting\nfor long")
        raise UsageError("enough")
    assert notes == ["waiting\nfor long"]
    assert texts(log_file(tmp_path, 1))[:3] == ["- waiting", "- for long", "- error: enough"]


def test_progress_is_written_at_most_once_in_a_while_and_the_last_word_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog, "SECONDS_BETWEEN_UPDATES", 3600.0)
    file = ProgressFile(tmp_path, 3)
    file.progress("levels", 1, 4, "before any stage")
    file.end()
    assert read_progress(tmp_path) is None
    file.start("levels", "compress", "not there yet")
    file.progress("levels", 1, 4, "units")
    file.progress("levels", 2, 4, "units")
    told = read_progress(tmp_path)
    assert told is not None
    assert (told.attempt, told.stage, told.reason, told.done) == (3, "levels", "not there yet", None)
    file.end()
    told = read_progress(tmp_path)
    assert told is not None
    assert (told.done, told.total, told.note) == (2, 4, "units")
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]


def test_what_was_said_too_soon_is_written_later_without_another_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog, "SECONDS_BETWEEN_UPDATES", 0.05)
    file = ProgressFile(tmp_path, 1)
    file.start("levels", "compress", "not there yet")
    file.progress("levels", 1, 4, "units")
    while (told := read_progress(tmp_path)) is None or told.done != 1:
        pass
    file.end()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "x"}', '{"else": 1}'])
def test_a_progress_file_that_cannot_be_read_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    assert read_progress(tmp_path) is None
