"""What of a half-block can go together: heads with their rows of the query, key and value weights and their columns of
the output projection, or channels of an MLP.

A half-block is narrowed by groups: a channel of an MLP, a head, or a key-value head with all query heads that share it.
Free of torch but for `index`, because menus and exports speak of it; `find_channels` finds out which weights hold what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Segments = tuple[tuple[int, int], ...]
"""Where groups lie along a dimension: of each run of groups, one behind the other, its start and a group's size."""


@dataclass(frozen=True)
class Channels:
    """What of a half-block can go together.

    Args:
        half: name of the half-block.
        role: `attention` or `mlp`.
        groups: how many there are.
        heads: query heads of a group; 1 in an MLP.
        out: the unit that writes the half-block's answer: the groups lie along its columns.
        columns: where.
        rows: by unit that reads the half-block's input, where the groups lie along its rows.
    """

    half: str
    role: str
    groups: int
    heads: int
    out: str
    columns: Segments
    rows: Mapping[str, Segments]

    @property
    def units(self) -> tuple[str, ...]:
        """All units that it speaks of."""
        return (*self.rows, self.out)

    def as_json(self) -> dict[str, Any]:
        """As it goes to a worker."""
        rows = {unit: [list(one) for one in segments] for unit, segments in self.rows.items()}
        return {**vars(self), "columns": [list(one) for one in self.columns], "rows": rows}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Channels:
        """What `as_json` gave."""
        rows = {unit: segments_of(some) for unit, some in entry["rows"].items()}
        return cls(**{**entry, "columns": segments_of(entry["columns"]), "rows": rows})


def segments_of(pairs: Sequence[Sequence[int]]) -> Segments:
    """Segments that went through JSON."""
    return tuple((start, size) for start, size in pairs)


def places(segments: Segments, groups: Sequence[int], length: int) -> list[int]:
    """Where some groups lie along a dimension: by segment, then by group.

    Args:
        segments: no segment at all stands for a dimension that groups say nothing of: all of it is meant.
        groups: their numbers.
        length: of the dimension.
    """
    if not segments:
        return list(range(length))
    return [start + group * size + i for start, size in segments for group in groups for i in range(size)]


def index(segments: Segments, groups: Sequence[int], tensor: Tensor, dim: int) -> Tensor:
    """The same along a dimension of a tensor, int64, on its device."""
    import torch

    return torch.tensor(places(segments, groups, tensor.shape[dim]), dtype=torch.int64, device=tensor.device)
