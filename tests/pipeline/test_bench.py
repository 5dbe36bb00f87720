"""`layerwise bench` on tiny shapes and short windows: what it prints, keeps and refuses. No time is looked at."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import NoisyMeasurement, UsageError
from layerwise.kernels.device import this_device
from layerwise.kernels.dispatch import Dispatcher
from layerwise.kernels.latency_table import LatencyTable
from layerwise.kernels.timing import Call, Sampling, Timing
from layerwise.pipeline.bench import COLUMNS, Bench, read_numbers, read_shapes
from layerwise.pipeline.commands.options import STOPPED

ASKED = [
    "kernel",
    "bits",
    "group_size",
    "m",
    "n",
    "k",
    "milliseconds",
    "dense_milliseconds",
    "ratio",
    "spread",
    "device",
]
SMALL = ["--shapes", "32x64", "--m", "1", "--window-ms", "0.05", "--samples", "3", "--max-spread", "1000"]


@pytest.fixture
def bench(in_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command, with a rotation that fits a test."""
    monkeypatch.setattr("layerwise.kernels.measure.copies_needed", lambda *arguments: 1)
    return lambda *arguments: in_process("bench", *arguments)


class ScriptedTimer:
    """Four times as fast as dense, which takes 1 ms; stops or fails at a given race."""

    def __init__(self, fails_at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self._races, self._fails_at, self._error = itertools.count(), fails_at, error

    def __call__(self, candidates: Mapping[str, Sequence[Call]], sampling: Sampling) -> dict[str, Timing]:
        if next(self._races) == self._fails_at:
            raise self._error("times scatter too much")
        return {name: self._timing(1.0 if name.startswith("dense") else 0.25) for name in candidates}

    @staticmethod
    def _timing(ms: float) -> Timing:
        return Timing(ms, ms, ms * 1.05, 0.0, ms / 1.02, 9, 1.0)


def small(timer: ScriptedTimer, **more: Any) -> Bench:
    sampling = Sampling(rotate_bytes=0)
    return Bench(shapes=[(32, 64)], rows=[1, 16], bits=[4, 2], group_sizes=[32], sampling=sampling, timer=timer, **more)


def test_csv_has_every_column_and_a_line_per_kernel_and_level(bench: Callable[..., Any]) -> None:
    outcome = bench(*SMALL, "--format", "csv")
    assert outcome.code == 0
    rows = list(csv.DictReader(io.StringIO(outcome.out)))
    assert set(ASKED) <= set(rows[0])
    found = {(row["kernel"], row["level"], row["bits"], row["group_size"]) for row in rows}
    assert {("linear", "dense", "", ""), ("int4pack", "int4-channel-sym", "4", "-1")} <= found
    assert {row["status"] for row in rows if row["bits"] in ("2", "3")} == {"no_kernel"}
    assert {(row["m"], row["n"], row["k"]) for row in rows} == {("1", "32", "64")}
    for row in rows:
        assert float(row["ratio"]) == pytest.approx(float(row["dense_milliseconds"]) / float(row["milliseconds"]))
        assert row["device"] == this_device("cpu").name


@pytest.mark.parametrize("format_", ["table", "json", "markdown"])
def test_every_format_prints_the_same_rows(bench: Callable[..., Any], format_: str) -> None:
    outcome = bench(*SMALL, "--bits", "4", "--group-size", "32", "--format", format_)
    assert outcome.code == 0
    assert outcome.out.count("int4pack") == 1
    if format_ == "json":
        rows = json.loads(outcome.out)
        assert [row["level"] for row in rows] == ["dense"] * 4 + ["int4-g32-sym"]
        assert rows[-1]["bits"] == 4


def test_progress_goes_to_stderr(bench: Callable[..., Any]) -> None:
    outcome = bench(*SMALL, "--shapes", "16x32,16x64", "--bits", "4")
    assert [line.partition(",")[0] for line in outcome.err.splitlines() if not line.startswith("note: ")] == [
        f"{done} of 3: {shape}" for done, shape in enumerate(["32 x 64", "16 x 32", "16 x 64"])
    ]


def test_a_group_size_that_a_shape_has_no_room_for_is_told(bench: Callable[..., Any]) -> None:
    outcome = bench(*SMALL, "--bits", "4", "--group-size", "32,64,128", "--format", "csv")
    assert [line for line in outcome.err.splitlines() if line.startswith("note: ")] == [
        f"note: group size {size} is no less than the 64 columns of 32x64: measured as the whole row (-1)"
        for size in (64, 128)
    ]
    found = {row["group_size"] for row in csv.DictReader(io.StringIO(outcome.out))}
    assert found == {"", "32", "-1"}


def test_the_device_is_named_once_where_people_read(bench: Callable[..., Any]) -> None:
    name = this_device("cpu").name
    outcome = bench(*SMALL, "--bits", "4")
    assert outcome.out.startswith(f"device: {name}\n\n")
    assert outcome.out.count(name) == 1


def test_the_saved_table_dispatches(bench: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    outcome = bench(*SMALL, "--bits", "4,8", "--group-size", "-1", "--output", str(path))
    assert f"wrote {path}" in outcome.err
    here = this_device("cpu")
    dispatcher = Dispatcher(LatencyTable.load(path, here), here)
    assert dispatcher.choose("int8-channel-sym", 32, 64, 1, "float32").row.status == "measured"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "32by64"], "'32by64' is no shape"),
        (["--m", "one"], "'one' is no whole number"),
        (["--m", "4,0"], "0 rows of activations: there must be at least 1"),
        (["--shapes", "8x8,16x0"], "no weight has the shape 16x0"),
        (["--output", "/nonexistent/table.json"], "cannot write /nonexistent/table.json: /nonexistent does not exist"),
        (["--output", "table.CSV"], "--output table.CSV: the table of times is saved as JSON"),
        (["--bits", "5"], "no kernel takes weights of 5 bits"),
        (["--group-size", "0"], "no group has 0 columns"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    bench: Callable[..., Any], arguments: list[str], said: str
) -> None:
    outcome = bench(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert said in outcome.err


def test_a_gpu_that_is_not_there_is_refused_in_words(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outcome = bench("--device", "cuda")
    assert (outcome.code, outcome.out) == (2, "")
    assert "error: device cuda: " in outcome.err
    assert "use the device cpu" in outcome.err


def test_a_missing_triton_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.kernels.device.this_device", lambda kind: this_device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="Triton is not installed"):
        Bench(device="cuda")


def test_ratio_is_dense_over_ours_and_chosen_says_what_runs() -> None:
    task = small(ScriptedTimer())
    task.run()
    frame = task.frame()
    assert list(frame.columns) == list(COLUMNS)
    ours = frame[frame["kernel"] == "int4pack"]
    assert ours["ratio"].tolist() == [4.0, 4.0]
    assert ours["dense_milliseconds"].tolist() == [1.0, 1.0]
    assert ours["spread"].tolist() == pytest.approx([0.02, 0.02])
    assert ours["chosen"].all()


def test_what_was_measured_before_ctrl_c_is_kept() -> None:
    task = small(ScriptedTimer(fails_at=1))
    with pytest.raises(KeyboardInterrupt):
        task.run()
    assert set(task.frame()["m"]) == {1}


def test_a_benchmark_stopped_at_once_has_an_empty_table_of_all_columns() -> None:
    task = small(ScriptedTimer(fails_at=0))
    with pytest.raises(KeyboardInterrupt):
        task.run()
    assert list(task.frame().columns) == list(COLUMNS)
    assert len(task.frame()) == 0


def test_ctrl_c_prints_what_there_is_and_ends_with_its_own_code(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.kernels.measure.time_cpu", ScriptedTimer(fails_at=1))
    outcome = bench(*SMALL, "--m", "16", "--bits", "4", "--format", "csv")
    assert outcome.code == STOPPED
    assert {row["m"] for row in csv.DictReader(io.StringIO(outcome.out))} == {"1"}
    assert "stopped after" in outcome.err


def test_a_race_that_is_too_noisy_costs_only_its_own_rows() -> None:
    task = small(ScriptedTimer(fails_at=0, error=NoisyMeasurement))
    with pytest.raises(NoisyMeasurement, match="32 x 64, 1 rows: times scatter too much"):
        task.run()
    assert set(task.frame()["m"]) == {16}


def test_shapes_and_numbers_are_read_with_and_without_commas() -> None:
    assert read_shapes(["4096x4096, 11008 x 4096", "16×32"]) == [(4096, 4096), (11008, 4096), (16, 32)]
    assert read_numbers(["1,16", "-1"], "rows") == [1, 16, -1]
