"""What pruning rules need of the weights of one unit: LAMP's scores of what a level prunes, and OWL's outliers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.stages.calibrate.statistics import Statistics
from layerwise.stages.levels.database import UNCHANGED, Database

if TYPE_CHECKING:
    from torch import Tensor

OUTLIER = 5.0
"""OWL's M: an outlier is so many times as large as the mean of its layer."""


def lamp_losses(name: str, *, database: Database) -> list[float | None]:
    """LAMP's loss of every level of a unit; None of those that could not be made."""
    unit = database.index.by_name[name]
    weight = database.level(name, unit.levels[UNCHANGED].name).decode()
    return [
        lamp_loss(weight, database.level(name, level.name).decode() == 0) if level.usable else None
        for level in unit.levels
    ]


def outliers(name: str, *, database: Database, statistics: Path) -> tuple[int, int]:
    """How many of a unit's weights are outliers, and how many it has.

    Args:
        statistics: the artifact, with the Hessians.
    """
    unit = database.index.by_name[name]
    squares = Statistics(statistics).tensor(unit.unit, "hessian").double().diagonal(dim1=-2, dim2=-1)
    weight = database.level(name, unit.levels[UNCHANGED].name).decode()
    norms = squares.sqrt().reshape(-1, weight.shape[1])  # of a convolution in groups, one row for each
    return count_outliers(weight, norms.repeat_interleave(len(weight) // len(norms), dim=0)), weight.numel()


def lamp_loss(weight: Tensor, pruned: Tensor) -> float:
    """The summed LAMP scores of the weights that a level prunes: what a global threshold on scores minimises.

    A weight's score is its square over the sum of the squares of all in its layer that are at least as large, so the
    largest has 1, and pruning a whole layer never pays.

    Args:
        weight: (out, in), before.
        pruned: (out, in) bool, what is zero afterwards.
    Source: LAMP, arXiv:2010.07611, equation 1.
    """
    squares, order = weight.double().square().flatten().sort(descending=True, stable=True)
    beyond = squares.cumsum(0)
    scores = (squares / beyond).where(beyond > 0, squares.new_zeros(()))
    return float(scores[pruned.flatten()[order]].sum())


def count_outliers(weight: Tensor, norms: Tensor, times: float = OUTLIER) -> int:
    """How many weights are outliers: larger, times the norm of their input, than so many means of the layer.

    Args:
        weight: (out, in).
        norms: (out, in), of each weight's input.
        times: OWL's M.
    Source: OWL, arXiv:2310.05175, equation 1.
    """
    size = weight.double().abs() * norms
    return int((size > times * size.mean()).sum())
