"""Text out of files of records: JSON, JSON lines, Parquet, CSV; one document a record.

A record holds its text, or a conversation, in one column: a conversation is a list of messages, each with a role and a
content, as chat templates take them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from layerwise.errors import DataError

COLUMN = "text"
"""Which column holds the text, where nothing else is said."""

Message = Mapping[str, Any]


def contents(messages: list[Message]) -> str:
    """What was said in a conversation, a paragraph each, without the template and the system's instructions."""
    return "\n\n".join(str(message["content"]) for message in messages if message["role"] != "system")


def documents(
    path: Path, name: str, column: str | None = None, render: Callable[[list[Message]], str] = contents
) -> Iterator[str]:
    """The text of each record.

    Args:
        path: the file.
        name: of the entry of `data:`, for errors.
        column: that holds the text; `text` if None.
        render: what makes text of a conversation.
    Raises:
        DataError: the file cannot be read as its ending says, or a record has no text there; names the record, from 1.
        OSError: the file cannot be read.
    """
    try:
        for number, record in enumerate(_READERS[path.suffix.lower()](path), 1):
            yield document(record, column or COLUMN, f"data.{name}: record {number} of {path}", render)
    except ValueError as error:  # of json and pyarrow, both
        kind = path.suffix[1:].upper()
        raise DataError(
            f"data.{name}: {path} cannot be read as {kind}: {error}", hint=f"what is no {kind} needs another ending"
        ) from error


def document(record: Any, column: str, where: str, render: Callable[[list[Message]], str] = contents) -> str:
    """The text of one record.

    Args:
        record: its columns.
        column: that holds the text.
        where: the record, for errors.
        render: what makes text of a conversation.
    Raises:
        DataError: there is no such column, or no text in it.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where} has no columns: {_short(record)}", hint='a record is like {"text": "..."}')
    if column not in record:
        raise DataError(
            f"{where} has no column {column}, but {', '.join(map(str, record))}", hint="say which: `column:`"
        )
    value = record[column]
    if isinstance(value, str):
        return value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(one, Mapping) and {"role", "content"} <= set(one) for one in value)
    ):
        return render(value)
    raise DataError(
        f"{where}: {column} is neither text nor a conversation: {_short(value)}",
        hint="a conversation is a list of messages, each with `role` and `content`",
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error


def _json(path: Path) -> Iterator[Any]:
    """One list of records; where it is none, a record a line, which often has that ending, too."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from _json_lines(path)
        return
    yield from whole if isinstance(whole, list) else [whole]


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _csv(path: Path) -> Iterator[Any]:
    from pyarrow import csv

    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    parse = csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    with csv.open_csv(path, parse_options=parse) as batches:
        for batch in batches:
            yield from batch.to_pylist()


_READERS: Mapping[str, Callable[[Path], Iterator[Any]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
}

RECORDS = tuple(_READERS)
"""Endings of files of records."""
