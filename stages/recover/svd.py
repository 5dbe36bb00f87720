"""`svd`: an adapter that is nearest to what a level is off by, weight for weight: the baseline of `eora`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from layerwise.stages.recover import UnitRepair
from layerwise.stages.recover.adapters import AdapterParams, adapted

if TYPE_CHECKING:
    from layerwise.stages.levels.level import Level


class Params(AdapterParams):
    """As of every adapter in closed form."""

    method: Literal["svd"] = "svd"


def svd(task: UnitRepair, params: Params) -> Level:
    """Lay the best approximation of rank r of the weight error beside a level.

    Raises:
        NotFinite: a weight is not finite, or an adapter too large for its dtype.
    """
    from layerwise.stages.compress.factors import best_factors

    E = task.weight.double() - task.level.decode().double()
    return adapted(task.level, best_factors(E, params.rank), params)
