"""The protocol on a GPU, in one command and under ten minutes: constants, correctness, races, roofline, targets.

    python benchmarks/kernels.py --device cuda

1. Constants of the device: bandwidth of a copy, a bfloat16 product of 8192 cubed, the gap between empty kernels in a
   graph. They are the ceiling that everything else is a fraction of.
2. Correctness: every kernel on every format against float64, at a small shape. What is wrong is not timed.
3. Races: for each shape and number of rows all formats and peers as CUDA graphs over rotated weights, in turns. They
   run in the order of their worth, and none begins after the deadline; what was left out is said.
4. Launches from Python beside graphs, for one small shape.

Device time is dear, so nothing that fails takes anything else with it: a backend that is wrong, is not compiled or runs
out of memory is left out of its races with the reason, and the page (`kernels_gpu_page.py`) is written anew after every
step.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from kernel_weights import Shape, Weights, relative_error
from kernels_gpu_page import UNKNOWN, Constants, report

from layerwise.kernels.backends import Backend, Work, able, prepare
from layerwise.kernels.device import Device, this_device
from layerwise.kernels.latency_table import Row
from layerwise.kernels.measure import Lost, Race, entrants, rotation, run_race
from layerwise.kernels.packed import Packed
from layerwise.kernels.timing import Call, Sampling, time_cuda, time_eager

SAMPLING = Sampling(samples=30, retries=3)
LARGE: Shape = (28672, 4096)
MIDDLE: Shape = (14336, 4096)
SMALL: Shape = (4096, 4096)
CHECKED: Shape = (512, 1024)
BOUNDS = {True: 2e-3, False: 5e-2}
"""Relative error allowed to kernels that round only their result to 16 bits, and to those that round more."""

Formats = Callable[[Weights], list[Packed]]


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


def check(lost: Lost) -> tuple[list[str], set[tuple[str, str]]]:
    """Errors against float64 as table rows, and the (backend, label) that are wrong.

    Args:
        lost: told of formats that cannot be made and of backends that fail.
    """
    lines, wrong = [], set()
    every: dict[str, Packed] = {}
    for formats in (quantized_formats, sparse_formats, peer_formats):
        try:
            every |= {packed.label: packed for packed in formats(Weights(CHECKED, "cuda"))}
        except Exception as error:
            lost(f"check of {_words(formats)}", error)
    for dtype in (torch.float16, torch.bfloat16):
        for m in (1, 16, 200):
            work = Work(m, dtype, torch.device("cuda"))
            try:
                entries = list(entrants(Race(tuple(every.values()), work)))
            except Exception as error:
                lost(f"checks at {m} rows, {str(dtype)[6:]}", error)
                continue
            for label, backend, packed in entries:
                error = _error(backend, packed, work, lost)
                if not error <= BOUNDS[backend.exact and dtype == torch.float16]:  # also if it is not a number
                    wrong.add((backend.name, label))
                lines.append(f"| {backend.name} | {label} | {m} | {str(dtype)[6:]} | {error:.1e} |")
    return lines, wrong


def _error(backend: Backend, packed: Packed, work: Work, lost: Lost) -> float:
    """Relative error of a backend, NaN if it fails."""
    x = torch.randn(work.m, packed.shape[1], device="cuda", dtype=work.dtype)
    try:
        return relative_error(prepare(backend.name, packed, work)(x), x, packed)
    except Exception as error:
        lost(f"check of {packed.label} by {backend.name}, {work.m} rows, {str(work.dtype)[6:]}", error)
        return math.nan


@dataclass(frozen=True)
class Planned:
    """A race whose weights are not made yet.

    Args:
        note: what it is.
        make: its weights on the GPU, and the race.
    """

    note: str
    make: Callable[[], Race]


def races() -> Iterator[Planned]:
    """The plan."""
    for shape, m, dtype, formats in PLAN:
        work = Work(m, dtype, torch.device("cuda"))
        note = f"{shape[0]} x {shape[1]}, {m} rows, {str(dtype)[6:]}, {_words(formats)}"
        yield Planned(note, lambda: Race(tuple(formats(Weights(shape, "cuda"))), work))  # noqa: B023, made at once


def _words(formats: Formats) -> str:
    return getattr(formats, "__name__", "formats").replace("_", " ")


@dataclass
class Findings:
    """What is known so far, and the page of it.

    Args:
        here: the device.
        path: of the page.
        clock: seconds since the start.
    """

    here: Device
    path: Path
    clock: Callable[[], float]
    constants: Constants = UNKNOWN
    rows: dict[tuple[object, ...], Row] = field(default_factory=dict)
    errors: Sequence[str] = ()
    launches: Sequence[str] = ()
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, what: str, error: Exception | str) -> None:
        """Say on the page, in a line, and on stderr, in full, why something is not measured."""
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        print(f"{self.clock():.0f} s: {what}: {reason}", file=sys.stderr, flush=True)
        self.left_out.append(f"{what}: {reason.strip().splitlines()[0][:300]}")

    def write(self) -> None:
        """Write the page anew."""
        page = report(
            self.here,
            self.constants,
            list(self.rows.values()),
            errors=self.errors,
            left_out=self.left_out,
            launches=self.launches,
            seconds=self.clock(),
            samples=SAMPLING.samples,
        )
        self.path.write_text(page, encoding="utf-8")


def measure(
    findings: Findings, planned: Iterable[Planned], run: Callable[[Race, Lost], list[Row]], deadline: float
) -> None:
    """Run races until the deadline, and write the page after each.

    Args:
        findings: to which rows are added, and what was left out and why.
        planned: made one at a time, and not at all after the deadline.
        run: times one race; told what to call for a backend that fails.
        deadline: seconds by the findings' clock after which none begins.
    """
    for plan in planned:
        if findings.clock() > deadline:
            findings.leave_out(plan.note, "no time left")
            continue
        print(f"{findings.clock():.0f} s: {plan.note}", file=sys.stderr, flush=True)

        def lost(name: str, error: Exception, note: str = plan.note) -> None:
            findings.leave_out(f"{note}: {name}", error)

        try:
            for row in run(plan.make(), lost):
                findings.rows.setdefault((row.backend, *row.what), row)
        except Exception as error:
            findings.leave_out(plan.note, error)
        findings.write()
    findings.write()


def eager(lost: Lost) -> list[str]:
    """A small product launched from Python, beside the same in a graph, as table rows."""
    packed, work = Weights(SMALL, "cuda").quantized(4), Work(1, torch.float16, torch.device("cuda"))
    calls: dict[str, list[Call]] = {}
    for name, backend in able(packed, work).items():
        try:
            calls[name] = rotation(packed, backend, work, SAMPLING)
        except Exception as error:
            lost(name, error)
    graph = time_cuda(calls, SAMPLING, lost=lost)
    launched = time_eager({name: calls[name] for name in graph}, Sampling(max_spread=1.0))
    return [f"| {name} | {graph[name].median_ms * 1e3:.1f} | {launched[name].median_ms * 1e3:.1f} |" for name in graph]


def on_gpu(folder: Path, deadline: float = 480.0) -> None:
    """Measure and write the page; no race begins after `deadline` seconds; the longest takes well under a minute."""
    here, started = this_device("cuda"), time.perf_counter()
    path = folder / f"kernels-{here.name.lower().replace(' ', '-')}.md"
    findings = Findings(here, path, lambda: time.perf_counter() - started)
    try:
        findings.constants = constants_of_device()
    except Exception as error:
        findings.leave_out("constants of the device", error)
    wrong: set[tuple[str, str]] = set()
    try:
        findings.errors, wrong = check(findings.leave_out)
    except Exception as error:
        findings.leave_out("checks against float64", error)
    findings.left_out += [f"{label} by {backend}: wrong result, not raced" for backend, label in sorted(wrong)]
    findings.write()

    def run(race: Race, lost: Lost) -> list[Row]:
        return run_race(
            race,
            SAMPLING,
            lambda calls, sampling: time_cuda(calls, sampling, lost=lost),
            admit=lambda label, backend: (backend.name, label) not in wrong,
            lost=lost,
        )

    measure(findings, races(), run, deadline)
    try:
        findings.launches = eager(findings.leave_out)
    except Exception as error:
        findings.leave_out("launches from Python", error)
    findings.write()
