"""The resources that a budget may limit and an axis may show: one table, of which everything else is made.

Costs are added up in absolute amounts (bits of all units, bytes of the whole model); people read and write them as
`Resource.per` says. A new resource is one entry here, and whatever measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Resource:
    """What levels use.

    Args:
        text: what it is, for people.
        axis: what an axis of a plot says.
        per: `weight`, an average over the weights of the units; `model`, the whole model with what is no unit.
        type: of its columns.
        of_levels: known from the levels alone; else a stage measures it.
        level_column: its name in the `levels` table, where one level's share of it stands.
    """

    text: str
    axis: str
    per: Literal["weight", "model"]
    type: Literal["float64", "int64"] = "float64"
    of_levels: bool = True
    level_column: str | None = None


RESOURCES: Mapping[str, Resource] = {
    "bits": Resource(
        "average bits per weight of the units, without overhead (comparable with papers)",
        "average bits per weight",
        "weight",
        level_column="bits",
    ),
    "effective_bits": Resource(
        "average bits per weight of the units, everything stored counted (scales, zero points, indices)",
        "average bits per weight, everything stored",
        "weight",
        level_column="effective_bits",
    ),
    "bytes": Resource(
        "bytes of the whole model: the units as encoded, the rest as in the checkpoint",
        "bytes of the whole model",
        "model",
        "int64",
        level_column="size_bytes",
    ),
    "parameters": Resource(
        "weights of the whole model that are kept: those pruned or dropped do not count",
        "parameters of the whole model that are kept",
        "model",
        "int64",
        level_column="parameters",
    ),
    "density": Resource(
        "share of the units' weights that are kept: 0.4 is a sparsity of 60 %",
        "share of the weights that are kept",
        "weight",
    ),
    "flops": Resource(
        "floating-point operations of the units' products for one token: two for each kept weight that it meets, a "
        "routed expert's by its share of the tokens; attention scores are not counted",
        "FLOPs of the units' products, per token",
        "model",
        level_column="flops",
    ),
    "depth": Resource(
        "blocks of the model that are run, a half-block counting half",
        "blocks that are run",
        "model",
        level_column="depth",
    ),
    "ms": Resource(
        "milliseconds of the whole model's forward pass, as the latency stage measured its parts",
        "milliseconds of the forward pass, predicted",
        "model",
        of_levels=False,
    ),
}

OF_LEVELS = tuple(name for name, resource in RESOURCES.items() if resource.of_levels)
"""Those that a database knows."""

EXPLAINED = "; ".join(f"{name}: {resource.text}" for name, resource in RESOURCES.items())
"""All of them in words."""


def columns() -> dict[str, str]:
    """Columns of a table of whole models, with their types."""
    return {name: resource.type for name, resource in RESOURCES.items()}


def level_columns() -> dict[str, str]:
    """Columns of a table of levels, with their types."""
    return {resource.level_column: resource.type for resource in RESOURCES.values() if resource.level_column}
