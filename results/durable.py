"""Writing so that a kill or a power cut at any instant leaves either nothing or the whole thing.

Every write goes to a temporary name, is flushed to the device, and only then gets its real name; the folder that holds
the name is flushed last. So a reader never sees half a file, and what was acknowledged is still there after a crash.
A name is given with a hard link, because a link, unlike a rename, refuses to replace what exists: two writers of the
same name cannot overwrite each other, and a repeated commit is noticed. Stray temporary files are the only debris.

Standard library only, for the artifact cache uses this too. Left out: object stores (no links, no rename) and Windows
(folders cannot be flushed there).
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerwise.errors import DiskFull
from layerwise.results.links import refuse_links

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_noting: list[list[Path]] = []  # innermost last
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def publish_file(path: Path, data: bytes, tmp: Path) -> bool:
    """Create a file that must not exist yet; durable when this returns.

    Args:
        path: the name to give; missing parent folders are made.
        data: its content. The same name must always mean the same content: whoever comes second is not compared.
        tmp: a folder for the temporary file, on the same file system as `path`; made if missing. Below the folder that
            holds it, nothing on the way to `path` may be a link.
    Returns:
        True if this call created the file, False if it already existed (then nothing is changed).
    Raises:
        DiskFull: the file system took no more; nothing is left behind.
        StoreError: a link would lead the file elsewhere.
    """
    refuse_links(tmp.parent, path)
    make_folder(path.parent)
    if path.exists():
        sync_folder(path.parent)  # whoever created it may have been killed before doing so
        return False
    with _written(path, data, tmp) as temporary, disk_full_named(path, len(data)):
        created = _link(temporary, path)
        sync_folder(path.parent)
    return created


def replace_file(path: Path, data: bytes, tmp: Path, *, durable: bool = True) -> None:
    """Give a file new content in one step, for what changes over time (a status); durable when this returns.

    Args:
        path: the name, existing or not; missing parent folders are made.
        data: the whole new content. A reader sees the old or the new, never a mix.
        tmp: as in `publish_file`.
        durable: False for what can be made again: a power cut may then leave anything under the name.
    Raises:
        DiskFull: the file system took no more; the old content is untouched.
        StoreError: a link would lead the file elsewhere.
    """
    refuse_links(tmp.parent, path)
    make_folder(path.parent)
    with _written(path, data, tmp, durable) as temporary, disk_full_named(path, len(data)):
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)


def publish_folder(src: Path, dst: Path) -> bool:
    """Move a finished folder to its final name, which must not exist yet; durable when this returns.

    Args:
        src: a folder on the same file system as `dst` that nobody writes into any more.
        dst: the name to give; missing parent folders are made. An empty folder there counts as absent.
    Returns:
        True if `src` is now `dst`; False if `dst` already had content, and then `src` is discarded.
    Raises:
        DiskFull: the file system took no more; `src` is still where it was.
    """
    make_folder(dst.parent)
    with disk_full_named(dst):
        _sync_tree(src)
        moved = _move(src, dst)
        if not moved:
            shutil.rmtree(src)
        sync_folder(dst.parent)
        sync_folder(src.parent)
    return moved


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, each durably; an existing one is left as it is.

    Raises:
        DiskFull: the file system took no more.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    with disk_full_named(path):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def settle_file(temporary: Path, path: Path) -> None:
    """Give a finished file its name, durably, replacing what was there: for files that somebody else has written."""
    name_file(temporary, path)
    note_settled(path)


def name_file(temporary: Path, path: Path) -> None:
    """The same for a file that is of use for a while only, and so is not noted by `settled_files`."""
    _sync(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


def note_settled(path: Path) -> None:
    """Note a file that was settled in an earlier attempt as one of this one."""
    for noted in _noting:
        noted.append(path)


@contextmanager
def settled_files() -> Iterator[list[Path]]:
    """The files that get their names by `settle_file` in this process until the end of the `with`, in that order."""
    noted: list[Path] = []
    _noting.append(noted)
    try:
        yield noted
    finally:
        _noting.pop()


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to the device: only then does a new name survive a power cut."""
    _sync(path, os.O_DIRECTORY)


@contextmanager
def disk_full_named(path: Path, size_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left", "quota exceeded" and "file too large" into `DiskFull`, whichever library met them.

    Args:
        path: what was being written, for the message.
        size_bytes: how much, if known.
    Raises:
        DiskFull: in place of such an error; any other error passes unchanged.
    """
    try:
        yield
    except Exception as error:
        code = _system_error(error)
        if code not in _FULL:
            raise
        size = "" if size_bytes is None else f" ({size_bytes:,} bytes)"
        raise DiskFull(
            f"cannot write {path}{size}: {os.strerror(code).lower()}",
            hint="free space and run again; what was finished is kept",
        ) from error


@contextmanager
def _written(path: Path, data: bytes, tmp: Path, durable: bool = True) -> Iterator[Path]:
    """The content under a temporary name, on the device if it must; the name is gone at the end, whatever happens."""
    refuse_links(tmp.parent, tmp)
    make_folder(tmp)
    temporary = tmp / f"{os.getpid()}-{secrets.token_hex(8)}"
    try:
        with disk_full_named(path, len(data)), temporary.open("xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> bool:
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Some network and removable file systems have no links. A rename is as atomic; it may replace what another
        # writer put there a moment ago, which by this function's contract is the same content.
        temporary.rename(path)
    return True


def _move(src: Path, dst: Path) -> bool:
    try:
        src.rename(dst)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _sync_tree(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_symlink():
            continue  # its target is not ours to flush
        if entry.is_dir():
            _sync_tree(entry)
        elif entry.is_file():
            _sync(entry)
    sync_folder(folder)


def _sync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _system_error(error: Exception) -> int:
    """The `errno` behind an exception, 0 if there is none; safetensors, written in Rust, has it only in its text."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0
