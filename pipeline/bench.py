"""`layerwise bench` as a library: times every kernel on given shapes, beside the dense product, on the device at hand.

The weights are random: a kernel's time depends on shapes and format, not on values. What has been measured is kept
while it goes on, so whoever interrupts a benchmark still has the part that is done.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import NoisyMeasurement, UsageError
from layerwise.results.destination import check_destination, writing

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from layerwise.kernels.device import Device
    from layerwise.kernels.latency_table import LatencyTable, Row
    from layerwise.kernels.measure import Timer
    from layerwise.kernels.packed import Packed
    from layerwise.kernels.timing import Sampling

SHAPES = ((4096, 4096), (11008, 4096))
"""Weights of a 7 B model: (out, in) of its attention and of the upper half of its feed-forward layer."""

ROWS = (1, 16)
BITS = (2, 3, 4, 8)
GROUP_SIZES = (128, -1)
DTYPES = {"cpu": "float32", "cuda": "float16"}
"""Of the activations, by device."""

KNOWN_DTYPES = ("float32", "float16", "bfloat16")
COLUMNS = (
    *("kernel", "level", "bits", "group_size", "m", "n", "k", "milliseconds", "dense_milliseconds", "ratio", "spread"),
    *("chosen", "status", "dtype", "device"),
)
"""Of the table. `ratio` is the time of the best dense product over this one's; `chosen` says what runs the level."""


@dataclass
class Bench:
    """What is measured, and what has been so far.

    Args:
        shapes: (out, in) of the weights.
        rows: numbers of rows of the activations.
        bits: widths of the codes: 2, 3, 4 or 8.
        group_sizes: columns that share a scale, -1 for the whole row.
        device: `cpu` or `cuda`.
        dtype: of the activations; float32 on a processor and float16 on a GPU if left out.
        sampling: how much is measured.
        timer: that of the device if left out.
    Raises:
        UsageError: no such device here, no Triton for it, or shapes and widths that nothing takes.
    """

    shapes: Sequence[tuple[int, int]] = SHAPES
    rows: Sequence[int] = ROWS
    bits: Sequence[int] = BITS
    group_sizes: Sequence[int] = GROUP_SIZES
    device: str = "cpu"
    dtype: str | None = None
    sampling: Sampling | None = None
    timer: Timer | None = None
    measured: list[Row] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """The races whose times were too noisy, in words."""

    def __post_init__(self) -> None:
        from layerwise.kernels.device import this_device
        from layerwise.kernels.timing import Sampling

        self.here: Device = this_device(self.device)
        if self.device == "cuda" and importlib.util.find_spec("triton") is None:
            raise UsageError("device cuda: Triton is not installed", hint="pip install triton, or use the device cpu")
        self.dtype = self.dtype or DTYPES[self.device]
        if self.dtype not in KNOWN_DTYPES:
            raise UsageError(f"unknown dtype '{self.dtype}' (known: {', '.join(KNOWN_DTYPES)})")
        for wrong in [bits for bits in self.bits if bits not in BITS]:
            raise UsageError(f"no kernel takes weights of {wrong} bits (known: {', '.join(map(str, BITS))})")
        for wrong in [rows for rows in self.rows if rows < 1]:
            raise UsageError(f"{wrong} rows of activations: there must be at least 1")
        for n, k in [shape for shape in self.shapes if min(shape) < 1]:
            raise UsageError(f"no weight has the shape {n}x{k}", hint="both of its sizes must be at least 1")
        for wrong in [size for size in self.group_sizes if size != -1 and size < 1]:
            raise UsageError(f"no group has {wrong} columns", hint="give a number from 1 up, or -1 for the whole row")
        self.sampling = self.sampling or Sampling()

    def notes(self) -> list[str]:
        """What was asked for and has no line of its own: groups as wide as the weight are the whole row."""
        return [
            f"group size {size} is no less than the {k} columns of {n}x{k}: measured as the whole row (-1)"
            for n, k in dict.fromkeys(self.shapes)
            for size in dict.fromkeys(self.group_sizes)
            if self.bits and size >= k
        ]

    def run(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Measure, shape by shape; what is done stands in `measured` at any time.

        Raises:
            NoisyMeasurement: at the end, if some races were too noisy; names them. The others are there.
        """
        from layerwise.kernels.measure import run_race

        assert self.sampling is not None
        total = len(self.shapes) * len(self.rows)
        for done, race in enumerate(self._races()):
            if progress is not None:
                progress(done, total, race.note)
            try:
                self.measured += run_race(race, self.sampling, self.timer)
            except NoisyMeasurement as error:
                self.refused.append(f"{race.note}: {error.message}")
        if progress is not None:
            progress(total, total, "measured")
        if self.refused:
            raise NoisyMeasurement(
                "\n".join(self.refused),
                hint="measure again on a quieter machine, pin the process to one core, or raise the spread allowed",
            )

    @property
    def table(self) -> LatencyTable:
        """What has been measured, with the device."""
        from layerwise.kernels.measure import table_of

        assert self.sampling is not None
        return table_of(self.here, self.measured, self.sampling)

    def save(self, path: Path) -> None:
        """Write the table of times for a `Dispatcher`, as JSON.

        Raises:
            UsageError: the file cannot be written.
        """
        with writing(path):
            self.table.save(path)

    def frame(self) -> pd.DataFrame:
        """The table to print: one line per kernel, level, shape and number of rows, the dense products first."""
        import pandas as pd

        frame = pd.DataFrame(list(self._lines()), columns=list(COLUMNS))
        return frame.astype({"bits": "Int64", "group_size": "Int64"})  # whole numbers, though the dense rows have none

    def _races(self) -> Iterator[Any]:
        """Shape by shape, so that only one shape's weights are in memory."""
        import torch

        from layerwise.kernels.measure import races

        dtype = getattr(torch, str(self.dtype))
        for shape in dict.fromkeys(self.shapes):
            weights = random_weights(shape, self.bits, self.group_sizes)
            yield from races(weights, self.rows, dtype, torch.device(self.device))

    def _lines(self) -> Iterator[dict[str, Any]]:
        from layerwise.kernels.dispatch import Dispatcher

        dispatcher = Dispatcher(self.table)
        for row in self.measured:
            choice = dispatcher.choose(*row.what)
            bits, group_size = _settings(row.label)
            yield {
                "kernel": row.backend,
                "level": row.label,
                "bits": bits,
                "group_size": group_size,
                "m": row.m,
                "n": row.n,
                "k": row.k,
                "milliseconds": row.median_ms,
                "dense_milliseconds": choice.dense.median_ms,
                "ratio": choice.dense.median_ms / row.median_ms,
                "spread": row.spread,
                "chosen": choice.backend == row.backend,
                "status": row.status,
                "dtype": row.dtype,
                "device": self.here.name,
            }


def check_output(path: Path) -> None:
    """Refuse a file for the table of times that cannot be written, or whose name promises something else than JSON.

    Raises:
        UsageError: says why.
    """
    if path.suffix.lower() == ".csv":
        raise UsageError(f"--output {path}: the table of times is saved as JSON", hint=f"--format csv > {path}")
    check_destination(path)


def random_weights(shape: tuple[int, int], bits: Sequence[int], group_sizes: Sequence[int]) -> list[Packed]:
    """Symmetric weights of a shape with random codes, one for each width and group size.

    A group size beyond the width of the weight is the whole row; with no bits there is the dense weight alone.
    """
    import torch

    from layerwise.kernels.dense import Dense

    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Packed] = {}
    for width in dict.fromkeys(bits):
        for size in dict.fromkeys(-1 if size >= shape[1] else size for size in group_sizes):
            packed = random_quantized(shape, width, size, generator)
            weights.setdefault(packed.label, packed)
    return list(weights.values()) or [Dense(shape, torch.randn(shape, generator=generator))]


