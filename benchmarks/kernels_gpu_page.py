"""The page of the GPU's benchmark: targets, times beside their roofline, errors, and what was not measured.

The roofline of a product is the longer of reading its bytes at the copy's bandwidth and computing at the product's
rate. Where the device's constants could not be measured, whatever is a fraction of them is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from machine import header

from layerwise.kernels.backends import BACKENDS
from layerwise.kernels.device import Device
from layerwise.kernels.latency_table import Row

MANY_WEIGHTS = 58_000_000
"""From so many weights on the targets hold: below, what a launch costs weighs too much."""


@dataclass(frozen=True)
class Constants:
    """What the device reaches at best.

    Args:
        bytes_per_ms: of a copy, read and written.
        flops_per_ms: of a large product in bfloat16.
        t0_ms: of an empty kernel in a graph.
    """

    bytes_per_ms: float
    flops_per_ms: float
    t0_ms: float

    def roofline_ms(self, row: Row) -> float:
        """The least time of a product."""
        moved = row.size_bytes + 2 * row.m * (row.k + row.n)
        return max(moved / self.bytes_per_ms, 2 * row.m * row.n * row.k / self.flops_per_ms)


UNKNOWN = Constants(math.nan, math.nan, math.nan)
"""Of a device whose constants could not be measured."""


@dataclass(frozen=True)
class Target:
    """What a kernel was built to reach.

    Args:
        name: of the target.
        first: the value to reach first.
        aim: the value to reach in the end.
        value: of the measured rows, one value per shape: (shape and rows, value).
        at_most: the value is to lie below, not above.
    """

    name: str
    first: float
    aim: float
    value: Callable[[Sequence[Row], Constants], list[tuple[str, float]]]
    at_most: bool = False

    def lines(self, rows: Sequence[Row], constants: Constants) -> Iterator[str]:
        """Table rows; one that says so if nothing was measured."""
        found = self.value(rows, constants)
        if not found:
            yield f"| {self.name} | | | {self.first:g} | {self.aim:g} | not measured |"
        for where, value in found:
            first, aim = ((value <= bound) if self.at_most else (value >= bound) for bound in (self.first, self.aim))
            state = "aim met" if aim else "first met" if first else "missed"
            state = "not measured" if math.isnan(value) else state
            yield f"| {self.name} | {where} | {value:.2f} | {self.first:g} | {self.aim:g} | {state} |"


def fraction(label: str, m: int) -> Callable[[Sequence[Row], Constants], list[tuple[str, float]]]:
    """Of our kernel for a label on many weights: roofline over its time."""

    def value(rows: Sequence[Row], constants: Constants) -> list[tuple[str, float]]:
        return [(_where(row), constants.roofline_ms(row) / row.median_ms) for row in _ours(rows, label, m)]

    return value


def over_dense(label: str, m: int) -> Callable[[Sequence[Row], Constants], list[tuple[str, float]]]:
    """Of our kernel for a label on many weights: cuBLAS's time over its own."""

    def value(rows: Sequence[Row], constants: Constants) -> list[tuple[str, float]]:
        return [(_where(row), _dense_ms(rows, row) / row.median_ms) for row in _ours(rows, label, m)]

    return value


def over_four_bits(label: str, base: str) -> Callable[[Sequence[Row], Constants], list[tuple[str, float]]]:
    """Of our kernel for a label at one row: its time over that of another label."""

    def value(rows: Sequence[Row], constants: Constants) -> list[tuple[str, float]]:
        bases = {row.what[1:]: row.median_ms for row in _ours(rows, base, 1)}
        found = [row for row in _ours(rows, label, 1) if row.what[1:] in bases]
        return [(_where(row), row.median_ms / bases[row.what[1:]]) for row in found]

    return value


