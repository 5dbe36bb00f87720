"""Which backend runs a weight: the one that was measured to be fastest, and never one slower than the dense product.

The decision is a function of the table alone. Nothing is timed when a model runs, so the same table gives the same
kernels, and the same bits, in every process. Every race has the dense products in it; a backend whose interval of times
overlaps that of the fastest is a tie, and a tie goes to the dense product, then to an exact backend, because nothing is
won by rounding. A format that no backend takes is `no_kernel`: it runs as its dense weight, and its time is that.

Measuring stands in `measure.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from layerwise.errors import UsageError
from layerwise.kernels.backends import BACKENDS, Matmul, Work, prepare
from layerwise.kernels.device import Device, require_same
from layerwise.kernels.labels import DENSE
from layerwise.kernels.latency_fit import Affine, fit_rows, interpolate_rows
from layerwise.kernels.latency_table import LatencyTable, Row
from layerwise.kernels.packed import Packed


@dataclass(frozen=True)
class Choice:
    """What runs a product, and what it takes.

    Args:
        row: of the backend; `status` says whether it was measured, fitted, or is the dense one of a format without
            a kernel.
        dense: the best dense product of the shape.
    """

    row: Row
    dense: Row

    @property
    def backend(self) -> str:
        """Its name in `BACKENDS`."""
        return self.row.backend

    @property
    def ratio(self) -> float:
        """Time of the best dense product over this one's: how many times faster it is."""
        return self.dense.median_ms / self.row.median_ms


