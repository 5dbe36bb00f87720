"""Unstructured sparse weights: the nonzeros of each row, and where they stand.

The nonzeros of a row are cut into runs of eight. A run has a first column (16 bits), each of its weights an offset from
it (8 bits): 3.25 bytes a nonzero. Where the next nonzero is more than 255 columns away the run ends early, filled with
zeros that stand at its first column; so does the last run of a row. Compared with offsets inside fixed blocks of 256
columns, where every block of every row is filled up to eight and has a pointer, this takes 5 % more at 50 % zeros and
6 % less at 90 % (4096 columns); compared with 4-bit gaps it takes more, but a weight is found without a sum over those
before it.

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
from layerwise.kernels.half_values import dtype_name, half_values
from layerwise.kernels.packed import Packed

RUN = 8
"""Nonzeros that share a first column."""

REACH = 256
"""Columns that an offset can tell apart."""

MAX_COLUMNS = 1 << 16
"""First columns have 16 bits."""


@dataclass(frozen=True, eq=False)
class Unstructured(Packed):
    """The nonzeros of a weight, row by row.

    Args:
        values: (runs · 8,) float16 or bfloat16.
        offsets: (runs · 8,) uint8, from the first column of the run.
        firsts: (runs,) int16, the lower 16 bits of each run's first column.
        starts: (n + 1,) int32, the first run of each row; the last entry is the number of runs.
        zeros_percent: of the weight's n · k elements how many are zero, rounded.
    """

    format: ClassVar[str] = "unstructured"

    values: Tensor
    offsets: Tensor
    firsts: Tensor
    starts: Tensor
    zeros_percent: int

    @classmethod
    def pack(cls, weight: Tensor, dtype: torch.dtype | None = None) -> Self:
        """Lay a sparse weight out.

        Args:
            weight: (n, k), any float dtype.
            dtype: of the stored weights; None keeps float16 and bfloat16 and rounds anything else to float16.
        Raises:
            UsageError: more than 65536 columns, or weights that are not finite.
        """
        n, k = weight.shape
        if k > MAX_COLUMNS:
            raise UsageError(f"a row of {k} columns cannot be packed: first columns have 16 bits ({MAX_COLUMNS})")
        values = half_values(weight, dtype)
        rows, columns = values.nonzero(as_tuple=True)
        run_of, place = _cut(rows, columns)
        n_runs = int(run_of[-1]) + 1 if len(run_of) else 0
        opens = place == 0
        firsts = columns[opens]
        stored = values.new_zeros(n_runs * RUN)
        offsets = torch.zeros(n_runs * RUN, dtype=torch.uint8, device=weight.device)
        at = run_of * RUN + place
        stored[at] = values[rows, columns]
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
        """The weight with its zeros, in float32."""
        n, k = self.shape
        row_of_run = torch.repeat_interleave(torch.arange(n, device=self.starts.device), self.starts.diff().long())
        first = (self.firsts.long() & (MAX_COLUMNS - 1)).repeat_interleave(RUN)
        at = row_of_run.repeat_interleave(RUN) * k + first + self.offsets.long()
        # Adding, not setting: what fills a run up stands at its first column, where there is a weight already.
        return torch.zeros(n * k, device=at.device).index_add_(0, at, self.values.float()).view(n, k)


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
