"""Races between backends: every product of a shape, ours, a library's and the dense one, timed side by side.

One race is one shape (n, k) with one number of rows, and everything that could run in it takes turns, so the ratios in
a table come from the same minutes. The dense weight's time does not depend on its values, so one entry of each dense
product stands for all formats of the shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels.backends import Backend, Matmul, Work, able, dense_backends, prepare
from layerwise.kernels.dense import Dense
from layerwise.kernels.device import Device
from layerwise.kernels.labels import DENSE
from layerwise.kernels.latency_table import LatencyTable, Row
from layerwise.kernels.packed import Packed, rebuild
from layerwise.kernels.timing import Call, Sampling, Timing, copies_needed, time_cpu, time_cuda

Admit = Callable[[str, Backend], bool]
"""Whether a backend takes part with a label."""

Lost = Callable[[str, Exception], None]
"""Told of an entry of a race (`label by backend`) that failed, and why."""

Timer = Callable[[Mapping[str, Sequence[Call]], Sampling], dict[str, Timing]]
"""Times calls side by side: `time_cpu`, `time_cuda`."""


@dataclass(frozen=True)
class Race:
    """Weights of one shape, each label once, at one number of rows."""

    weights: tuple[Packed, ...]
    work: Work

    @property
    def note(self) -> str:
        """What is raced, for a progress display."""
        n, k = self.weights[0].shape
        return f"{n} x {k}, {self.work.m} rows"


def races(weights: Sequence[Packed], ms: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Race]:
    """Group weights by shape, and take of each label the first.

    Args:
        weights: of any shapes and formats.
        ms: numbers of rows of the activations.
        dtype: of the activations.
        device: where.
    Raises:
        UsageError: nothing to measure.
    """
    if not weights or not ms or min(ms) < 1:
        raise UsageError("nothing to measure", hint="name at least one weight, and numbers of rows from 1 up")
    shapes: dict[tuple[int, int], dict[str, Packed]] = {}
    for weight in weights:
        shapes.setdefault(weight.shape, {}).setdefault(weight.label, weight)
    return [
        Race(tuple(labels.values()), Work(m, dtype, device)) for labels in shapes.values() for m in dict.fromkeys(ms)
    ]


def table_of(here: Device, rows: Sequence[Row], sampling: Sampling) -> LatencyTable:
    """A table of rows that were measured here, and of how."""
    clock = "process CPU time, one thread" if here.kind == "cpu" else "CUDA graphs"
    return LatencyTable(here, tuple(rows), {"clock": clock, **asdict(sampling)})


def run_race(
    race: Race,
    sampling: Sampling,
    timer: Timer | None = None,
    *,
    admit: Admit | None = None,
    lost: Lost | None = None,
) -> list[Row]:
    """Time all that can run in a race; a label that nothing takes gets the best dense time as `no_kernel`.

    Args:
        race: on one device.
        sampling: how much.
        timer: as in `run_together`. If it leaves an entry out, there is no row of it.
        admit: which backends take part; all if left out.
        lost: told of a backend that cannot be prepared, which is then left out; if there is no `lost`, its error is
            raised.
    """
    (rows,) = run_together([race], sampling, timer, admit=admit, lost=lost)
    return rows


def run_together(
    races: Sequence[Race],
    sampling: Sampling,
    timer: Timer | None = None,
    *,
    admit: Admit | None = None,
    lost: Lost | None = None,
) -> list[list[Row]]:
    """Time several races as one, so that products of different shapes can be compared: all their candidates take turns.

    Args:
        races: on one device.
        sampling: how much.
        timer: that of the device if left out.
        admit: as in `run_race`.
        lost: as in `run_race`.
    Returns:
        the rows of each race.
    """
    timer = timer or (time_cpu if races[0].work.device.type == "cpu" else time_cuda)
    entries: list[dict[str, tuple[str, Backend, Packed]]] = []
    for race in races:
        where = "" if len(races) == 1 else f" in {race.note}"
        found = ((f"{label}{where} by {backend.name}", (label, backend, w)) for label, backend, w in entrants(race))
        entries.append(dict(found))
    calls: dict[str, list[Call]] = {}
    for race, entry in zip(races, entries, strict=True):
        for name, (label, backend, packed) in entry.items():
            if admit is None or admit(label, backend):
                try:
                    calls[name] = rotation(packed, backend, race.work, sampling)
                except Exception as error:
                    if lost is None:
                        raise
                    lost(name, error)
    timings = timer(calls, sampling)
    answers = []
    for race, entry in zip(races, entries, strict=True):
        timed = {name: what for name, what in entry.items() if name in timings}
        rows = [_row(timings[name], label, backend, w, race.work) for name, (label, backend, w) in timed.items()]
        answers.append([*rows, *_without_kernel(race, rows, {label for label, _, _ in entry.values()})])
    return answers


def entrants(race: Race) -> Iterator[tuple[str, Backend, Packed]]:
    """(label, backend, weight) of all that take part: the dense products, then what takes a label as it is packed."""
    first, work = race.weights[0], race.work
    always = dense_backends(work.device.type)
    dense = Dense(first.shape, first.dense().to(device=work.device, dtype=work.dtype))
    for backend in able(dense, work).values():
        yield DENSE, backend, dense
    for packed in race.weights:
        if packed.label != DENSE:
            moved = packed.to(work.device)
            for name, backend in able(moved, work).items():
                if name not in always:
                    yield packed.label, backend, moved


def rotation(packed: Packed, backend: Backend, work: Work, sampling: Sampling) -> list[Call]:
    """One call per copy of a weight, each with activations of its own."""
    n_copies = copies_needed(backend.bytes_read(packed), sampling, work.device.type)
    generator = torch.Generator().manual_seed(0)
    calls = []
    for _ in range(n_copies):
        x = torch.randn(work.m, packed.shape[1], generator=generator).to(device=work.device, dtype=work.dtype)
        calls.append(_call(prepare(backend.name, _copy(packed), work), x))
    return calls


def _call(matmul: Matmul, x: Tensor) -> Call:
    return lambda: matmul(x)


def _copy(packed: Packed) -> Packed:
    """The same weight in other memory."""
    return rebuild(packed.settings, {name: tensor.clone() for name, tensor in packed.tensors.items()})


def _row(timing: Timing, label: str, backend: Backend, packed: Packed, work: Work) -> Row:
    return Row.of(
        timing,
        **_product(label, packed.shape, work),
        backend=backend.name,
        size_bytes=backend.bytes_read(packed),
        exact=backend.exact,
        dense=label == DENSE,
    )


def _product(label: str, shape: tuple[int, int], work: Work) -> dict[str, Any]:
    dtype = str(work.dtype).removeprefix("torch.")
    return {"label": label, "n": shape[0], "k": shape[1], "m": work.m, "dtype": dtype}


def _without_kernel(race: Race, rows: Sequence[Row], taken: set[str]) -> Iterator[Row]:
    """Rows of the labels that no backend takes, whether or not one that takes them was measured."""
    dense = [row for row in rows if row.label == DENSE]
    if not dense:
        return
    best = min(dense, key=lambda row: (row.median_ms, row.backend))
    for packed in race.weights:
        if packed.label not in taken:
            yield replace(best, label=packed.label, status="no_kernel")
