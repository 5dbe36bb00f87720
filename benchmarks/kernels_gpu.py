"""The protocol on a GPU, in one command and under ten minutes: constants, correctness, races, roofline, targets.

    python benchmarks/kernels.py --device cuda

1. Constants of the device: bandwidth of a copy, a bfloat16 product of 8192 cubed, the gap between empty kernels in a
   graph. They are the ceiling that everything else is a fraction of.
2. Correctness: every kernel on every format against float64, at a small shape. What is wrong is not timed.
3. Races: for each shape and number of rows all formats and peers as CUDA graphs over rotated weights, in turns. They
   run in the order of their worth, and none begins after the deadline; what was left out is said.
4. Launches from Python beside graphs, for one small shape.

The roofline of a product is the longer of reading its bytes at the copy's bandwidth and computing at the product's
rate.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from kernel_weights import Shape, Weights, relative_error
from machine import header
from triton.errors import TritonError

from layerwise.errors import LayerwiseError, UsageError
from layerwise.kernels.backends import Work, able, prepare
from layerwise.kernels.device import Device, this_device
from layerwise.kernels.latency_table import Row
from layerwise.kernels.measure import Race, entrants, rotation, run_race
from layerwise.kernels.packed import Packed
from layerwise.kernels.timing import Call, Sampling, time_cuda, time_eager

DEADLINE = 480.0
"""Seconds after which no race begins; the longest takes well under a minute."""

SAMPLING = Sampling(samples=30, retries=3)
LARGE: Shape = (28672, 4096)
MIDDLE: Shape = (14336, 4096)
SMALL: Shape = (4096, 4096)
CHECKED: Shape = (512, 1024)
MANY_WEIGHTS = 58_000_000
"""From so many weights on the targets hold: below, what a launch costs weighs too much."""

BOUNDS = {True: 2e-3, False: 5e-2}
"""Relative error allowed to kernels that round only their result to 16 bits, and to those that round more."""

FAILURES = (LayerwiseError, TritonError, RuntimeError)
"""What a kernel may fail with: refused, not compiled, or out of memory. The others are still measured."""

Formats = Callable[[Weights], list[Packed]]


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
            yield f"| {self.name} | {where} | {value:.2f} | {self.first:g} | {self.aim:g} | {state} |"


def quantized_formats(make: Weights) -> list[Packed]:
    """Every width, and what stands on four bits."""
    four = make.quantized(4)
    return [four, make.quantized(2), make.quantized(3), make.quantized(8), make.low_rank(64, four)]


def sparse_formats(make: Weights) -> list[Packed]:
    """Blocks, 2:4 and single weights."""
    return [make.block_sparse(4, 0.5), make.two_of_four(), *(make.unstructured(zeros) for zeros in (0.5, 0.7, 0.9))]


def peer_formats(make: Weights) -> list[Packed]:
    """What tinygemm and fp8 take; they work in bfloat16."""
    return [make.quantized(4), make.quantized(4, -1), make.two_of_four()]


def four_bits(make: Weights) -> list[Packed]:
    """The usual format."""
    return [make.quantized(4)]


PLAN: tuple[tuple[Shape, int, torch.dtype, Formats], ...] = (
    *((shape, 1, torch.float16, quantized_formats) for shape in (LARGE, MIDDLE, SMALL)),
    (LARGE, 16, torch.float16, quantized_formats),
    (LARGE, 1, torch.float16, sparse_formats),
    *((LARGE, m, torch.bfloat16, peer_formats) for m in (1, 16)),
    *((LARGE, m, torch.float16, four_bits) for m in (64, 256, 2048)),
    (LARGE, 2048, torch.bfloat16, peer_formats),
    (MIDDLE, 16, torch.float16, quantized_formats),
    (SMALL, 1, torch.float16, sparse_formats),
    (SMALL, 16, torch.float16, sparse_formats),
    *((SMALL, m, torch.float16, four_bits) for m in (64, 512, 4096)),
    *((shape, m, torch.float16, four_bits) for shape in ((8192, 8192), (4096, 14336)) for m in (1, 16)),
)
"""(shape, rows, dtype of the activations, formats), the most wanted first."""


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
        and row.backend.startswith("triton_")
        and row.status == "measured"
        and row.n * row.k >= MANY_WEIGHTS
    ]


def _dense_ms(rows: Sequence[Row], like: Row) -> float:
    return min(row.median_ms for row in rows if row.dense and row.what[1:] == like.what[1:])


def _where(row: Row) -> str:
    return f"{row.n} x {row.k}, {row.m} rows"


# --- measuring ---


def constants_of_device() -> Constants:
    """Measure what everything else is a fraction of."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    A, B = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    one = torch.zeros(1, device="cuda")
    candidates: dict[str, list[Call]] = {
        "copy": [lambda: target.copy_(source)],
        "product": [lambda: A @ B],
        "empty": [one.zero_] * 1000,
    }
    ms = {name: timing.median_ms for name, timing in time_cuda(candidates, SAMPLING).items()}
    return Constants(2 * source.numel() / ms["copy"], 2 * 8192.0**3 / ms["product"], ms["empty"])


