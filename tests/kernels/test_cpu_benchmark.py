"""The processor's benchmark without its hours: how the dispatcher is judged, and what a page holds."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from layerwise.errors import NoisyMeasurement
from layerwise.kernels.device import this_device
from layerwise.kernels.latency_table import LatencyTable, Row
from layerwise.kernels.timing import Call, Sampling, Timing

FIRST = {"linear": 6.0, "matmul": 7.0, "mkl": 5.0, "onednn": 8.0, "int4pack": 1.25, "int8_dynamic": 2.0, "csr": 4.0}
FIRST |= {"factors": 1.0, "factors_on_base": 1.5}
SECOND = FIRST | {"linear": 4.0, "mkl": 5.2, "int4pack": 1.0}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, on a small shape, with its page somewhere else; its own name belongs to a package of others."""
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", folder / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPES", ((64, 512),))
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module.os, "sched_setaffinity", lambda *arguments: None)
    return module


def row(backend: str, label: str, ms: float, status: str = "measured") -> Row:
    product = {"backend": backend, "label": label, "n": 64, "k": 512, "m": 1, "dtype": "float32"}
    dense = label == "dense" or status == "no_kernel"
    made = Row.of(Timing(ms, ms, ms, 0.0, ms, 9, 1.0), **product, size_bytes=1, exact=True, dense=dense)
    return replace(made, status=status)


def scripted(*runs: Mapping[str, float]) -> object:
    """A timer whose calls give one run after the other, by backend."""
    left = list(runs)

    def time(candidates: Mapping[str, Sequence[Call]], sampling: Sampling) -> dict[str, Timing]:
        times = left.pop(0)
        if not times:
            raise NoisyMeasurement("times scatter too much")
        ms = {name: times[name.rpartition(" ")[2]] for name in candidates}
        return {name: Timing(value, value, value, 0.0, value, 9, 0.5) for name, value in ms.items()}

    return time


def test_a_choice_by_one_run_is_judged_by_the_times_of_another(script: ModuleType) -> None:
    def run(mkl: float, linear: float, int4: float) -> list[Row]:
        seen = [row("linear", "dense", linear), row("mkl", "dense", mkl), row("int4pack", "int4", int4)]
        return [*seen, row("mkl", "int2", 5.0, "no_kernel")]

    judged = script.judge(LatencyTable(this_device("cpu"), tuple(run(5.0, 6.0, 4.0)), {}), run(5.2, 4.0, 4.1))
    assert [ratio for _, ratio in judged] == [pytest.approx(4.1 / 4.0), pytest.approx(5.2 / 4.0)]


def test_the_page_shows_both_runs(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "time_cpu", scripted(FIRST, SECOND, {}))
    script.on_cpu(Sampling(rotate_bytes=0))
    page = (tmp_path / "kernels-cpu.md").read_text()
    assert "| int4-g128-sym | int4pack | 64 x 512 | 1 | 4.00 | 2.5 | met |" in page  # 5 over 1.25, of the first run
    assert "| int4-g128-sym | 64 x 512 | 1 | int4pack | measured | 1.000 | 4.000 | 0.250 |" in page  # of the second
    assert "| int2-g128-sym | 64 x 512 | 1 | mkl | no_kernel | 5.200 | 4.000 | 1.300 |" in page
    assert "slowest choice takes 1.300 of the best dense time" in page
    assert "- 64 x 512, 16 rows: times scatter too much" in page
    assert "| csr |" in page
    assert "64 x 512, 16 rows" in capsys.readouterr().err
