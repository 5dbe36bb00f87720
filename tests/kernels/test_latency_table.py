"""The table of times as a file: a round trip, and every way in which it may not be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from layerwise.errors import CorruptArtifact, DeviceChanged, UsageError
from layerwise.kernels.device import Device
from layerwise.kernels.latency_table import LatencyTable, Row
from layerwise.kernels.timing import Timing

HERE = Device("cpu", "Some Processor", 8, ("avx2",), 64, 32 << 20, 1, "2.13.0")
ROW = Row.of(
    Timing(2.0, 1.9, 2.4, 0.05, 1.85, 9, 0.97),
    **{"backend": "mkl", "label": "dense", "n": 64, "k": 32, "m": 1, "dtype": "float32"},
    **{"size_bytes": 8192, "exact": True, "dense": True},
)
OTHER = replace(ROW, backend="linear", median_ms=3.0, quality=None)


@pytest.fixture
def table() -> LatencyTable:
    return LatencyTable(HERE, (OTHER, ROW), {"samples": 9, "clock": "CPU time"})


def test_a_measured_row_carries_its_samples(table: LatencyTable) -> None:
    assert (ROW.median_ms, ROW.p90_ms, ROW.samples, ROW.status) == (2.0, 2.4, 9, "measured")
    assert ROW.spread == pytest.approx(2.0 / 1.85 - 1)


def test_a_table_survives_its_file(table: LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json", HERE) == table
    values = json.loads((tmp_path / "table.json").read_text())
    assert LatencyTable.from_json(values) == table
    assert values == json.loads(json.dumps(table.as_json()))


def test_an_empty_table_survives_its_file(tmp_path: Path) -> None:
    LatencyTable(HERE, (), {}).save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json").rows == ()


def test_the_rows_of_a_product_come_fastest_first(table: LatencyTable) -> None:
    assert [row.backend for row in table.of("dense", 64, 32, 1, "float32")] == ["mkl", "linear"]
    assert table.of("dense", 64, 32, 2, "float32") == []


def test_a_table_of_another_device_is_refused_and_says_what_differs(table: LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "table.json")
    with pytest.raises(DeviceChanged, match=r"table .*table\.json was measured on another device.*torch: 2.13.0 and 3"):
        LatencyTable.load(tmp_path / "table.json", replace(HERE, torch="3.0"))


def test_a_missing_table_is_named_and_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no table of times at .*none\.json") as error:
        LatencyTable.load(tmp_path / "none.json")
    assert "layerwise bench" in str(error.value)


def mangled(table: LatencyTable, how: str) -> str:
    values = table.as_json()
    if how == "version":
        values["version"] = 99
    elif how == "column":
        values["rows"][0]["colour"] = "green"
    elif how == "device":
        del values["device"]["cores"]
    elif how == "twice":
        values["rows"].append(values["rows"][0])
    elif how == "list":
        return "[]"
    else:
        return json.dumps(values)[:-20]
    return json.dumps(values)


@pytest.mark.parametrize("how", ["version", "column", "device", "twice", "list", "cut off"])
def test_a_file_that_is_no_table_is_refused(table: LatencyTable, tmp_path: Path, how: str) -> None:
    (tmp_path / "table.json").write_text(mangled(table, how))
    with pytest.raises(CorruptArtifact, match="is no table of times"):
        LatencyTable.load(tmp_path / "table.json")


def test_two_rows_of_one_backend_for_one_product_are_refused() -> None:
    with pytest.raises(UsageError, match="two rows of mkl"):
        LatencyTable(HERE, (ROW, replace(ROW, median_ms=1.0)), {})