def check() -> tuple[list[str], set[tuple[str, str]]]:
    """Errors against float64 as table rows, and the (backend, label) that are wrong."""
    lines, wrong = [], set()
    make = Weights(CHECKED, "cuda")
    every = [*quantized_formats(make), *sparse_formats(make), make.quantized(4, -1)]
    for dtype in (torch.float16, torch.bfloat16):
        for m in (1, 16, 200):
            work = Work(m, dtype, torch.device("cuda"))
            x = torch.randn(m, CHECKED[1], device="cuda", dtype=dtype)
            for label, backend, packed in entrants(Race(tuple(every), work)):
                try:
                    error = relative_error(prepare(backend.name, packed, work)(x), x, packed)
                except FAILURES:
                    error = math.nan
                bound = BOUNDS[backend.exact and dtype == torch.float16]
                if not error <= bound:  # also if it is not a number
                    wrong.add((backend.name, label))
                lines.append(f"| {backend.name} | {label} | {m} | {str(dtype)[6:]} | {error:.1e} |")
    return lines, wrong


def races() -> Iterator[Race]:
    """The plan, with weights made on the GPU one race at a time."""
    for shape, m, dtype, formats in PLAN:
        yield Race(tuple(formats(Weights(shape, "cuda"))), Work(m, dtype, torch.device("cuda")))


def measure(
    planned: Iterator[Race], run: Callable[[Race], list[Row]], clock: Callable[[], float], deadline: float
) -> tuple[list[Row], list[str]]:
    """Run races until the deadline.

    Args:
        planned: made one at a time.
        run: times one.
        clock: seconds.
        deadline: seconds by that clock after which none begins.
    Returns:
        the rows, and what was left out and why.
    """
    rows: dict[tuple[object, ...], Row] = {}
    left_out = []
    for race in planned:
        note = f"{race.note}, {str(race.work.dtype)[6:]}, {', '.join(packed.label for packed in race.weights)}"
        if clock() > deadline:
            left_out.append(f"{note}: no time left")
            continue
        print(f"{clock():.0f} s: {note}", file=sys.stderr, flush=True)
        try:
            for row in run(race):
                rows.setdefault((row.backend, *row.what), row)
        except FAILURES as error:
            left_out.append(f"{note}: {error}")
    return list(rows.values()), left_out


def eager() -> list[str]:
    """A small product launched from Python, beside the same in a graph, as table rows."""
    packed, work = Weights(SMALL, "cuda").quantized(4), Work(1, torch.float16, torch.device("cuda"))
    names = ["cublas", *(name for name in able(packed, work) if name != "cublas")]
    backends = able(packed, work)
    calls = {name: rotation(packed, backends[name], work, SAMPLING) for name in names}
    graph, launched = time_cuda(calls, SAMPLING), time_eager(calls, Sampling(max_spread=1.0))
    return [f"| {name} | {graph[name].median_ms * 1e3:.1f} | {launched[name].median_ms * 1e3:.1f} |" for name in names]


# --- reporting ---


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
) -> str:
    """The page."""
    target_lines = [line for target in TARGETS for line in target.lines(rows, constants)]
    return "\n".join(
        [
            f"# Kernels on {here.name}",
            "",
            *header("kernels.py", ["layerwise", "torch", "triton"], here.name),
            f"- {here}",
            f"- CUDA graphs over rotated weights, median of {SAMPLING.samples} replays in turns; {seconds:.0f} s",
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


def on_gpu(folder: Path) -> None:
    """Measure and write the page."""
    here, started = this_device("cuda"), time.perf_counter()
    constants = constants_of_device()
    errors, wrong = check()

    def run(race: Race) -> list[Row]:
        right = [packed for packed in race.weights if packed.label not in {label for _, label in wrong}]
        if not right:
            raise UsageError("all of its kernels gave wrong results")
        return run_race(Race(tuple(right), race.work), SAMPLING)

    def clock() -> float:
        return time.perf_counter() - started

    rows, left_out = measure(races(), run, clock, DEADLINE)
    left_out += [f"{label} by {backend}: wrong result" for backend, label in sorted(wrong)]
    launches: list[str] = []
    try:
        launches = eager()
    except FAILURES as error:
        left_out.append(f"launches from Python: {error}")
    page = report(here, constants, rows, errors=errors, left_out=left_out, launches=launches, seconds=clock())
    name = here.name.lower().replace(" ", "-")
    (folder / f"kernels-{name}.md").write_text(page, encoding="utf-8")
