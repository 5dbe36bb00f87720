"""Every kernel beside its peers in one run, and the dispatcher's choices judged by times that it has not seen.

    python benchmarks/kernels.py                  # writes benchmarks/results/kernels-cpu.md; about a quarter of an hour
    python benchmarks/kernels.py --device cuda    # writes benchmarks/results/kernels-<GPU>.md; under ten minutes

On a processor: process CPU time of one thread, on one core. All candidates of a shape and number of rows take turns,
weights rotate through more than the last level of cache, and everything is checked against float64 first. Two such
runs are made of each, one after the other: by the first the dispatcher chooses, on the second its choices are judged.
The GPU's protocol stands in `kernels_gpu.py`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from kernel_weights import Shape, Weights, relative_error
from machine import header

from layerwise.errors import NoisyMeasurement
from layerwise.kernels.backends import Work, prepare
from layerwise.kernels.device import Device, cache_bytes, this_device
from layerwise.kernels.dispatch import Dispatcher
from layerwise.kernels.labels import DENSE
from layerwise.kernels.latency_table import LatencyTable, Row
from layerwise.kernels.measure import Race, entrants, run_together, table_of
from layerwise.kernels.packed import Packed
from layerwise.kernels.timing import Call, Sampling, Timing, one_thread, time_cpu

RESULTS = Path(__file__).parent / "results"
SHAPES: tuple[Shape, ...] = ((4096, 4096), (11008, 4096))
ROWS = (1, 16)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
SAMPLING = Sampling(rotate_bytes=max(100_000_000, 13 * cache_bytes() // 10), max_copies=40, retries=8)
"""All candidates of a shape are in memory at once, so weights rotate through less than a measurement of one takes."""

ALLOWED_LOSS = 1.03
"""Time of what the dispatcher chose over that of the best dense product."""

BOUNDS = {True: 1e-5, False: 2e-2}
"""Relative error allowed to exact backends, and to those that round activations or scales."""

TARGETS = (("int4-g128-sym", "int4pack", 1, 2.5), ("int8-channel-sym", "int8_dynamic", 1, 2.3))
"""(level, kernel, rows, how many times faster than the best dense product at least)."""


@cache
def weights(shape: Shape) -> list[Packed]:
    """What is compared at a shape: each format that a processor has a kernel for, and one that it has none for."""
    make = Weights(shape)
    quantized = [make.quantized(4), make.quantized(4, 32), make.quantized(8, -1), make.quantized(2)]
    sparse = [make.unstructured(zeros) for zeros in SPARSITIES]
    return [*quantized, *sparse, make.low_rank(256), make.low_rank(64, quantized[0])]


def together(shape: Shape, m: int) -> list[Race]:
    """The races that are run as one: the shape itself, and with half of its rows pruned."""
    work = Work(m, torch.float32, torch.device("cpu"))
    half = Weights((shape[0] // 2, shape[1])).dense()
    return [Race(tuple(weights(shape)), work), Race((half,), work)]


def check(races: Sequence[Race]) -> dict[str, float]:
    """The worst error of every kernel against float64.

    Raises:
        SystemExit: one is wrong; nothing is timed then.
    """
    worst: dict[str, float] = {}
    for race in races:
        x = torch.randn(race.work.m, race.weights[0].shape[1], generator=torch.Generator().manual_seed(1))
        for label, backend, packed in entrants(race):
            error = relative_error(prepare(backend.name, packed, race.work)(x), x, packed)
            if not error <= BOUNDS[backend.exact]:
                raise SystemExit(f"{backend.name} computes {label} of {race.note} with an error of {error:.1e}")
            worst[backend.name] = max(error, worst.get(backend.name, 0.0))
    return worst


class Twice:
    """Times the same calls two times over: the second run stays here."""

    def __init__(self) -> None:
        self.second: dict[str, Timing] = {}

    def __call__(self, candidates: Mapping[str, Sequence[Call]], sampling: Sampling) -> dict[str, Timing]:
        first = time_cpu(candidates, sampling)
        self.second = time_cpu(candidates, sampling)
        return first

    def of(self, row: Row, race: Race) -> Row:
        """A row of the first run with the times of the second."""
        if row.status != "measured":
            return row
        return replace(row, **asdict(self.second[f"{row.label} in {race.note} by {row.backend}"]))


def run(shape: Shape, m: int, sampling: Sampling) -> tuple[dict[str, float], list[Row], list[Row], list[Row]]:
    """Errors, the rows that the dispatcher chooses by, those with pruned rows, and those that it is judged by."""
    races, timer = together(shape, m), Twice()
    with one_thread():
        errors = check(races)
    rows, half = run_together(races, sampling, timer)
    return errors, rows, half, [timer.of(row, races[0]) for row in rows]


def time_rows(rows: Sequence[Row], half: Sequence[Row]) -> list[str]:
    """The table of one shape and number of rows."""
    best = min(row.median_ms for row in rows if row.dense)
    linear = next(row.median_ms for row in rows if row.backend == "linear" and row.dense)
    pruned = min(half, key=lambda row: row.median_ms)
    lines = [
        f"| {row.backend} | {row.label} | {row.median_ms:.3f} | {best / row.median_ms:.2f} | "
        f"{linear / row.median_ms:.2f} | {row.spread:.1%} | {row.status} |"
        for row in sorted(rows, key=lambda row: (not row.dense, row.label, row.median_ms))
    ]
    lines.append(
        f"| {pruned.backend} | half of the rows pruned | {pruned.median_ms:.3f} | {best / pruned.median_ms:.2f} | "
        f"{linear / pruned.median_ms:.2f} | {pruned.spread:.1%} | {pruned.status} |"
    )
    return lines


def judge(table: LatencyTable, seen: Sequence[Row]) -> list[tuple[str, float]]:
    """The dispatcher's choices by one run, as table rows, with their time over the best dense one's in another run."""
    dispatcher, judged = Dispatcher(table), []
    dense = {row.backend: row.median_ms for row in seen if row.label == DENSE}  # not those of levels without a kernel
    best = min(dense.values())
    for label in dict.fromkeys(row.label for row in seen if row.label != DENSE):
        what = next(row.what for row in seen if row.label == label)
        choice = dispatcher.choose(*what)
        if choice.row.dense:
            ms = dense[choice.backend]
        else:
            ms = next(row.median_ms for row in seen if row.label == label and row.backend == choice.backend)
        line = f"{label} | {what[1]} x {what[2]} | {what[3]} | {choice.backend} | {choice.row.status}"
        judged.append((f"| {line} | {ms:.3f} | {best:.3f} | {ms / best:.3f} |", ms / best))
    return judged


def targets(rows: Sequence[Row]) -> list[str]:
    """What was promised, beside what was measured."""
    lines = ["| level | kernel | shape | rows | times the best dense | promised | |", "|---|---|---|---|---|---|---|"]
    for label, backend, m, promised in TARGETS:
        for row in rows:
            if (row.label, row.backend, row.m) == (label, backend, m):
                alike = [other for other in rows if other.what[1:] == row.what[1:] and other.dense]
                ratio = min(other.median_ms for other in alike) / row.median_ms
                met = "met" if ratio >= promised else "missed"
                lines.append(f"| {label} | {backend} | {row.n} x {row.k} | {m} | {ratio:.2f} | {promised} | {met} |")
    return lines


@dataclass
class Findings:
    """What has been measured so far, as lines of the page and as rows."""

    tables: list[str] = field(default_factory=list)
    judged: list[tuple[str, float]] = field(default_factory=list)
    noisy: list[str] = field(default_factory=list)
    measured: list[Row] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def add(self, here: Device, shape: Shape, m: int, sampling: Sampling) -> None:
        """Measure one shape and number of rows."""
        title = f"{shape[0]} x {shape[1]}, {m} {'row' if m == 1 else 'rows'}"
        try:
            errors, rows, half, seen = run(shape, m, sampling)
        except NoisyMeasurement as error:
            self.noisy.append(f"- {title}: {error.message}")
            return
        self.errors = {name: max(error, self.errors.get(name, 0.0)) for name, error in errors.items()}
        self.measured += rows
        head = ["| kernel | level | ms | times best dense | times `F.linear` | spread | status |", "|---" * 7 + "|"]
        self.tables += ["", f"### {title}", "", *head, *time_rows(rows, half)]
        self.judged += judge(table_of(here, rows, sampling), seen)


def page(found: Findings, here: Device, sampling: Sampling, seconds: float) -> str:
    """The page with what has been measured."""
    worst = max((ratio for _, ratio in found.judged), default=math.nan)
    quality = [row.quality for row in found.measured if row.quality is not None]
    return "\n".join(
        [
            "# Kernels on a processor",
            "",
            *header("kernels.py", ["layerwise", "torch"]),
            f"- {here}",
            f"- process CPU time, one thread, one core; medians of {sampling.samples} windows of "
            f"{sampling.window_ms:g} ms; float32 activations",
            f"- weights rotated through {(sampling.rotate_bytes or 0) / 1e6:.0f} MB (last level of cache: "
            f"{here.cache_bytes / 1e6:.0f} MB), {sampling.max_copies} copies at most",
            f"- CPU time over wall time of the samples: {min(quality, default=0):.2f} to "
            f"{max(quality, default=0):.2f}; {seconds:.0f} s in all",
            *(["", "Too noisy, and left out:", "", *found.noisy] if found.noisy else []),
            "",
            "## Promised and measured",
            "",
            *targets(found.measured),
            "",
            f"The dispatcher's slowest choice takes {worst:.3f} of the best dense time (allowed: {ALLOWED_LOSS}).",
            "",
            "## Times, side by side",
            *found.tables,
            "",
            "## The dispatcher's choices, judged by a second run",
            "",
            "| level | shape | rows | runs as | status | ms | best dense, ms | over it |",
            "|---|---|---|---|---|---|---|---|",
            *(line for line, _ in found.judged),
            "",
            "## Greatest relative error against float64, checked before anything was timed",
            "",
            "| kernel | error |",
            "|---|---|",
            *(f"| {name} | {error:.1e} |" for name, error in found.errors.items()),
            "",
        ]
    )


def on_cpu(sampling: Sampling) -> None:
    """Measure, and write the page after each shape and number of rows."""
    started = time.perf_counter()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    here, found = this_device("cpu"), Findings()
    for shape in SHAPES:
        for m in ROWS:
            seconds = time.perf_counter() - started
            print(f"{seconds:.0f} s: {shape[0]} x {shape[1]}, {m} rows", file=sys.stderr, flush=True)
            found.add(here, shape, m, sampling)
            text = page(found, here, sampling, time.perf_counter() - started)
            (RESULTS / "kernels-cpu.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description="Every kernel beside its peers in one run.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=480.0, help="on a GPU no race begins after so many")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the page of a GPU")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        from kernels_gpu import on_gpu

        on_gpu(arguments.results, arguments.seconds)
    else:
        on_cpu(SAMPLING)


if __name__ == "__main__":
    main()
