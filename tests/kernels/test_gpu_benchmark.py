"""The GPU's benchmark without a GPU: its arithmetic by hand, its plan, and what it does when time runs out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
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
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, which stands beside the other benchmarks."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return pytest.importorskip("kernels_gpu")


@pytest.fixture
def page(script: ModuleType) -> ModuleType:
    """The module that writes its page."""
    return importlib.import_module("kernels_gpu_page")


@pytest.fixture
def constants(page: ModuleType) -> Any:
    """3 TB/s, 0.8 PFLOP/s and 2 us."""
    return page.Constants(3e9, 0.8e12, 0.002)


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
def test_targets_say_what_was_reached(page: ModuleType, constants: Any, ms: float, states: list[str]) -> None:
    size = round(N * K * 0.516)
    rows = [row("cublas", "dense", 0.0783), row("triton_quantized", "int4-g128-sym", ms, size_bytes=size)]
    lines = [line for target in page.TARGETS[:2] for line in target.lines(rows, constants)]
    assert [line.split(" | ")[-1].removesuffix(" |") for line in lines] == states
    assert f"| {(size + 2 * (N + K)) / 3e9 / ms:.2f} | 0.65 | 0.8 |" in lines[0]
    assert f"| {0.0783 / ms:.2f} | 2.4 | 3 |" in lines[1]


def test_a_target_of_at_most_is_met_from_below(page: ModuleType, constants: Any) -> None:
    (target,) = (target for target in page.TARGETS if target.at_most)
    four, ranked = row("triton_quantized", "int4-g128-sym", 0.020), row("triton_low_rank", "int4-g128-sym+r64", 0.0215)
    assert [line.endswith("| aim met |") for line in target.lines([four, ranked], constants)] == [True]
    slow = replace(ranked, median_ms=0.0225)
    assert [line.endswith("| missed |") for line in target.lines([four, slow], constants)] == [True]


def test_a_target_without_a_measured_product_says_so(page: ModuleType, constants: Any) -> None:
    little = [row("cublas", "dense", 0.01, n=4096), row("triton_quantized", "int4-g128-sym", 0.005, n=4096)]
    for target in page.TARGETS:
        assert [line.endswith("| not measured |") for line in target.lines(little, constants)] == [True]


def test_every_target_has_a_race_that_measures_it(script: ModuleType, page: ModuleType, constants: Any) -> None:
    rows = []
    for shape, m, dtype, formats in script.PLAN:
        labels = [packed.label for packed in formats(script.Weights((64, 1024)))]
        entries = [("cublas", "dense"), *(("triton_quantized", label) for label in labels)]
        for backend, label in entries:
            made = row(backend, label, 0.01, m=m)
            rows.append(replace(made, n=shape[0], k=shape[1], dtype=str(dtype)[6:]))
    unmeasured = [
        target.name
        for target in page.TARGETS
        for line in target.lines(list({(r.backend, r.what): r for r in rows}.values()), constants)
        if line.endswith("| not measured |")
    ]
    assert unmeasured == []


def test_every_format_of_the_plan_has_a_kernel_on_a_gpu(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cusparselt.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    for _, m, dtype, formats in script.PLAN:
        for packed in formats(script.Weights((512, 1024))):
            if packed.format == "unstructured" and m > 4:
                continue  # runs as its dense weight
            backends = set(able(packed, Work(m, dtype, torch.device("cuda")))) - {"cublas"}
            assert backends, f"{packed.label} at {m} rows in {dtype}"


def findings(script: ModuleType, folder: Path, seconds: Callable[[], float] = lambda: 0.0) -> Any:
    return script.Findings(HERE, folder / "page.md", seconds, script.Constants(3e9, 0.8e12, 0.002))


def race_of(n: int) -> Race:
    return Race((Dense((n, K), torch.zeros(1).expand(n, K)),), Work(1, torch.float16, torch.device("cuda")))


def test_no_race_begins_after_the_deadline_and_what_fails_is_said(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, seconds = list[int](), [0.0]

    def planned() -> Iterator[Any]:
        def make(n: int) -> Race:
            made.append(n)
            if n == 3:
                raise MemoryError("too large\nby far")
            return race_of(n)

        for n in (1, 2, 3, 4, 5):
            seconds[0] += 1
            yield script.Planned(f"race {n}", lambda n=n: make(n))

    def run(race: Race, lost: Any) -> list[Row]:
        n = race.weights[0].shape[0]
        if n == 2:
            raise NoisyMeasurement("times scatter too much")
        lost("dense by slow", ValueError("no such thing"))
        return [row("cublas", "dense", 1.0, n=n)]

    found = findings(script, tmp_path, lambda: seconds[0])
    script.measure(found, planned(), run, 4.0)
    assert made == [1, 2, 3, 4], "weights beyond the deadline are not even made"
    assert [row.n for row in found.rows.values()] == [1, 4]
    assert found.left_out == [
        "race 1: dense by slow: ValueError: no such thing",
        "race 2: NoisyMeasurement: times scatter too much",
        "race 3: MemoryError: too large",
        "race 4: dense by slow: ValueError: no such thing",
        "race 5: no time left",
    ]
    told = capsys.readouterr().err
    assert "3 s: race 3: MemoryError: too large\nby far" in told
    assert all(f"{n} s: race {n}" in told for n in (1, 2, 3, 4, 5))


def test_what_was_measured_is_on_the_page_before_the_next_race_begins(script: ModuleType, tmp_path: Path) -> None:
    found = findings(script, tmp_path)

    def run(race: Race, lost: Any) -> list[Row]:
        if race.weights[0].shape[0] == 2:
            raise KeyboardInterrupt
        return [row("cublas", "dense", 1.0, n=1)]

    planned = [script.Planned(f"race {n}", lambda n=n: race_of(n)) for n in (1, 2)]
    with pytest.raises(KeyboardInterrupt):
        script.measure(found, planned, run, 4.0)
    assert f"| cublas | dense | 1 x {K}, 1 rows |" in (tmp_path / "page.md").read_text()


def test_a_page_without_constants_and_dense_times_is_still_written(page: ModuleType) -> None:
    rows = [row("triton_quantized", "int4-g128-sym", 0.025)]
    text = page.report(
        HERE, page.UNKNOWN, rows, errors=[], left_out=["constants: lost"], launches=[], seconds=1, samples=30
    )
    assert "| triton_quantized | int4-g128-sym |" in text
    targets = text.partition("## Targets")[2].partition("## Times")[0]
    assert targets.count("not measured") == len(page.TARGETS)


def test_a_wrong_backend_leaves_the_others_of_its_label_in_the_race(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raced = []

    def run_race(race: Race, sampling: Any, timer: Any, *, admit: Any, lost: Any) -> list[Row]:
        raced.append([name for name in ("tinygemm", "triton_quantized") if admit("int4", SimpleNamespace(name=name))])
        return []

    def broken() -> Any:
        raise RuntimeError("no bandwidth")

    monkeypatch.setattr(script, "this_device", lambda kind: HERE)
    monkeypatch.setattr(script, "constants_of_device", broken)
    monkeypatch.setattr(script, "check", lambda lost: (["| e |"], {("tinygemm", "int4"), ("cublas", "int8")}))
    monkeypatch.setattr(script, "races", lambda: [script.Planned("race", lambda: race_of(1))])
    monkeypatch.setattr(script, "run_race", run_race)
    monkeypatch.setattr(script, "eager", lambda lost: ["| l |"])
    script.on_gpu(tmp_path)
    assert raced == [["triton_quantized"]]
    text = (tmp_path / "kernels-some-gpu.md").read_text()
    assert "- constants of the device: RuntimeError: no bandwidth" in text
    assert "- int4 by tinygemm: wrong result, not raced" in text


def test_the_page_says_what_was_measured_on_what(page: ModuleType, constants: Any) -> None:
    rows = [row("cublas", "dense", 0.0783, size_bytes=2 * N * K), row("triton_quantized", "int4-g128-sym", 0.025)]
    text = page.report(
        HERE,
        constants,
        rows,
        errors=["| e |"],
        left_out=["something: no time left"],
        launches=["| l |"],
        seconds=99,
        samples=30,
    )
    for part in (
        "# Kernels on Some GPU",
        "copy 3.00 TB/s",
        "0.80 PFLOP/s",
        "2.00 us",
        "99 s",
        "- something: no time left",
    ):
        assert part in text
    (line,) = (
        line for line in text.splitlines() if line.startswith("| triton_quantized | int4-g128-sym | 28672 x 4096")
    )
    least = (N * K + 2 * (N + K)) / 3e12 * 1e6
    assert f"| 25.0 | {least / 25:.2f} | {least / 23:.2f} | 3.13 |" in line
