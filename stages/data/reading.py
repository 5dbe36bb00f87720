"""Text files, read whole: UTF-8, with or without a byte order mark."""

from __future__ import annotations

from pathlib import Path

from layerwise.errors import DataError
from layerwise.stages.contract import TextSource

BETWEEN = "\n\n"
"""What stands between the text of two files."""

PIECE = 2**18
"""Characters that a tokenizer gets at once: some take time that grows faster than the text."""


def read_text(source: TextSource) -> str:
    """The text of all files, in one.

    Raises:
        DataError: one cannot be read, or is not UTF-8; names it and the place.
    """
    return BETWEEN.join(_read_file(path, source.name) for path in source.paths)


def _read_file(path: Path, name: str) -> str:
    if path.exists() and not path.is_file():  # a pipe would never end
        raise DataError(f"data.{name}: {path} is no regular file", hint="give a file of text")
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise DataError(f"data.{name}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"data.{name}: {path} is not UTF-8 text: line {line} holds the byte {content[error.start]:#04x}",
            hint="convert it, for example with `iconv -f latin1 -t utf-8`",
        ) from error


def pieces(text: str, size: int = PIECE) -> list[str]:
    """A text cut where it hurts least: after a line that ends in the second half of a piece, else after a space.

    Args:
        text: of any length.
        size: characters of a piece, at most.
    """
    found, start = [], 0
    while len(text) - start > size:
        half, end = start + size // 2, start + size
        line, space = text.rfind("\n", half, end), text.rfind(" ", half, end)
        cut = line + 1 or space + 1 or end
        found.append(text[start:cut])
        start = cut
    return [*found, text[start:]]