class Dispatcher:
    """Chooses backends by a table of times.

    Args:
        table: measured on this device.
        here: the device at hand; None if the table is only asked for times, and nothing runs by it.
        exact: let only backends race that round nothing but their result.
    Raises:
        DeviceChanged: the table comes from another device.
    """

    def __init__(self, table: LatencyTable, here: Device | None = None, *, exact: bool = False) -> None:
        if here is not None:
            require_same(table.device, here, "the table of times")
        self.table, self.exact = table, exact
        self._rows: dict[tuple[str, str, int, int, str], dict[int, Row]] = {}
        for row in table.rows:
            self._rows.setdefault((row.backend, row.label, row.n, row.k, row.dtype), {})[row.m] = row
        self._lines = fit_rows(table.rows)
        self._without = {row.label for row in table.rows if row.status == "no_kernel"}
        self._dense_ms: dict[tuple[int, int, str], set[int]] = {}
        for row in table.rows:
            if row.label == DENSE:
                self._dense_ms.setdefault((row.n, row.k, row.dtype), set()).add(row.m)
        self._chosen: dict[tuple[str, int, int, int, str], Choice] = {}

    def __call__(self, packed: Packed, work: Work) -> str:
        """The name of the backend that is to run a weight.

        Unlike `choose` it has an answer for any number of rows. Where the table says nothing of the format's kernels,
        beyond the numbers of rows that were measured or across a boundary, only dense products are considered, those of
        the nearest number of rows: how a kernel fares there is not known, and the dense product is what it must beat.

        Raises:
            UsageError: the format, or the shape, was never measured.
        """
        label, dtype, (n, k) = packed.label, _dtype(work), packed.shape
        known = self._dense_ms.get((n, k, dtype))
        if known is None or work.m in known:
            return self.choose(label, n, k, work.m, dtype).backend
        m = min(max(work.m, min(known)), max(known))
        if label not in {key[1] for key in self._rows}:
            raise _unknown(label, n, k, work.m, dtype)
        if m != work.m or not self._candidates(label, n, k, m, dtype):
            label = DENSE
        return self.choose(label, n, k, m, dtype).backend

    def prepare(self, packed: Packed, work: Work) -> Matmul:
        """The function of the activations that runs a weight."""
        return prepare(self(packed, work), packed, work)

    def choose(self, label: str, n: int, k: int, m: int, dtype: str) -> Choice:
        """What runs a product.

        Args:
            label: of the format.
            n: rows of the weight.
            k: columns of the weight.
            m: rows of the activations.
            dtype: of the activations: `float32`, ...
        Raises:
            UsageError: it was not measured, and nothing that was measured says how long it takes.
        """
        what = (label, n, k, m, dtype)
        if what not in self._chosen:
            self._chosen[what] = self._choose(*what)
        return self._chosen[what]

    def lines(self) -> dict[tuple[str, str, int, str], Affine]:
        """t0 + bytes / bandwidth for each (backend, label, m, dtype) measured at two sizes or more."""
        return dict(self._lines)

    def _choose(self, label: str, n: int, k: int, m: int, dtype: str) -> Choice:
        dense = self._candidates(DENSE, n, k, m, dtype)
        if not dense:
            raise _unknown(DENSE, n, k, m, dtype)
        best_dense = min(dense, key=lambda row: (row.median_ms, row.backend))
        own = [] if label == DENSE else self._candidates(label, n, k, m, dtype)
        if label != DENSE and not own:
            if label not in self._without:
                raise _unknown(label, n, k, m, dtype)
            return Choice(replace(best_dense, label=label, status="no_kernel"), best_dense)
        racing = [*dense, *(row for row in own if row.exact or not self.exact)]
        fastest = min(racing, key=lambda row: (row.median_ms, row.backend))
        tied = [row for row in racing if overlap(row, fastest)]
        chosen = min(tied, key=lambda row: (not row.dense, not row.exact, row.median_ms, row.backend))
        return Choice(replace(chosen, label=label), best_dense)

    def _candidates(self, label: str, n: int, k: int, m: int, dtype: str) -> list[Row]:
        """One row per backend that takes it, measured or else fitted; none of a format without a kernel."""
        backends = sorted({key[0] for key in self._rows if key[1] == label})
        rows = [self._row(backend, label, n, k, m, dtype) for backend in backends]
        return [row for row in rows if row is not None and row.status != "no_kernel"]

    def _row(self, backend: str, label: str, n: int, k: int, m: int, dtype: str) -> Row | None:
        measured = self._rows.get((backend, label, n, k, dtype), {})
        if m in measured:
            return measured[m]
        if not measured:
            return self._row_of_another_shape(backend, label, n, k, m, dtype)
        known = BACKENDS.get(backend)  # the table's may be of another version
        boundaries = () if known is None else known.boundaries
        ms = interpolate_rows({rows: row.median_ms for rows, row in measured.items()}, m, boundaries)
        like = measured[min(measured, key=lambda rows: abs(math.log(rows / m)))]
        return None if ms is None else _fitted(like, n, k, m, ms, like.mad_ms, like.size_bytes)

    def _row_of_another_shape(self, backend: str, label: str, n: int, k: int, m: int, dtype: str) -> Row | None:
        line = self._lines.get((backend, label, m, dtype))
        if line is None:
            return None
        keys = [key for key in self._rows if (key[0], key[1], key[4]) == (backend, label, dtype)]
        measured = [self._rows[key][m] for key in keys if m in self._rows[key]]
        nearest = min(measured, key=lambda row: abs(math.log(row.n * row.k / (n * k))))
        size = round(nearest.size_bytes / (nearest.n * nearest.k) * n * k)
        ms = line.milliseconds(size)
        return _fitted(nearest, n, k, m, ms, 0.0 if math.isnan(line.error) else line.error * ms, size)


def _unknown(label: str, n: int, k: int, m: int, dtype: str) -> UsageError:
    return UsageError(
        f"no time is known of {label} {n} x {k} at {m} rows in {dtype}",
        hint="measure this format and shape with `layerwise bench`, or in the latency stage",
    )


def _fitted(like: Row, n: int, k: int, m: int, ms: float, mad_ms: float, size_bytes: int) -> Row:
    """A row that was not measured."""
    return replace(
        like,
        n=n,
        k=k,
        m=m,
        median_ms=ms,
        p10_ms=ms,
        p90_ms=ms,
        min_ms=ms,
        mad_ms=mad_ms,
        samples=0,
        quality=None,
        status="fitted",
        size_bytes=size_bytes,
    )


def overlap(first: Row, second: Row) -> bool:
    """Whether two times cannot be told apart: they differ by less than 2 · sqrt(MAD₁² + MAD₂²)."""
    distance = abs(first.median_ms - second.median_ms)
    return distance == 0 or distance < 2 * math.hypot(first.mad_ms, second.mad_ms)


def _dtype(work: Work) -> str:
    return str(work.dtype).removeprefix("torch.")
