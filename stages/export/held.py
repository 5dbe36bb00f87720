"""What a format can hold and in which tensors: all that a budget that is counted in its files needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from layerwise.stages.export.shards import Layout
from layerwise.stages.models.network import Unit

PACKED = ("grid", "masked_grid")
"""Encodings that are written packed; `dense` and `mask` are written dense, and others not at all."""

Recipe = Mapping[str, Any]


@dataclass(frozen=True)
class Held:
    """A format, as a budget sees it.

    Args:
        name: as its users write it.
        why_not: why it cannot hold a level; None if it can.
        layout: the tensors that a packed level becomes, by the ends of their names; None for a format that keeps the
            checkpoint's own tensors and files.
    """

    name: str
    why_not: Callable[[Unit, Recipe], str | None]
    layout: Callable[[Unit, Recipe], Layout] | None
