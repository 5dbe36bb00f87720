"""The file that a command is told to write: refused in words, before the work whose result it is to hold.

A missing folder is not made: it is more often misspelt than wanted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerwise.errors import UsageError
from layerwise.results.durable import disk_full_named


def check_destination(path: Path) -> None:
    """Refuse a file that cannot be written, as far as can be seen without writing it.

    Raises:
        UsageError: its folder is missing, it is a folder itself, or it is not ours to write.
    """
    folder = path.parent
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder", hint="give the name of a file")
    if not folder.is_dir():
        found = "is no folder" if folder.exists() else "does not exist"
        raise UsageError(f"cannot write {path}: {folder} {found}", hint="make the folder first, or choose another")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"cannot write {path}: permission denied", hint="choose another place")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Check a destination, and turn what the file system says while it is written into words.

    Raises:
        UsageError: it cannot be written.
        DiskFull: the file system took no more.
    """
    check_destination(path)
    try:
        with disk_full_named(path):
            yield
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}", hint="choose another place") from error
