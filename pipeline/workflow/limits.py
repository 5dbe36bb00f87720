"""How much a workflow may be, and what may stand in it: checked before anything is made of it.

A file that a generator, an accident or a stranger wrote must end in a message within a second or two, never in a full
memory, a hang or a traceback from deep below. Sizes are checked while the file is read; what aliases, `foreach` and
`${{ }}` unfold to is counted without being unfolded. Every limit is far above what a model of a thousand units needs.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from layerwise.errors import UsageError
from layerwise.stages.quantities import LARGEST

MAX_BYTES = 512 << 10
"""Of one file."""

MAX_FILES = 10
"""That extend each other."""

MAX_DEPTH = 50
"""Of lists and maps in one another."""

MAX_VALUES = 10_000
"""Keys and values of one file, and values that its aliases unfold to."""

MAX_UNFOLDED = 50_000
"""Values of all stages, each `foreach` unrolled and each expression replaced."""

MAX_INSTANCES = 500
"""Stages, each `foreach` unrolled."""

MAX_TEXT = 10_000
"""Characters of one text."""

MAX_CHARACTERS = 4_000_000
"""Of all texts of all stages, expressions replaced."""

MAX_NAME = 100
"""Characters of what becomes a part of a file's name; file systems take 255 bytes."""

MAX_DIGITS = 20
"""Of a whole number; longer ones are not read, because Python takes its time with them."""


def wrong_text(text: str) -> str | None:
    """What is wrong with a text as such: too long for anything, or with characters that no file can keep."""
    if len(text) > MAX_TEXT:
        return f"a text of {len(text):,} characters is too long: at most {MAX_TEXT:,}"
    for character in text:
        if character == "\0" or "\ud800" <= character <= "\udfff":
            what = "which ends every path" if character == "\0" else "half of a character"
            return f"U+{ord(character):04X}, {what}, may not stand in a text"
    return None


def wrong_number(number: float) -> str | None:
    """What is wrong with a number as such: no parameter has a use for whole numbers beyond 64 bits."""
    if isinstance(number, int) and not -LARGEST <= number <= LARGEST:
        return f"a whole number is at most 2^63 - 1, and {number} is not"
    return None


def read_small(path: Path) -> bytes:
    """The content of a regular file, of a long one MAX_BYTES and one more; pipes and devices are not waited for.

    Raises:
        UsageError: there is no such file, it cannot be read, or is none.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # NUL, or half of a character
        raise UsageError(f"{str(path)!r}: no file can have this name: {error}") from error
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"{path}: cannot be read: Is a directory")
        if not stat.S_ISREG(mode):
            raise UsageError(f"{path}: is not a file but a pipe, a socket or a device", hint="write it to a file first")
        with open(handle, "rb", closefd=False) as file:
            return file.read(MAX_BYTES + 1)
    finally:
        os.close(handle)
