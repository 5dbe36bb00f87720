"""What is published is whole, durable and never overwritten, whenever the writer is killed."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from layerwise.errors import DiskFull
from layerwise.results import durable
from layerwise.results.durable import disk_full_named, make_folder, publish_file, publish_folder, replace_file

OLD, NEW = b"old" * 1000, b"new" * 2000


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def a_folder(path: Path) -> Path:
    (path / "deep").mkdir(parents=True)
    (path / "one").write_bytes(OLD)
    (path / "deep" / "two").write_bytes(NEW)
    return path


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that SIGKILLs itself before its `step`-th system call; True if it was killed."""
    child = os.fork()
    if child == 0:
        left = step

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def wrapper(*args: object, **kwargs: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return wrapper

        for name in ("open", "fsync", "link", "rename", "replace", "unlink", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)  # never back into pytest
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def every_crash(work: Callable[[Path], object], tmp_path: Path) -> list[Path]:
    """Run the work in fresh folders, killed one system call later each time, until it is not killed any more."""
    folders: list[Path] = []
    while True:
        folder = tmp_path / str(len(folders))
        folder.mkdir()
        folders.append(folder)
        if not killed_at(len(folders), lambda folder=folder: work(folder)):
            return folders


def test_a_published_file_has_its_content_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    assert publish_file(tmp_path / "a" / "b" / "file", NEW, tmp_path / "tmp")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == NEW
    assert files_in(tmp_path) == [tmp_path / "a" / "b" / "file"]


def test_a_second_publish_under_the_same_name_changes_nothing(tmp_path: Path) -> None:
    publish_file(tmp_path / "file", OLD, tmp_path / "tmp")
    assert not publish_file(tmp_path / "file", NEW, tmp_path / "tmp")
    assert (tmp_path / "file").read_bytes() == OLD
    assert files_in(tmp_path) == [tmp_path / "file"]


def test_of_many_writers_of_one_name_exactly_one_wins(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: publish_file(tmp_path / "file", bytes([i]) * 9, tmp_path / "tmp"), range(32)))
    assert sum(won) == 1
    assert (tmp_path / "file").read_bytes() == bytes([won.index(True)]) * 9


def test_a_published_file_can_be_read_by_others(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        publish_file(tmp_path / "file", NEW, tmp_path / "tmp")
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_a_file_system_without_links_is_served_by_a_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    assert publish_file(tmp_path / "file", NEW, tmp_path / "tmp")
    assert not publish_file(tmp_path / "file", OLD, tmp_path / "tmp")
    assert files_in(tmp_path) == [tmp_path / "file"]
    assert (tmp_path / "file").read_bytes() == NEW


def test_content_is_flushed_before_the_name_is_given_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", os.fstat(fd).st_ino)), fsync(fd)))
    monkeypatch.setattr(os, "link", lambda a, b, **_: (events.append(("link", Path(a).stat().st_ino)), link(a, b)))
    (tmp_path / "tmp").mkdir()
    publish_file(tmp_path / "file", NEW, tmp_path / "tmp")
    file, folder = (tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino
    assert events == [("sync", file), ("link", file), ("sync", folder)]


def test_a_new_folder_is_flushed_into_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_folder", synced.append)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]


def test_a_writer_killed_at_any_call_leaves_no_file_or_the_whole_file(tmp_path: Path) -> None:
    folders = every_crash(lambda folder: publish_file(folder / "x" / "file", NEW, folder / "tmp"), tmp_path)
    assert len(folders) > 6
    for folder in folders:
        path = folder / "x" / "file"
        assert not path.exists() or path.read_bytes() == NEW
        publish_file(path, NEW, folder / "tmp")
        assert path.read_bytes() == NEW


def test_a_replacement_killed_at_any_call_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        replace_file(folder / "file", NEW, folder / "tmp")

    seen = set()
    for step in range(1, 20):
        folder = tmp_path / str(step)
        folder.mkdir()
        (folder / "file").write_bytes(OLD)
        if not killed_at(step, lambda folder=folder: work(folder)):
            break
        seen.add((folder / "file").read_bytes())
    assert seen == {OLD, NEW}
    assert (folder / "file").read_bytes() == NEW
    assert files_in(folder) == [folder / "file"]


def test_a_folder_publish_killed_at_any_call_leaves_no_folder_or_the_whole_folder(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        publish_folder(a_folder(folder / "src"), folder / "k2" / "key")

    folders = every_crash(work, tmp_path)
    assert len(folders) > 6
    for folder in folders:
        done = folder / "k2" / "key"
        if done.exists():
            assert (done / "one").read_bytes() == OLD
            assert (done / "deep" / "two").read_bytes() == NEW
            assert not (folder / "src").exists()


def test_the_loser_of_a_folder_publish_discards_its_copy(tmp_path: Path) -> None:
    assert publish_folder(a_folder(tmp_path / "first"), tmp_path / "key")
    (tmp_path / "key" / "one").write_bytes(b"winner")
    assert not publish_folder(a_folder(tmp_path / "second"), tmp_path / "key")
    assert not (tmp_path / "second").exists()
    assert (tmp_path / "key" / "one").read_bytes() == b"winner"


def test_a_published_folder_may_hold_a_link_to_nothing(tmp_path: Path) -> None:
    (a_folder(tmp_path / "src") / "dangling").symlink_to("nowhere")
    assert publish_folder(tmp_path / "src", tmp_path / "key")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    make_folder(tmp_path / "tmp")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(DiskFull) as caught:
        publish_file(tmp_path / "file", NEW, tmp_path / "tmp")
    monkeypatch.undo()
    assert str(tmp_path / "file") in caught.value.message
    assert "6,000 bytes" in caught.value.message
    assert "free space" in str(caught.value.hint)
    assert files_in(tmp_path) == []
    assert publish_file(tmp_path / "file", NEW, tmp_path / "tmp")


def test_a_real_file_size_limit_is_a_full_disk_and_the_old_content_stays(tmp_path: Path) -> None:
    replace_file(tmp_path / "file", OLD, tmp_path / "tmp")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(DiskFull):
            replace_file(tmp_path / "file", NEW * 100, tmp_path / "tmp")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "file").read_bytes() == OLD
    assert files_in(tmp_path) == [tmp_path / "file"]


def test_a_full_disk_met_by_safetensors_is_recognised_by_its_text(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="no space left"), disk_full_named(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    for error in (OSError(errno.EACCES, "denied"), ValueError("no number"), RuntimeError("(os error 2)")):
        with pytest.raises(type(error)) as caught, disk_full_named(tmp_path):
            raise error
        assert caught.value is error
