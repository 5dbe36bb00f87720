"""Nothing in a results folder is written through a link.

A results folder can come from anybody, and what stands in it decides where its next files go: a link in place of a
folder or a file would lead them out, over a file of the user's. So every way that is written is looked at first, from
the results folder on, and files that are opened under a known name are opened without following a link. The results
folder itself may be one, for the user names it. What layerwise links itself, `runs/<run>/stages/<stage>`, is never
written through.

Left out: someone who exchanges folders while a run is at work. A results folder is to be writable only for people who
may do all that its owner may.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from layerwise.errors import StoreError

_HINT = "nothing was written; look where it leads, remove it, and run again"
_LONGEST_STEM = 100


def refuse_links(root: Path, path: Path) -> None:
    """Refuse a way from the results folder to a file or folder if any part of it is a link.

    Args:
        root: the results folder; it is not looked at, nor is what stands above it.
        path: below it, existing or not; one that stands elsewhere is none of our business.
    Raises:
        StoreError: names the link.
    """
    if not path.is_relative_to(root):
        return
    place = root
    for name in path.relative_to(root).parts:
        place = place / name
        if place.is_symlink():
            raise _is_a_link(place)


def refuse_links_below(folder: Path) -> None:
    """Refuse a folder that holds a link, at any depth.

    Raises:
        StoreError: names the link.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (Path(place) / name).is_symlink():
                raise _is_a_link(Path(place) / name)


def open_plain(path: Path, flags: int) -> int:
    """Open a file that is one, and no link to one, as `os.open` does; gives the descriptor.

    Raises:
        StoreError: it is a link or no file, or it is to be written and has a second name somewhere.
        OSError: as `os.open`.
    """
    try:
        # Without O_NONBLOCK the opening of a named pipe would wait for its other end.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _is_a_link(path) from error
        if error.errno == errno.ENXIO:
            raise StoreError(f"{path} is no file", hint=_HINT) from error
        raise
    found = os.fstat(descriptor)
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    if stat.S_ISREG(found.st_mode) and not (writes and found.st_nlink > 1):
        return descriptor
    os.close(descriptor)
    what = "has a second name elsewhere" if stat.S_ISREG(found.st_mode) else "is no file"
    raise StoreError(f"{path} {what}", hint=_HINT)


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A new empty file beside `path`, under a name that nobody can guess, to be written and moved there.

    Its suffix is `.partial`; it is gone at the end unless it was moved.
    """
    temporary = path.with_name(f"{path.stem[:_LONGEST_STEM]}.{secrets.token_hex(8)}.partial")
    temporary.touch(exist_ok=False)  # O_EXCL follows no link
    try:
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _is_a_link(path: Path) -> StoreError:
    with suppress(OSError):
        return StoreError(f"{path} is a link to {path.readlink()}, where layerwise would write", hint=_HINT)
    return StoreError(f"{path} is a link, where layerwise would write", hint=_HINT)
