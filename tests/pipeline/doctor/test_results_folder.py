"""The results folder: each promise of its disk that the store builds on, kept and broken; nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from layerwise.pipeline import artifacts
from layerwise.pipeline.doctor import results_folder
from layerwise.pipeline.doctor.check import Finding, Surroundings
from layerwise.pipeline.doctor.examination import before_the_deadline
from layerwise.results import durable

TRIED = [results_folder.exclusive_create, results_folder.rename, results_folder.flush, results_folder.lock]


def test_a_results_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    surroundings = Surroundings(tmp_path / "parent" / "some" / "results")
    assert results_folder.place(surroundings).found.endswith(f"is not there yet; looking at {tmp_path / 'parent'}")
    for check in TRIED:
        assert check(surroundings).state == "ok", check
    assert list((tmp_path / "parent").iterdir()) == []


def test_a_results_folder_is_left_as_it_was(here: Surroundings) -> None:
    (here.results / "layerwise.json").write_text("{}")
    assert results_folder.place(here) == Finding("ok", str(here.results))
    for check in TRIED:
        assert check(here).state == "ok", check
    assert [path.name for path in here.results.iterdir()] == ["layerwise.json"]


def test_a_results_folder_that_is_a_file_or_read_only_is_a_problem(
    here: Surroundings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert results_folder.place(Surroundings(tmp_path / "file")).found == f"{tmp_path / 'file'} is no folder"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert results_folder.place(here).found == f"{here.results} cannot be written to"
    for check in TRIED:
        assert before_the_deadline(check, Surroundings(tmp_path / "file")).state == "problem", check


@pytest.mark.parametrize(
    ("line", "state", "found"),
    [
        ("/dev/vda / ext4 rw 0 0", "ok", "ext4 at /"),
        ("server:/x {here} nfs4 rw 0 0", "warning", "nfs4 at {here}, over the network"),
        ("//server/x {parent} cifs rw 0 0", "warning", "cifs at {parent}"),
        ("me@host: {here} fuse.sshfs rw 0 0", "warning", "fuse.sshfs"),
        ("server:/x {here}x nfs rw 0 0", "ok", "ext4 at /"),
        ("server:/x {here} nfs rw 0 0\ntmpfs {here} tmpfs rw 0 0", "ok", "tmpfs at {here}"),
        ("nonsense", "ok", "not known"),
    ],
)
def test_a_folder_over_the_network_draws_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, state: str, found: str
) -> None:
    folder = tmp_path / "with a blank" / "results"
    folder.mkdir(parents=True)
    names = {"here": str(folder), "parent": str(folder.parent)}
    escaped = {name: text.replace(" ", "\\040") for name, text in names.items()}
    (tmp_path / "mounts").write_text(f"/dev/vda / ext4 rw 0 0\n{line.format(**escaped)}\n")
    monkeypatch.setattr(results_folder, "_MOUNTS", tmp_path / "mounts")
    finding = results_folder.file_system(Surroundings(folder))
    assert finding.state == state
    assert found.format(**names) in finding.found


def test_a_system_without_a_list_of_mounts_is_no_problem(
    here: Surroundings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(results_folder, "_MOUNTS", tmp_path / "none")
    assert results_folder.file_system(here) == Finding("ok", "kind not known on this system")


@pytest.mark.parametrize(
    ("free", "state"),
    [(5 * 10**9, "ok"), (5 * 10**9 - 1, "warning"), (200 * 10**6, "warning"), (200 * 10**6 - 1, "problem")],
)
def test_little_space_is_a_warning_and_none_a_problem(
    here: Surroundings, monkeypatch: pytest.MonkeyPatch, free: int, state: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(free))
    assert results_folder.disk_space(here).state == state


def test_a_folder_without_hard_links_draws_a_warning(here: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert results_folder.exclusive_create(here).state == "warning"


def test_names_that_are_given_twice_are_a_problem(here: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "publish_file", lambda path, data, tmp: path.write_bytes(data) > 0)
        assert results_folder.exclusive_create(here).found == "a file was created twice under one name"
    monkeypatch.setattr(durable, "_link", lambda temporary, path: bool(path.write_bytes(temporary.read_bytes())))
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: None)
    assert results_folder.exclusive_create(here).found == "a hard link replaced a file"


def test_renames_that_do_the_wrong_thing_are_a_problem(here: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "replace_file", lambda path, data, tmp: path.write_bytes(b"old"))
        assert results_folder.rename(here).found == "a rename did not replace a file"

    def over(source: Path, target: Path) -> bool:
        shutil.rmtree(target, ignore_errors=True)
        source.rename(target)
        return True

    monkeypatch.setattr(durable, "publish_folder", over)
    assert results_folder.rename(here).found == "a rename replaced a folder"


def test_a_folder_that_cannot_be_flushed_is_a_problem(here: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    assert results_folder.flush(here).found == "fsync fails: Invalid argument"


@pytest.mark.parametrize(
    ("tries", "found"),
    [
        (["free", "free"], "two processes got the same lock"),
        (["held", "held"], "a lock was not given back"),
        (["!no fcntl", "free"], "another process cannot try the lock: no fcntl"),
        (["held", "free"], None),
    ],
)
def test_a_lock_must_keep_another_process_out(
    here: Surroundings, answers: Callable[..., None], tries: list[str], found: str | None
) -> None:
    answers(*tries)
    finding = results_folder.lock(here)
    assert (finding.state, finding.found) == (
        ("problem", found) if found else ("ok", "flock keeps another process out")
    )


def test_a_folder_without_locks_is_a_problem(here: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(artifacts, "fcntl", SimpleNamespace(flock=refuse, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB))
    assert results_folder.lock(here).found == "flock fails: No locks available"
