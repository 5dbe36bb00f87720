"""Low-rank adapters in closed form: what the repairs that lay one beside a level have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from layerwise.stages.recover import RepairEntry

if TYPE_CHECKING:
    from layerwise.stages.compress.factors import Factors
    from layerwise.stages.levels.level import Level


class AdapterParams(RepairEntry):
    """Parameters of every repair that lays an adapter beside levels."""

    rank: int = Field(8, ge=1, description="columns of B and rows of A; at most the smaller side of a weight is taken")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="in which adapters are stored")

    adds_adapters: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """`eora-r8`."""
        return f"{self.method}-r{self.rank}"

    def misfit(self, recipe: Mapping[str, Any]) -> str | None:
        """It fits every level of a weight that is there whole."""
        if recipe["encoding"] != "sliced":
            return None
        return "it would bring back the heads or channels that went: repair the model of a dense export"


def adapted(level: Level, factors: Factors, params: AdapterParams) -> Level:
    """A level with an adapter beside it.

    Raises:
        NotFinite: a factor is not finite, or too large for the dtype.
    """
    import torch

    from layerwise.stages.levels.adapted import with_adapter

    A, B = (factor.to(getattr(torch, params.dtype)) for factor in (factors.A, factors.B))
    return with_adapter(level, A, B, method=params.method)