def random_quantized(shape: tuple[int, int], bits: int, group_size: int, generator: torch.Generator) -> Packed:
    """One such weight, scaled so that activations of variance 1 give results of about 1."""
    import torch

    from layerwise.kernels.quantized import Quantized

    n, k = shape
    groups = 1 if group_size == -1 else -(-k // group_size)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = (0.5 + torch.rand((n, groups), generator=generator)) * (12 / k) ** 0.5 / 2**bits
    return Quantized.pack(codes, scale.half(), bits=bits, group_size=group_size)


def read_shapes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """`4096x4096,11008x4096` and the like, out before in.

    Raises:
        UsageError: something else.
    """
    shapes = []
    for text in _parts(texts):
        match = re.fullmatch(r"(\d+)\s*[x×]\s*(\d+)", text)
        if match is None:
            raise UsageError(f"'{text}' is no shape", hint="write rows and columns as 4096x11008")
        shapes.append((int(match[1]), int(match[2])))
    return shapes


def read_numbers(texts: Sequence[str], what: str) -> list[int]:
    """`1,16` and the like.

    Raises:
        UsageError: something else; `what` says of what.
    """
    numbers = []
    for text in _parts(texts):
        if re.fullmatch(r"-?\d+", text) is None:
            raise UsageError(f"'{text}' is no whole number ({what})")
        numbers.append(int(text))
    return numbers


def _parts(texts: Sequence[str]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def _settings(label: str) -> tuple[int | None, int | None]:
    """Bits and group size of a label such as `int4-g128-sym`."""
    match = re.match(r"int(\d+)-(?:g(\d+)|channel)", label)
    return (None, None) if match is None else (int(match[1]), int(match[2]) if match[2] else -1)
