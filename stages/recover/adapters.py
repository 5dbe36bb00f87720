"""Low-rank adapters in closed form: what the repairs that lay one beside a level have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from layerwise.stages.recover import RepairEntry

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level


class AdapterParams(RepairEntry):
    """Parameters of every repair that lays an adapter beside levels."""

    rank: int = Field(8, ge=1, description="columns of B and rows of A; at most the smaller side of a weight is taken")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="in which adapters are stored")

    @property
    def name(self) -> str:
        """`eora-r8`."""
        return f"{self.method}-r{self.rank}"

    def misfit(self, recipe: Mapping[str, Any]) -> str | None:
        """It fits every level of a weight."""
        return None


def best_factors(E: Tensor, rank: int, H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The product of rank r that is nearest to a matrix, seen through the inputs that it is multiplied by.

    It minimises tr((E - BA) H (E - BA)ᵀ), the squared output error: with H = Q Λ Qᵀ, E Q Λ^½ is cut to its first r
    singular values, U Σ Vᵀ, and turned back: B = U Σ, A = Vᵀ Λ^-½ Qᵀ. Directions that no input has are left at zero.

    Args:
        E: (out, in), float64.
        rank: r; at most min(out, in) is used.
        H: (in, in), float64, symmetric and not negative; the identity if left out.
    Returns:
        A (r, in) and B (out, r), float64. Every row of A and the column of B that meets it reach to the same greatest
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
    return A * balance[:, None], B / balance


def adapted(level: Level, factors: tuple[Tensor, Tensor], params: AdapterParams) -> Level:
    """A level with an adapter beside it.

    Raises:
        NotFinite: a factor is not finite, or too large for the dtype.
    """
    import torch

    from layerwise.stages.levels.adapted import with_adapter

    A, B = (factor.to(getattr(torch, params.dtype)) for factor in factors)
    return with_adapter(level, A, B, method=params.method)
