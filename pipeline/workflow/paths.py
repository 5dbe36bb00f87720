"""Paths as a workflow names them: made absolute, and looked at, without an exception for whatever a text may hold."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

from layerwise.errors import UsageError

Kind = Literal["file", "folder"]


def expanded(text: str) -> Path:
    """A path, `~` and `~user` replaced by their home folders.

    Raises:
        UsageError: there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = Path(text).parts[0]
        raise UsageError(f"'{user}' is no user's home folder; a file of that name is written ./{text}") from None


def is_folder(path: Path) -> bool:
    """Whether there is a folder of that name, which may be no name for one."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def missing(path: Path, wanted: Kind) -> str | None:
    """What is wrong with a path that is to be a file or a folder; None if it is one."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return f"{wanted} not found: {path}"
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return f"{wanted} cannot be used: {reason}: {path}"
    if wanted == "folder":
        return None if stat.S_ISDIR(mode) else f"this is no folder: {path}"
    if stat.S_ISDIR(mode):
        return f"this is a folder, not a text file: {path}"
    if not stat.S_ISREG(mode):
        return f"this is a pipe, a socket or a device, not a text file: {path}"
    return None if os.access(path, os.R_OK) else f"file cannot be used: {os.strerror(13)}: {path}"