TARGETS = (
    Target("4 bits, fraction of the roofline", 0.65, 0.80, fraction("int4-g128-sym", 1)),
    Target("4 bits, times cuBLAS", 2.4, 3.0, over_dense("int4-g128-sym", 1)),
    Target("2 bits, fraction of the roofline", 0.45, 0.62, fraction("int2-g128-sym", 1)),
    Target("4 bits, 16 rows, fraction of the roofline", 0.60, 0.75, fraction("int4-g128-sym", 16)),
    Target("4 bits, half of the blocks zero, times cuBLAS", 4.5, 4.5, over_dense("int4-g128-sym-blocks50%", 1)),
    Target(
        "rank 64 on 4 bits, time over 4 bits", 1.10, 1.10, over_four_bits("int4-g128-sym+r64", "int4-g128-sym"), True
    ),
    Target("4 bits, 2048 rows, times cuBLAS", 0.80, 0.80, over_dense("int4-g128-sym", 2048)),
    Target("2:4, times cuBLAS", 1.35, 1.35, over_dense("2:4-fp16", 1)),
    Target("unstructured 50 %, times cuBLAS", 1.2, 1.2, over_dense("unstructured-fp16-50%", 1)),
    Target("unstructured 70 %, times cuBLAS", 1.8, 1.8, over_dense("unstructured-fp16-70%", 1)),
    Target("unstructured 90 %, times cuBLAS", 3.5, 3.5, over_dense("unstructured-fp16-90%", 1)),
)


def _ours(rows: Sequence[Row], label: str, m: int) -> list[Row]:
    return [
        row
        for row in rows
        if (row.label, row.m, row.dtype) == (label, m, "float16")
        and BACKENDS[row.backend].ours
        and row.status == "measured"
        and row.n * row.k >= MANY_WEIGHTS
    ]


def _dense_ms(rows: Sequence[Row], like: Row) -> float:
    """NaN if the dense product itself failed."""
    return min((row.median_ms for row in rows if row.dense and row.what[1:] == like.what[1:]), default=math.nan)


def _where(row: Row) -> str:
    return f"{row.n} x {row.k}, {row.m} rows"


def time_rows(rows: Sequence[Row], constants: Constants) -> Iterator[str]:
    """Every measured product, as table rows."""
    for row in sorted(rows, key=lambda row: (-row.n * row.k, row.n, row.m, row.dtype, not row.dense, row.label)):
        least, dense = constants.roofline_ms(row), _dense_ms(rows, row)
        beyond = row.median_ms - constants.t0_ms
        share = f"{least / beyond:.2f}" if beyond > 0 else ""
        yield (
            f"| {row.backend} | {row.label} | {_where(row)} | {row.dtype} | {row.median_ms * 1e3:.1f} | "
            f"{least / row.median_ms:.2f} | {share} | {dense / row.median_ms:.2f} | {row.spread:.1%} | {row.status} |"
        )


def report(
    here: Device,
    constants: Constants,
    rows: Sequence[Row],
    *,
    errors: Sequence[str],
    left_out: Sequence[str],
    launches: Sequence[str],
    seconds: float,
    samples: int,
) -> str:
    """The page."""
    target_lines = [line for target in TARGETS for line in target.lines(rows, constants)]
    return "\n".join(
        [
            f"# Kernels on {here.name}",
            "",
            *header("kernels.py", ["layerwise", "torch", "triton"], here.name),
            f"- {here}",
            f"- CUDA graphs over rotated weights, median of {samples} replays in turns; {seconds:.0f} s",
            f"- copy {constants.bytes_per_ms / 1e9:.2f} TB/s, bfloat16 product "
            f"{constants.flops_per_ms / 1e12:.2f} PFLOP/s, empty kernel in a graph {constants.t0_ms * 1e3:.2f} us",
            "",
            f"## Targets, on at least {MANY_WEIGHTS / 1e6:.0f} M weights",
            "",
            "| target | product | measured | first | aim | |",
            "|---|---|---|---|---|---|",
            *target_lines,
            "",
            "## Times",
            "",
            "Fraction: the roofline's time over the measured one, with and without the time of an empty kernel.",
            "",
            "| kernel | level | product | dtype | us | fraction | without t0 | times cuBLAS | spread | status |",
            "|---" * 10 + "|",
            *time_rows(rows, constants),
            "",
            "## In a graph and launched from Python, 4096 x 4096, 1 row, us",
            "",
            "| kernel | graph | Python |",
            "|---|---|---|",
            *launches,
            "",
            "## Relative errors against float64, checked before anything was timed",
            "",
            "| kernel | level | rows | dtype | error |",
            "|---|---|---|---|---|",
            *errors,
            *(["", "## Not measured", "", *(f"- {note}" for note in left_out)] if left_out else []),
            "",
        ]
    )
