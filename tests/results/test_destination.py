"""A file that cannot be written is refused in words, before and while it is written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from layerwise.errors import DiskFull, UsageError
from layerwise.results.destination import check_destination, writing


def test_a_new_and_an_existing_file_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for _ in range(2):
        with writing(path):
            path.write_text("text")
    check_destination(Path("no-such-file-in-this-folder"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "it is a folder"),
        ("nowhere/file", "nowhere does not exist"),
        ("file/below", "file is no folder"),
        ("nowhere/further/file", "further does not exist"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_made(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=said) as caught:
        check_destination(tmp_path / name)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_is_not_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # a mode would not stop root
    with pytest.raises(UsageError, match="permission denied"):
        check_destination(tmp_path / "file")


def test_what_shows_only_while_writing_is_told_too() -> None:
    path = Path("/proc/no-such-file")  # its folder says that it can be written
    with pytest.raises(UsageError, match=f"cannot write {path}: "), writing(path):
        path.write_text("text")


def test_a_full_disk_and_a_mistake_of_ours_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(DiskFull), writing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "file"):
        raise ZeroDivisionError
