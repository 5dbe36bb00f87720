"""Nothing is cut off, programs get every digit, and NULL is empty."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pandas as pd
import pytest

from layerwise.errors import UsageError
from layerwise.results.format import format_table, format_value


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "candidate": ["0123456789ab" * 20, "a|b [red]"],
            "kl": [0.1 + 0.2, np.nan],
            "bytes": pd.array([2**53 + 1, None], dtype="Int64"),
            "knee": [True, False],
            "genome": [[1, 2], None],
            "at": [pd.Timestamp("2026-11-21 12:30:15.123456", tz="UTC"), pd.NaT],
        }
    )


def test_json_gives_back_every_value(frame: pd.DataFrame) -> None:
    first, second = json.loads(format_table(frame, "json"))
    assert first == {
        "candidate": "0123456789ab" * 20, "kl": 0.1 + 0.2, "bytes": 2**53 + 1, "knee": True, "genome": [1, 2],
        "at": "2026-11-21T12:30:15.123456Z",
    }  # fmt: skip
    assert second == {"candidate": "a|b [red]", "kl": None, "bytes": None, "knee": False, "genome": None, "at": None}


def test_csv_gives_back_every_value(frame: pd.DataFrame) -> None:
    header, first, second = csv.reader(io.StringIO(format_table(frame, "csv")))
    assert header == list(frame.columns)
    assert first == ["0123456789ab" * 20, repr(0.1 + 0.2), str(2**53 + 1), "true", "[1, 2]",
                     "2026-11-21T12:30:15.123456Z"]  # fmt: skip
    assert second == ["a|b [red]", "", "", "false", "", ""]
    back = pd.read_csv(io.StringIO(format_table(frame, "csv")))
    assert back["kl"].tolist()[0] == 0.1 + 0.2


def test_the_table_has_one_uncut_line_per_row_under_its_header(frame: pd.DataFrame) -> None:
    header, rule, first, second = format_table(frame, "table").splitlines()
    assert header.split() == list(frame.columns)
    assert set(rule) == {" ", "─"}
    assert first.split() == ["0123456789ab" * 20, "0.3", str(2**53 + 1), "yes", "1,", "2", "2026-11-21", "12:30:15"]
    assert second.split() == ["a|b", "[red]", "no"]


def test_markdown_cells_stay_in_their_column(frame: pd.DataFrame) -> None:
    lines = format_table(frame, "markdown").splitlines()
    assert len(lines) == 4
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [7] * 4
    assert lines[1] == "| --- | --: | --: | --- | --- | --- |"


def test_an_empty_table_still_shows_its_columns(frame: pd.DataFrame) -> None:
    empty = frame.iloc[:0]
    assert json.loads(format_table(empty, "json")) == []
    assert format_table(empty, "csv") == "candidate,kl,bytes,knee,genome,at\n"
    assert format_table(empty, "table").split()[:6] == list(frame.columns)
    assert len(format_table(empty, "markdown").splitlines()) == 2


def test_a_line_break_inside_a_cell_does_not_break_the_row() -> None:
    frame = pd.DataFrame({"error": ["first\nsecond"]})
    assert len(format_table(frame, "table").splitlines()) == 3
    assert format_table(frame, "markdown").splitlines()[2] == "| first second |"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456789, "0.12346"), (3.0, "3"), (1.5e-9, "1.5e-09"), (123456.78, "123457"), (12345.678, "12346"),
        (2e20, "2e+20"), (-0.5, "-0.5"), (10**12, "1000000000000"), (np.float32(0.1), "0.1"), (np.nan, ""),
        (None, ""), (pd.NA, ""), (np.bool_(True), "yes"), ([0.5, 1], "0.5, 1"),
    ],
)  # fmt: skip
def test_a_value_is_shown_with_five_significant_digits(value: object, shown: str) -> None:
    assert format_value(value) == shown


def test_an_unknown_format_is_refused(frame: pd.DataFrame) -> None:
    with pytest.raises(UsageError, match="no format 'xml'"):
        format_table(frame, "xml")
