"""A table as text: `table` and `markdown` to read, `csv` and `json` for other programs.

For reading, numbers get five significant digits; for programs they keep every digit. Nothing is ever cut off to fit
a width: half an id is useless, and a shortened number is wrong.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from layerwise.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

Format = Literal["table", "csv", "json", "markdown"]


def format_table(frame: pd.DataFrame, fmt: Format = "table") -> str:
    """Write a table down.

    Args:
        frame: any table of plain values, lists and timestamps; its index is not shown.
        fmt: `table` (aligned columns), `csv` or `json` (a list of objects, one a line), or `markdown`.
    Returns:
        The text, ending in a line break. NULL is an empty cell, and `null` in JSON.
    Raises:
        UsageError: no such format.
    """
    names = [str(name) for name in frame.columns]
    values = list(frame.itertuples(index=False, name=None))
    rows = [[_plain(value) for value in row] for row in values]
    if fmt == "csv":
        return _csv(names, rows)
    if fmt == "json":
        return _json(names, rows)
    if fmt in ("table", "markdown"):
        cells = [[" ".join(format_value(value).split()) for value in row] for row in values]
        numeric = [any(_is_number(row[i]) for row in rows) for i in range(len(names))]
        return _aligned(names, cells, numeric) if fmt == "table" else _markdown(names, cells, numeric)
    raise UsageError(f"no format {fmt!r}", hint="use table, csv, json or markdown")


def format_value(value: Any) -> str:
    """One value for reading: five significant digits, `yes` and `no`, whole seconds, an empty string for NULL."""
    plain = _plain(value)
    if isinstance(value, datetime) and plain is not None:
        return f"{plain[:10]} {plain[11:19]}"
    value = plain
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if 1e5 <= abs(value) < 1e15 else f"{value:.5g}"
    if isinstance(value, list):
        return ", ".join(map(format_value, value))
    return str(value)


def _plain(value: Any) -> Any:
    """The value as JSON knows it: no numpy, no pandas, None for everything that is missing."""
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(element) for element in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # by name, to spare importing pandas
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, datetime):
        return (value.astimezone(UTC) if value.tzinfo else value).isoformat().replace("+00:00", "Z")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _aligned(names: list[str], cells: list[list[str]], numeric: list[bool]) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name, right in zip(names, numeric, strict=True):
        table.add_column(Text(name), justify="right" if right else "left", no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))  # as Text, for in a plain string [brackets] would be markup
    text = io.StringIO()
    Console(file=text, width=sys.maxsize, color_system=None).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(line for line in lines if line) + "\n"


def _markdown(names: list[str], cells: list[list[str]], numeric: list[bool]) -> str:
    rule = ["--:" if right else "---" for right in numeric]
    lines = [names, rule, *([cell.replace("|", "\\|") for cell in row] for row in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _csv(names: list[str], rows: list[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([json.dumps(value) if isinstance(value, list | bool) else value for value in row] for row in rows)
    return text.getvalue()


def _json(names: list[str], rows: list[list[Any]]) -> str:
    objects = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, allow_nan=False) for row in rows]
    return "[\n  " + ",\n  ".join(objects) + "\n]\n" if objects else "[]\n"
