"""Rows that were acknowledged are there once, whole, and readable without layerwise."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from layerwise.errors import DiskFull, StoreError, UsageError
from layerwise.results.schema import COMMON, RUN_TABLES, TABLES, arrow_schema, columns_of
from layerwise.results.sealed import sealed
from layerwise.results.store import Store

KEY = "ab" * 32

SAMPLES: Mapping[str, Any] = {
    "string": "x",
    "bool": True,
    "int16": 7,
    "int32": 70_000,
    "int64": 5_000_000_000,
    "float32": 0.5,
    "float64": 0.1,
    "timestamp": datetime(2026, 11, 21, 12, tzinfo=UTC),
    "list<string>": ["a", "b"],
    "list<int16>": [0, 3, 1],
    "list<int32>": [128, 384],
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "results", create=True)


def put(store: Store, rows: Sequence[Mapping[str, Any]], *, table: str = "candidates", **where: Any) -> bool:
    at = {"run_id": "r1", "stage": "search", "stage_key": KEY, "attempt": 1, "first_seq": 0, **where}
    return store.append(table, rows, **at)


@pytest.mark.parametrize("table", TABLES)
def test_a_row_comes_back_as_it_was_written(store: Store, table: str) -> None:
    row = {name: SAMPLES[kind] for name, kind in TABLES[table].items()}
    put(store, [row], table=table)
    (found,) = store.rows(table)
    assert {name: found[name] for name in row} == row
    assert {name: found[name] for name in ("run_id", "stage", "stage_key", "attempt", "seq", "schema_version")} == {
        "run_id": "r1", "stage": "search", "stage_key": KEY, "attempt": 1, "seq": 0, "schema_version": 4,
    }  # fmt: skip
    assert abs((found["written_at"] - datetime.now(UTC)).total_seconds()) < 3600


@pytest.mark.parametrize("table", TABLES)
def test_an_empty_table_has_the_right_columns(store: Store, table: str) -> None:
    frame = store.read(table)
    assert len(frame) == 0
    assert list(frame.columns) == [*COMMON, *TABLES[table]]


def test_numpy_values_and_left_out_columns_are_fine(store: Store) -> None:
    genome = np.array([3, 0, 2], dtype=np.int64)
    put(store, [{"genome": genome, "fitness": np.float32(0.25), "bytes": np.int64(9), "draw": 4.0}])
    (row,) = store.rows("candidates", columns=["genome", "fitness", "bytes", "draw", "solver"])
    assert row == {"genome": [3, 0, 2], "fitness": 0.25, "bytes": 9, "draw": 4, "solver": None}


def test_a_null_does_not_turn_integers_into_floats(store: Store) -> None:
    put(store, [{"bytes": 2**60 + 1}, {"bytes": None}])
    assert store.read("candidates")["bytes"].tolist() == [2**60 + 1, pd.NA]


def test_a_repeated_commit_collides_and_adds_nothing(store: Store) -> None:
    rows = [{"candidate": "a"}, {"candidate": "b"}]
    assert put(store, rows)
    assert not put(store, rows)
    assert not put(store, rows, attempt=2)
    assert not put(store, [], first_seq=2)
    assert len(store.rows("candidates")) == 2
    assert len(list((store.root / "tables").rglob("*.parquet"))) == 1


def test_the_rows_about_a_run_are_kept_from_every_attempt(store: Store) -> None:
    for attempt in (1, 2):
        put(store, [{"status": f"try {attempt}"}], table="stages", attempt=attempt)
        put(store, [{"status": f"try {attempt}"}], table="runs", stage=None, stage_key=None, attempt=attempt)
    assert [row["status"] for row in store.rows("stages")] == ["try 1", "try 2"]
    assert [row["status"] for row in store.rows("runs")] == ["try 1", "try 2"]


def test_file_names_say_which_rows_they_hold(store: Store) -> None:
    put(store, [{}, {}], first_seq=14)
    put(store, [{}], table="runs", stage_key=None, attempt=3)
    put(store, [{}], table="stages", attempt=3)
    names = {}
    for tree in ("tables", "copies"):
        for path in (store.root / tree).rglob("*.parquet"):
            rows, checksum, _ = path.name.split(".")
            assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] == checksum
            names[f"{tree}/{path.relative_to(store.root / tree).parent}/{rows}"] = path.read_bytes()
    places = [
        "candidates/run=r1/abababababababab-000000014-000000015",
        "runs/run=r1/run-000000000-000000000-a3",
        "stages/run=r1/abababababababab-000000000-000000000-a3",
    ]
    assert set(names) == {f"{tree}/{place}" for tree in ("tables", "copies") for place in places}
    assert all(names[f"tables/{place}"] == names[f"copies/{place}"] for place in places)


def test_rows_of_a_stage_that_were_computed_twice_occur_once_from_the_lowest_attempt(store: Store) -> None:
    put(store, [{"candidate": f"{seq} again"} for seq in range(3)], attempt=2)
    put(store, [{"candidate": "0"}, {"candidate": "1"}], attempt=1)
    put(store, [{"candidate": f"{seq} elsewhere"} for seq in range(4)], run_id="r2", attempt=3)
    put(store, [{"candidate": "other stage"}], stage_key="cd" * 32)
    found = [(row["stage_key"][:2], row["seq"], row["candidate"]) for row in store.rows("candidates")]
    assert found == [
        ("ab", 0, "0"), ("ab", 1, "1"), ("ab", 2, "2 again"), ("ab", 3, "3 elsewhere"), ("cd", 0, "other stage"),
    ]  # fmt: skip
    assert [row["candidate"] for row in store.rows("candidates", run="r2")] == [f"{i} elsewhere" for i in range(4)]


def test_the_rows_of_a_stage_stay_in_order_though_two_runs_computed_it(store: Store) -> None:
    put(store, [{}] * 10, run_id="r1", attempt=2, first_seq=10)
    put(store, [{}] * 15, run_id="r2", attempt=1)
    assert [row["seq"] for row in store.rows("candidates", stage_key=KEY)] == list(range(20))


def test_rows_are_found_by_run_and_by_stage_key(store: Store) -> None:
    for run, key in (("r1", "aa"), ("r1", "bb"), ("r2", "cc")):
        put(store, [{"candidate": run + key}], run_id=run, stage_key=key)

    def found(**where: Any) -> list[str]:
        return store.read("candidates", columns=["candidate"], **where)["candidate"].tolist()

    assert found() == ["r1aa", "r1bb", "r2cc"]
    assert found(run="r1") == ["r1aa", "r1bb"]
    assert found(run="nobody") == []
    assert found(stage_key="bb") == ["r1bb"]
    assert found(stage_key=["aa", "cc"]) == ["r1aa", "r2cc"]
    assert found(stage_key=[]) == []


def test_what_is_not_finite_becomes_null_with_a_status(store: Store) -> None:
    put(store, [{"fitness": value, "status": "nan"} for value in (np.nan, np.inf, -np.inf, np.float32("nan"))])
    put(store, [{"lower_bound": -np.inf, "gap": np.nan}], table="allocations")
    assert [row["fitness"] for row in store.rows("candidates")] == [None] * 4
    assert store.rows("allocations", columns=["lower_bound", "gap"]) == [{"lower_bound": None, "gap": None}]


@pytest.mark.parametrize("status", [{}, {"status": "ok"}])
def test_a_missing_number_without_a_reason_is_refused(store: Store, status: dict[str, str]) -> None:
    with pytest.raises(AssertionError, match="fitness is not finite"):
        put(store, [{"fitness": np.nan, **status}])
    assert store.rows("candidates") == []


@pytest.mark.parametrize(
    "row", [{"colour": "red"}, {"run_id": "x"}, {"round": 70_000}, {"bytes": 1.5}, {"candidate": 5}, {"bits": "three"}]
)
def test_a_column_or_value_that_does_not_fit_is_refused(store: Store, row: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match=next(iter(row))):
        put(store, [{"candidate": "fine"}, row])
    assert store.rows("candidates") == []


@pytest.mark.parametrize("where", [{"table": "colours"}, {"run_id": "../x"}, {"run_id": ""}, {"stage_key": None}])
def test_rows_that_belong_nowhere_are_refused(store: Store, where: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        put(store, [{"candidate": "a"}], **where)


def test_a_reader_never_sees_a_file_that_is_being_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, [{"candidate": "before"}])
    for call in ("fsync", "link"):

        def killed(*_: object, call: str = call, **__: object) -> None:
            assert [row["candidate"] for row in store.rows("candidates")] == ["before"]
            assert len(pd.read_parquet(store.root / "tables" / "candidates")) == 1
            raise KeyboardInterrupt(call)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=call):
            patch.setattr(os, call, killed)
            put(store, [{"candidate": "during"}], first_seq=1)
        assert [row["candidate"] for row in store.rows("candidates")] == ["before"]
    assert put(store, [{"candidate": "after"}], first_seq=1)
    assert [row["candidate"] for row in store.rows("candidates")] == ["before", "after"]


def test_a_full_disk_adds_no_row_and_is_no_obstacle_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DiskFull):
        patch.setattr(os, "fsync", full)
        put(store, [{"candidate": "a"}])
    assert store.rows("candidates") == []
    assert put(store, [{"candidate": "a"}])


def test_names_that_start_with_a_dot_or_a_line_are_not_rows(store: Store) -> None:
    put(store, [{"candidate": "a"}])
    for name in ("._copy.parquet", "_snapshot.parquet"):
        (store.root / "tables" / "candidates" / "run=r1" / name).write_bytes(b"no parquet")
    assert len(store.rows("candidates")) == 1


def test_pandas_and_pyarrow_read_a_table_without_layerwise(store: Store) -> None:
    put(store, [{"candidate": "a", "genome": [1, 2]}, {"candidate": "b", "genome": [2, 2]}])
    put(store, [{"candidate": "c", "fitness": np.nan, "status": "nan"}], run_id="r2", stage_key="cd")
    folder = store.root / "tables" / "candidates"
    frame = pd.read_parquet(folder)
    assert list(zip(frame["run"], frame["run_id"], frame["candidate"], strict=True)) == [
        ("r1", "r1", "a"), ("r1", "r1", "b"), ("r2", "r2", "c"),
    ]  # fmt: skip
    table = ds.dataset(folder, partitioning="hive").to_table(filter=ds.field("run") == "r1")
    assert table.column("genome").to_pylist() == [[1, 2], [2, 2]]
    assert pq.read_schema(next(folder.rglob("*.parquet"))).metadata[b"layerwise_schema_version"] == b"4"


def test_a_file_of_an_older_layerwise_lacks_columns_and_one_of_a_newer_has_more(store: Store) -> None:
    put(store, [{"candidate": "now", "bits": 3.0}])
    full = pq.ParquetFile(next((store.root / "tables").rglob("*.parquet"))).read()
    older = full.drop_columns(["bits", "effective_bits"]).set_column(
        full.schema.get_field_index("seq"), "seq", pa.array([1], pa.int64())
    )
    newer = full.append_column("watts", pa.array([5.0])).set_column(
        full.schema.get_field_index("seq"), "seq", pa.array([2], pa.int64())
    )
    for name, table in (("older", older), ("newer", newer)):
        pq.write_table(table, store.root / "tables" / "candidates" / "run=r1" / f"{name}.parquet")
    frame = store.read("candidates")
    assert list(frame.columns) == list(columns_of("candidates"))
    assert frame["bits"].isna().tolist() == [False, True, False]


COMMON_OF_2 = {
    "run_id": pa.string(), "stage": pa.string(), "stage_key": pa.string(), "attempt": pa.int16(), "seq": pa.int64(),
    "written_at": pa.timestamp("us", tz="UTC"), "schema_version": pa.int16(),
}  # fmt: skip
LEVELS_OF_2 = {
    "unit": pa.string(), "level": pa.string(), "method": pa.string(), "bits": pa.float32(), "group_size": pa.int32(),
    "sym": pa.bool_(), "desc_act": pa.string(), "damp_percent": pa.float32(), "effective_bits": pa.float64(),
    "size_bytes": pa.int64(), "weight_nmse": pa.float64(), "output_error": pa.float64(), "status": pa.string(),
    "error": pa.string(),
}  # fmt: skip
UNITS_OF_2 = {
    "unit": pa.string(), "kind": pa.string(), "block": pa.int16(), "shape": pa.list_(pa.int32()),
    "n_weights": pa.int64(), "group": pa.string(),
}  # fmt: skip
ALLOCATIONS_OF_2 = {
    "candidate": pa.string(), "solver": pa.string(), "budget": pa.string(), "seed": pa.int64(),
    "genome": pa.list_(pa.int16()), "units": pa.list_(pa.string()), "levels": pa.list_(pa.string()),
    "bits": pa.float64(), "effective_bits": pa.float64(), "bytes": pa.int64(), "kl": pa.float64(),
    "seconds": pa.float64(), "ms": pa.float64(),
}  # fmt: skip


def write_as_2(store: Store, table: str, columns: Mapping[str, pa.DataType], row: Mapping[str, Any]) -> None:
    """A file as version 2 of the schema wrote it: its columns, in its order."""
    common = {
        "run_id": "r1", "stage": "s", "stage_key": KEY, "attempt": 1, "seq": 0, "schema_version": 2,
        "written_at": datetime(2026, 11, 1, tzinfo=UTC),
    }  # fmt: skip
    fields = {**COMMON_OF_2, **columns}
    arrays = [pa.array([{**common, **row}.get(name)], kind) for name, kind in fields.items()]
    schema = pa.schema(list(fields.items()), metadata={"layerwise_schema_version": "2"})
    path = store.root / "tables" / table / "run=r1" / f"{KEY[:16]}-000000000-000000000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path, compression="zstd")


def test_files_of_the_second_version_are_read_beside_new_ones(store: Store) -> None:
    """Its levels told the parameters of one method in columns of their own, and knew two resources."""
    level = {
        "unit": "q", "level": "gptq-3b-g128", "method": "gptq", "bits": 3.0, "group_size": 128, "sym": True,
        "effective_bits": 3.125, "size_bytes": 999, "weight_nmse": 0.1, "output_error": 0.2, "status": "ok",
    }  # fmt: skip
    write_as_2(store, "levels", LEVELS_OF_2, level)
    write_as_2(store, "units", UNITS_OF_2, {"unit": "q", "shape": [4, 4], "n_weights": 16, "group": "0.qkv"})
    chosen = {"candidate": "abc", "solver": "ilp", "budget": "bits=3", "units": ["q"], "levels": ["gptq-3b-g128"],
              "genome": [0], "bits": 3.0, "effective_bits": 3.125, "bytes": 999, "kl": 0.5}  # fmt: skip
    write_as_2(store, "allocations", ALLOCATIONS_OF_2, chosen)
    newer = {"unit": "k", "level": "drop", "method": "drop", "recipe": "{}", "offered": True, "bits": 0.0,
             "parameters": 0, "flops": 0.0, "size_bytes": 0, "status": "ok"}  # fmt: skip
    put(store, [newer], table="levels", run_id="r2", stage_key="cd" * 32)

    old, new = store.rows("levels")
    assert {name: old[name] for name in ("unit", "level", "bits", "effective_bits", "size_bytes", "weight_nmse")} == {
        name: level[name] for name in ("unit", "level", "bits", "effective_bits", "size_bytes", "weight_nmse")
    }
    assert {old[name] for name in ("recipe", "offered", "parameters", "flops")} == {None}
    assert (new["recipe"], new["offered"], new["parameters"], new["flops"]) == ("{}", True, 0, 0.0)
    assert not {"group_size", "sym", "desc_act", "damp_percent"} & set(old)
    (unit,), (allocation,) = store.rows("units"), store.rows("allocations")
    assert (unit["n_weights"], unit["role"], unit["status"]) == (16, None, None)
    assert (allocation["bytes"], allocation["kl"], allocation["parameters"]) == (999, 0.5, None)
    assert store.read("levels")["size_bytes"].tolist() == [999, 0]


def test_reading_what_does_not_exist_names_what_does(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the tables are runs, stages"):
        store.read("colours")
    with pytest.raises(UsageError, match="no column colour"):
        store.read("candidates", columns=["colour"])
    with pytest.raises(UsageError, match="no such folder"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="not a results folder"):
        Store.open(tmp_path)


def test_a_store_of_a_newer_format_is_refused(store: Store) -> None:
    (store.root / "layerwise-store.json").write_text(json.dumps({"format": 2}))
    for create in (False, True):
        with pytest.raises(StoreError, match=r"newer layerwise \(format 2, this one reads 1\)") as caught:
            Store.open(store.root, create=create)
        assert "upgrade" in str(caught.value.hint)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "nonsense", sealed({"format": 1}).decode().replace('"format": 1', '"format": 3')]
)
def test_a_damaged_marker_is_named_and_written_again_by_whoever_writes(
    store: Store, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    marker = store.root / "layerwise-store.json"
    whole = marker.read_bytes()
    marker.write_text(content)
    for create in (False, True, False):
        assert Store.open(store.root, create=create) == store
    assert [record.getMessage().partition(" is damaged")[0] for record in caplog.records] == [str(marker)] * 2
    assert marker.read_bytes() == whole


def test_opening_again_keeps_what_is_there(store: Store) -> None:
    put(store, [{"candidate": "a"}])
    assert len(Store.open(store.root, create=True).rows("candidates")) == 1
    assert len(Store.open(store.root).rows("candidates")) == 1


def test_a_file_in_the_way_of_the_folder_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="cannot use"):
            Store.open(root, create=True)


def test_a_place_where_no_folder_can_be_made_is_the_users_mistake() -> None:
    with pytest.raises(UsageError, match="cannot use /proc/x as a results folder"):
        Store.open(Path("/proc/x"), create=True)


def test_a_folder_that_cannot_be_written_is_refused_for_writing_only(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # a mode would not stop root
    assert Store.open(store.root) == store
    with pytest.raises(UsageError, match="cannot write"):
        Store.open(store.root, create=True)


def test_opening_a_store_imports_neither_pyarrow_nor_pandas(store: Store) -> None:
    code = (
        "import sys; from pathlib import Path; from layerwise.results.store import Store; from layerwise.results import"
        " format, frontier, plot, runs; Store.open(Path(sys.argv[1]));"
        " print(sorted({'pyarrow', 'pandas', 'matplotlib', 'rich', 'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, store.root], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_table_starts_with_the_common_columns_and_repeats_none() -> None:
    for table, columns in TABLES.items():
        assert not set(columns) & set(COMMON)
        assert arrow_schema(table).names == [*COMMON, *columns]
    assert set(TABLES) > RUN_TABLES
