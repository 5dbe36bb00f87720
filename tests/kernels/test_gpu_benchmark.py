"""The GPU's benchmark without a GPU: its arithmetic by hand, its plan, and what it does when time runs out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from layerwise.errors import NoisyMeasurement
from layerwise.kernels.backends import Work, able
from layerwise.kernels.dense import Dense
from layerwise.kernels.device import Device
from layerwise.kernels.latency_table import Row
from layerwise.kernels.measure import Race
from layerwise.kernels.timing import Timing

HERE = Device("cuda", "Some GPU", 132, ("sm_90",), 80, 50 << 20, 0, "2.13.0", "3.9.0", "driver 1.2")
N, K = 28672, 4096


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, which stands beside the other benchmarks."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return pytest.importorskip("kernels_gpu")


@pytest.fixture
def constants(benchmark: ModuleType) -> Any:
    """3 TB/s, 0.8 PFLOP/s and 2 us."""
    return benchmark.Constants(3e9, 0.8e12, 0.002)


def row(backend: str, label: str, ms: float, *, m: int = 1, size_bytes: int = N * K, n: int = N) -> Row:
    timing = Timing(ms, ms, ms, 0.0, ms, 30, None)
    product = {"backend": backend, "label": label, "n": n, "k": K, "m": m, "dtype": "float16"}
    return Row.of(timing, **product, size_bytes=size_bytes, exact=True, dense=label == "dense")


def test_the_roofline_is_the_longer_of_reading_and_computing(constants: Any) -> None:
    few = row("cublas", "dense", 1.0, size_bytes=2 * N * K)
    assert constants.roofline_ms(few) == pytest.approx((2 * N * K + 2 * (N + K)) / 3e12 * 1e3)
    many = row("cublas", "dense", 1.0, m=4096, size_bytes=2 * N * K)
    assert constants.roofline_ms(many) == pytest.approx(2 * 4096 * N * K / 0.8e15 * 1e3)


@pytest.mark.parametrize(
    ("ms", "states"),
    [(0.025, ["aim met", "aim met"]), (0.031, ["first met", "first met"]), (0.05, ["missed", "missed"])],
)
def test_targets_say_what_was_reached(benchmark: ModuleType, constants: Any, ms: float, states: list[str]) -> None:
    size = round(N * K * 0.516)
    rows = [row("cublas", "dense", 0.0783), row("triton_quantized", "int4-g128-sym", ms, size_bytes=size)]
    lines = [line for target in benchmark.TARGETS[:2] for line in target.lines(rows, constants)]
    assert [line.split(" | ")[-1].removesuffix(" |") for line in lines] == states
    assert f"| {(size + 2 * (N + K)) / 3e9 / ms:.2f} | 0.65 | 0.8 |" in lines[0]
    assert f"| {0.0783 / ms:.2f} | 2.4 | 3 |" in lines[1]


def test_a_target_of_at_most_is_met_from_below(benchmark: ModuleType, constants: Any) -> None:
    (target,) = (target for target in benchmark.TARGETS if target.at_most)
    four, ranked = row("triton_quantized", "int4-g128-sym", 0.020), row("triton_low_rank", "int4-g128-sym+r64", 0.0215)
    assert [line.endswith("| aim met |") for line in target.lines([four, ranked], constants)] == [True]
    slow = replace(ranked, median_ms=0.0225)
    assert [line.endswith("| missed |") for line in target.lines([four, slow], constants)] == [True]


def test_a_target_without_a_measured_product_says_so(benchmark: ModuleType, constants: Any) -> None:
    little = [row("cublas", "dense", 0.01, n=4096), row("triton_quantized", "int4-g128-sym", 0.005, n=4096)]
    for target in benchmark.TARGETS:
        assert [line.endswith("| not measured |") for line in target.lines(little, constants)] == [True]


def test_every_target_has_a_race_that_measures_it(benchmark: ModuleType, constants: Any) -> None:
    rows = []
    for shape, m, dtype, formats in benchmark.PLAN:
        labels = [packed.label for packed in formats(benchmark.Weights((64, 1024)))]
        entries = [("cublas", "dense"), *(("triton_any", label) for label in labels)]
        for backend, label in entries:
            made = row(backend, label, 0.01, m=m)
            rows.append(replace(made, n=shape[0], k=shape[1], dtype=str(dtype)[6:]))
    unmeasured = [
        target.name
        for target in benchmark.TARGETS
        for line in target.lines(list({(r.backend, r.what): r for r in rows}.values()), constants)
        if line.endswith("| not measured |")
    ]
    assert unmeasured == []


def test_every_format_of_the_plan_has_a_kernel_on_a_gpu(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cusparselt.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    for _, m, dtype, formats in benchmark.PLAN:
        for packed in formats(benchmark.Weights((512, 1024))):
            if packed.format == "unstructured" and m > 4:
                continue  # runs as its dense weight
            backends = set(able(packed, Work(m, dtype, torch.device("cuda")))) - {"cublas"}
            assert backends, f"{packed.label} at {m} rows in {dtype}"


def test_no_race_begins_after_the_deadline_and_what_fails_is_said(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned() -> Iterator[Race]:
        for n in (1, 2, 3, 4):
            weight = Dense((n, K), torch.zeros(1).expand(n, K))
            yield Race((weight,), Work(1, torch.float16, torch.device("cuda")))

    def run(race: Race) -> list[Row]:
        if race.weights[0].shape[0] == 2:
            raise NoisyMeasurement("times scatter too much")
        return [row("cublas", "dense", 1.0, n=race.weights[0].shape[0])]

    seconds = itertools.count(step=1.0)
    rows, left_out = benchmark.measure(planned(), run, lambda: next(seconds), 5.0)
    assert [made.n for made in rows] == [1, 3]
    assert left_out == [
        f"2 x {K}, 1 rows, float16, dense: times scatter too much",
        f"4 x {K}, 1 rows, float16, dense: no time left",
    ]
    told = [line.partition(", 1 rows")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == [f"1 s: 1 x {K}", f"3 s: 2 x {K}", f"5 s: 3 x {K}"]


def test_the_page_says_what_was_measured_on_what(benchmark: ModuleType, constants: Any) -> None:
    rows = [row("cublas", "dense", 0.0783, size_bytes=2 * N * K), row("triton_quantized", "int4-g128-sym", 0.025)]
    page = benchmark.report(
        HERE, constants, rows, errors=["| e |"], left_out=["something: no time left"], launches=["| l |"], seconds=99
    )
    for part in (
        "# Kernels on Some GPU",
        "copy 3.00 TB/s",
        "0.80 PFLOP/s",
        "2.00 us",
        "99 s",
        "- something: no time left",
    ):
        assert part in page
    (line,) = (
        line for line in page.splitlines() if line.startswith("| triton_quantized | int4-g128-sym | 28672 x 4096")
    )
    least = (N * K + 2 * (N + K)) / 3e12 * 1e6
    assert f"| 25.0 | {least / 25:.2f} | {least / 23:.2f} | 3.13 |" in line
