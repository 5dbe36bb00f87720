"""Files of text, read whole: UTF-8, with or without a byte order mark, or records (`records.py`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from layerwise.errors import DataError
from layerwise.stages.contract import TextSource
from layerwise.stages.data.records import RECORDS, Message, contents, documents

BETWEEN = "\n\n"
"""What stands between the text of two files, and of two records."""

PIECE = 2**18
"""Characters that a tokenizer gets at once: some take time that grows faster than the text."""


_BINARY = {
    b"PAR1": "a Parquet file: give it the ending .parquet",
    b"ARROW1": "an Arrow file: write it as Parquet",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"%PDF": "a PDF: take its text out first",
}


def read_text(source: TextSource, render: Callable[[list[Message]], str] = contents) -> str:
    """The text of all files, in one.

    Args:
        source: the text.
        render: what makes text of a conversation.
    Raises:
        DataError: one cannot be read, or is not UTF-8; names it and the place.
    """
    return BETWEEN.join(_read_file(path, source, render) for path in source.paths)


def _read_file(path: Path, source: TextSource, render: Callable[[list[Message]], str]) -> str:
    if path.exists() and not path.is_file():  # a pipe would never end
        raise DataError(f"data.{source.name}: {path} is no regular file", hint="give a file of text")
    try:
        if path.suffix.lower() in RECORDS:
            return BETWEEN.join(documents(path, source.name, source.column, render))
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"data.{source.name}: cannot read {path}: {error.strerror or error}") from error
    for beginning, what in _BINARY.items():
        if content.startswith(beginning):
            raise DataError(f"data.{source.name}: {path} is {what}")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"data.{source.name}: {path} is not UTF-8 text: line {line} holds the byte {content[error.start]:#04x}",
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
