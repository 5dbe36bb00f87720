"""Unstructured sparse weights: the kept weights of each row, and where they stand.

The kept weights of a row are cut into runs of eight. A run has a first column (16 bits), each of its weights an offset
from it (8 bits): with values of 16 bits 3.25 bytes a weight, of 32 bits 5.25. Where the next one is more than 255
columns away the run ends early, filled with zeros that stand at its first column; so does the last run of a row.
Compared with offsets inside fixed blocks of 256 columns, where every block of every row is filled up to eight and has a
pointer, this takes 5 % more at 50 % zeros and 6 % less at 90 % (4096 columns); compared with 4-bit gaps it takes more,
but a weight is found without a sum over those before it.

Values stay as they are given, bit for bit: what is kept may be zero, of either sign.

Left out: several rows of activations at a time beyond four. From there on the kernels that win expand the weight for
tensor cores through shared memory, which Triton cannot express.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels import labels
from layerwise.kernels.half_values import dtype_name
from layerwise.kernels.packed import Packed

RUN = 8
"""Nonzeros that share a first column."""

REACH = 256
"""Columns that an offset can tell apart."""

MAX_COLUMNS = 1 << 16
"""First columns have 16 bits."""


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""In which kept weights can be stored."""


@dataclass(frozen=True, eq=False)
class Unstructured(Packed):
    """The kept weights of a weight, row by row.

    Args:
        values: (runs · 8,) float16, bfloat16 or float32.
        offsets: (runs · 8,) uint8, from the first column of the run.
        firsts: (runs,) int16, the lower 16 bits of each run's first column.
        starts: (n + 1,) int32, the first run of each row; the last entry is the number of runs.
        zeros_percent: of the weight's n · k elements how many are not kept, rounded.
    """

    format: ClassVar[str] = "unstructured"

    values: Tensor
    offsets: Tensor
    firsts: Tensor
    starts: Tensor
    zeros_percent: int

    @classmethod
    def pack(cls, weight: Tensor, dtype: torch.dtype | None = None) -> Self:
        """Lay a sparse weight out: what is not zero is kept.

        Args:
            weight: (n, k), any float dtype.
            dtype: float16, bfloat16 or float32, to which the weight is rounded; None keeps its own.
        Raises:
            UsageError: as `from_mask`.
        """
        rounded = weight if dtype is None else weight.to(dtype)
        kept = rounded != 0
        return cls.from_mask(kept, rounded[kept])

    @classmethod
    def from_mask(cls, mask: Tensor, values: Tensor) -> Self:
        """Lay the kept weights of a pruned weight out.

        Args:
            mask: (n, k) bool, which weights are kept.
            values: (kept,) float16, bfloat16 or float32, row by row, in the order of the columns.
        Raises:
            UsageError: more than 65536 columns, another dtype, more or fewer values than the mask keeps, or values that
                are not finite.
        """
        n, k = mask.shape
        if k > MAX_COLUMNS:
            raise UsageError(f"a row of {k} columns cannot be packed: first columns have 16 bits ({MAX_COLUMNS})")
        if values.dtype not in DTYPES:
            known = ", ".join(map(dtype_name, DTYPES))
            raise UsageError(f"unstructured weights are stored in {known}, not in {dtype_name(values.dtype)}")
        rows, columns = mask.nonzero(as_tuple=True)
        if values.shape != rows.shape:
            raise UsageError(f"the mask keeps {len(rows)} weights, but there are {' x '.join(map(str, values.shape))}")
        if not values.isfinite().all():
            row = int(rows[~values.isfinite()][0])
            raise UsageError(
                f"row {row} of the weight is not finite in {dtype_name(values.dtype)}",
                hint="bfloat16 and float32 reach further than float16; or make the level again if it is not finite",
            )
        run_of, place = _cut(rows, columns)
        n_runs = int(run_of[-1]) + 1 if len(run_of) else 0
        opens = place == 0
        firsts = columns[opens]
        stored = values.new_zeros(n_runs * RUN)
        offsets = torch.zeros(n_runs * RUN, dtype=torch.uint8, device=values.device)
        at = run_of * RUN + place
        stored[at] = values
        offsets[at] = (columns - firsts[run_of]).to(torch.uint8)
        per_row = torch.bincount(rows[opens], minlength=n)
        return cls(
            shape=(n, k),
            values=stored,
            offsets=offsets,
            firsts=firsts.to(torch.int16),
            starts=torch.cat([per_row.new_zeros(1), per_row.cumsum(0)]).to(torch.int32),
            zeros_percent=labels.percent(n * k - len(rows), n * k),
        )

    @property
    def label(self) -> str:
        """`unstructured-fp16-50%`."""
        return labels.unstructured(self.zeros_percent, dtype_name(self.values.dtype))

    def dense(self) -> Tensor:
        """The weight with its zeros: (n, k), float32, exact."""
        n, k = self.shape
        row_of_run = torch.repeat_interleave(torch.arange(n, device=self.starts.device), self.starts.diff().long())
        first = (self.firsts.long() & (MAX_COLUMNS - 1)).repeat_interleave(RUN)
        at = row_of_run.repeat_interleave(RUN) * k + first + self.offsets.long()
        opens = torch.arange(len(at), device=at.device) % RUN == 0
        kept = opens | (self.offsets != 0)  # what fills a run up stands at its first column, behind the weight there
        weight = torch.zeros(n * k, device=at.device)
        weight[at[kept]] = self.values[kept].float()
        return weight.view(n, k)


def _cut(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the nonzeros, sorted by row and column, into runs.

    A run takes what it can reach, eight at most. Where it ends depends on where it began, so runs are found one after
    the other, but those of all rows at once: as many steps as the longest row has runs.

    Returns:
        for each nonzero its run, numbered over all rows in order, and its place in it.
    """
    total = len(rows)
    if total == 0:
        return rows, rows
    position = torch.arange(total, device=rows.device)
    row_end = torch.searchsorted(rows, rows, right=True)
    reach_end = torch.searchsorted(rows * 2 * MAX_COLUMNS + columns, rows * 2 * MAX_COLUMNS + columns + REACH)
    run_end = torch.minimum(torch.minimum(row_end, reach_end), position + RUN)  # if a run began here
    opens = torch.zeros(total, dtype=torch.bool, device=rows.device)
    begins = torch.unique(torch.searchsorted(rows, rows))
    last = row_end[begins]
    while len(begins):
        opens[begins] = True
        begins = run_end[begins]
        begins, last = begins[begins < last], last[begins < last]
    run_of = opens.cumsum(0) - 1
    return run_of, position - position[opens][run_of]
