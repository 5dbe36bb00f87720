"""The table of measured times: one row per backend, format, shape and number of tokens, with the device it is true for.

A row says how it came about. `measured` is a median of samples; `fitted` was read off a line through measured rows;
`no_kernel` is a format that no backend of the device takes, which runs as its dense weight and costs what that costs,
never a guess scaled by bytes.

A table belongs to one device. Loading it elsewhere is an error that names what differs (`device.py`). Left out: which
row a weight will run by (`dispatch.py`) and how fitted rows are read off (`latency_fit.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from layerwise.errors import CorruptArtifact, LayerwiseError, UsageError
from layerwise.kernels.device import Device, require_same
from layerwise.kernels.timing import Timing

VERSION = 1
"""Of the file's layout."""

Status = Literal["measured", "fitted", "no_kernel"]


@dataclass(frozen=True)
class Row:
    """What one backend takes for one product.

    Args:
        backend: its name in `BACKENDS`; of a `no_kernel` row the dense one that runs instead.
        label: of the format, as in `Packed.label`.
        n: rows of the weight: out.
        k: columns of the weight: in.
        m: rows of the activations.
        dtype: of the activations: `float32`, ...
        median_ms: milliseconds per product.
        p10_ms: the tenth percentile of the samples.
        p90_ms: the ninetieth.
        mad_ms: median distance from the median; of a `fitted` row the error of the fit.
        min_ms: the least.
        samples: how many; 0 of a `fitted` row.
        quality: CPU time over wall time; None on a GPU.
        status: how the time came about.
        size_bytes: of the weight as it is read, packed or dense.
        exact: the backend rounds nothing but the result.
        dense: the product of the dense weight, which every format can run as.
    """

    backend: str
    label: str
    n: int
    k: int
    m: int
    dtype: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    mad_ms: float
    min_ms: float
    samples: int
    quality: float | None
    status: Status
    size_bytes: int
    exact: bool
    dense: bool

    @classmethod
    def of(cls, timing: Timing, **rest: Any) -> Row:
        """A measured row."""
        return cls(**{**asdict(timing), "status": "measured", **rest})

    @property
    def spread(self) -> float:
        """(median - minimum) / minimum."""
        return self.median_ms / self.min_ms - 1

    @property
    def what(self) -> tuple[str, int, int, int, str]:
        """The product: label, n, k, m, dtype."""
        return self.label, self.n, self.k, self.m, self.dtype


@dataclass(frozen=True)
class LatencyTable:
    """Rows measured on one device.

    Args:
        device: where.
        rows: at most one per backend and product.
        protocol: how it was measured: JSON values, for the reader.
    """

    device: Device
    rows: tuple[Row, ...]
    protocol: Mapping[str, Any]

    def __post_init__(self) -> None:
        seen: set[tuple[object, ...]] = set()
        for row in self.rows:
            key = (row.backend, *row.what)
            if key in seen:
                raise UsageError(f"the table of times has two rows of {row.backend} for {row.what}")
            seen.add(key)

    def of(self, label: str, n: int, k: int, m: int, dtype: str) -> list[Row]:
        """The rows of one product, the fastest first."""
        found = [row for row in self.rows if row.what == (label, n, k, m, dtype)]
        return sorted(found, key=lambda row: (row.median_ms, row.backend))

    def save(self, path: Path) -> None:
        """Write it as JSON, one row a line."""
        head = {"version": VERSION, "device": self.device.as_json(), "protocol": dict(self.protocol)}
        rows = ",\n    ".join(json.dumps(asdict(row)) for row in self.rows)
        path.write_text(f'{json.dumps(head, indent=2)[:-2]},\n  "rows": [\n    {rows}\n  ]\n}}\n', encoding="utf-8")

    @classmethod
    def load(cls, path: Path, here: Device | None = None) -> LatencyTable:
        """Read a table.

        Args:
            path: as written by `save`.
            here: what it would be used on; None to read it for its own sake.
        Raises:
            UsageError: there is no such file.
            CorruptArtifact: it is not a table of times, or of another layout.
            DeviceChanged: it was measured on another device.
        """
        try:
            table = cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise UsageError(f"no table of times at {path}", hint="measure one with `layerwise bench`") from error
        except (ValueError, KeyError, TypeError, AttributeError, LayerwiseError) as error:
            message = f"{path} is no table of times: {getattr(error, 'message', error)}"
            raise CorruptArtifact(message, hint="measure the times again") from error
        if here is not None:
            require_same(table.device, here, f"table {path}")
        return table

    def as_json(self) -> dict[str, Any]:
        """JSON values; `from_json` takes them back."""
        rows = [asdict(row) for row in self.rows]
        return {"version": VERSION, "device": self.device.as_json(), "protocol": dict(self.protocol), "rows": rows}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LatencyTable:
        """Undo `as_json`.

        Raises:
            UsageError: another layout, or columns that are missing or unknown.
        """
        if values.get("version") != VERSION:
            raise UsageError(f"layout {values.get('version')!r} where {VERSION} was expected")
        known = {field.name for field in fields(Row)}
        for row in values["rows"]:
            if set(row) != known:
                raise UsageError(f"columns missing or unknown: {', '.join(sorted(set(row) ^ known))}")
        rows = tuple(Row(**row) for row in values["rows"])
        return cls(Device.from_json(values["device"]), rows, dict(values["protocol"]))
