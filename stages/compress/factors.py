"""The product of two thin matrices that is nearest to a matrix, as its inputs see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.errors import NotFinite
from layerwise.stages.compress import Task

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """B · A.

    Args:
        A: (r, in).
        B: (out, r).
        values: all singular values of the matrix seen through its inputs, falling. The first r rows and columns of
            factors of a greater rank are those of rank r, and what they leave out is the sum of the other squares.
    """

    A: Tensor
    B: Tensor
    values: Tensor


def best_factors(E: Tensor, rank: int, H: Tensor | None = None) -> Factors:
    """The product of rank r that is nearest to a matrix, seen through the inputs that it is multiplied by.

    It minimises tr((E - BA) H (E - BA)ᵀ), the squared output error: with H = Q Λ Qᵀ, E Q Λ^½ is cut to its first r
    singular values, U Σ Vᵀ, and turned back: B = U Σ, A = Vᵀ Λ^-½ Qᵀ. Directions that no input has are left at zero.

    Args:
        E: (out, in), float64.
        rank: r; at most min(out, in) is used.
        H: (in, in), float64, symmetric and not negative; the identity if left out.
    Returns:
        those factors, in float64. Every row of A and the column of B that meets it reach to the same greatest
        magnitude, so that both are stored equally well.
    Source: EoRA, arXiv:2410.21271, section 3; the solution itself is Eckart and Young's.
    """
    import torch

    rank = min(rank, *E.shape)
    if H is None:
        U, sigma, Vt = torch.linalg.svd(E, full_matrices=False)
        A, B = Vt[:rank], U[:, :rank] * sigma[:rank]
    else:
        values, Q = torch.linalg.eigh(H)
        seen = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
        root = values.where(seen, torch.zeros_like(values)).sqrt()
        U, sigma, Vt = torch.linalg.svd((E @ Q) * root, full_matrices=False)
        back = torch.where(seen, 1 / root.where(seen, torch.ones_like(root)), torch.zeros_like(root))
        A, B = (Vt[:rank] * back) @ Q.T, U[:, :rank] * sigma[:rank]
    reach_a, reach_b = A.abs().amax(1), B.abs().amax(0)
    balance = torch.where((reach_a > 0) & (reach_b > 0), (reach_b / reach_a).sqrt(), torch.ones_like(reach_a))
    return Factors(A * balance[:, None], B / balance, sigma)


def damped(H: Tensor, percent: float) -> Tensor:
    """A Hessian (in, in) with a share of its mean diagonal added to its diagonal."""
    import torch

    return H + percent * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)


def check_unpruned(task: Task) -> None:
    """Raise NotFinite if the weight was pruned before: a product of factors would fill its zeros."""
    if task.unit in task.keep:
        raise NotFinite(
            "it was pruned before, and a product of thin matrices would fill its zeros",
            hint="take low rank first, or leave the unit to another method",
        )
