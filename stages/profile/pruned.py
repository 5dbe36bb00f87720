"""What pruning rules need of the weights of one unit: LAMP's scores of what a level prunes, and OWL's outliers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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


def outlier_share(weight: Tensor, norms: Tensor, times: float) -> tuple[float, int]:
    """How many weights are outliers: larger, times the norm of their input, than so many means of the layer.

    Args:
        weight: (out, in).
        norms: (out, in), of each weight's input.
        times: OWL's M.
    Returns:
        Their number, and that of all weights.
    Source: OWL, arXiv:2310.05175, equation 1.
    """
    size = weight.double().abs() * norms
    return float((size > times * size.mean()).sum()), size.numel()
