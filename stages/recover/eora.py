"""`eora`: an adapter that is nearest to what a level's outputs are off by: a low-rank residual in the eigenspace of the
inputs.

The statistics say which inputs are meant: those of the dense model, or, behind a `calibrate` stage that was given the
compressed one, those that the layer will really get.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from layerwise.stages.recover import UnitRepair
from layerwise.stages.recover.adapters import AdapterParams, adapted

if TYPE_CHECKING:
    from layerwise.stages.levels.level import Level


class Params(AdapterParams):
    """As of every adapter in closed form, and the damping of the statistics."""

    method: Literal["eora"] = "eora"
    damp_percent: float = Field(
        0.01, ge=0, lt=1, description="share of the mean diagonal that is added to the Hessian: little text, more of it"
    )

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})


def eora(task: UnitRepair, params: Params) -> Level:
    """Lay the best approximation of rank r of the output error beside a level.

    Raises:
        NotFinite: a weight or a statistic is not finite, or an adapter too large for its dtype.
    Source: EoRA, arXiv:2410.21271.
    """
    from layerwise.stages.compress.factors import best_factors, damped
    from layerwise.stages.compress.grid import check_finite

    E = task.weight.double() - task.level.decode().double()
    H = task.statistic("hessian").double()
    check_finite("weight error", E)
    check_finite("Hessian", H)
    return adapted(task.level, best_factors(E, params.rank, damped(H, params.damp_percent)), params)
