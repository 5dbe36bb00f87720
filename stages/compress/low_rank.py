"""`low_rank`: the product of two thin matrices whose outputs are nearest to the layer's: W ≈ B · A.

With the Hessian H of the inputs, the product of rank r of least output error is known in closed form: the best
approximation of W H^½ by rank, turned back (`best_factors`). All ranks come from one decomposition. How many a weight
gets is said by a rank, by a share of its parameters, or by a share of its outputs' energy, which gives each matrix a
rank of its own, as far as its singular values fall: those that fall slowly keep most of their size, and the recipe says
so (`energy`, `parameters_share`).

Factors may be rounded (`then`): A to nearest, weighed by what its inputs carry; then B is fitted anew to the rounded A
by least squares on the Hessian, and rounded, too.

Source: activation-aware SVD as in LoRD, arXiv:2309.14021, section 3, and SVD-LLM, arXiv:2403.07378, section 3.1; ranks
    by the tail of the singular values as in WeLore, arXiv:2407.11239, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from layerwise.stages.compress import MenuEntry, Task
from layerwise.stages.compress.pruning import Share, Then, grid_recipe, percent, rounded
from layerwise.stages.quantities import listed

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level
    from layerwise.stages.models.network import Unit

Rank = Annotated[int, Field(ge=1)]


class Params(MenuEntry):
    """How much is kept, and how it is stored."""

    method: Literal["low_rank"] = "low_rank"
    ranks: Annotated[tuple[Rank, ...], listed(int)] = Field((), description="ranks, one level for each")
    parameters: Annotated[tuple[Share, ...], listed(float)] = Field(
        (), description="shares of the weight's parameters that the two factors may have, one level for each"
    )
    energy: Annotated[tuple[Share, ...], listed(float)] = Field(
        (),
        description="shares of the squared outputs that the rank must keep, one level for each; at most the greatest "
        "rank that still saves parameters",
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="in which factors are stored that are not rounded to a grid"
    )
    then: Then | None = Field(None, description="round the factors to these grids; one level for each amount and bits")
    damp_percent: float = Field(0.01, ge=0, lt=1, description="share of the mean diagonal that is added to the Hessian")

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    @model_validator(mode="after")
    def _something(self) -> Self:
        amounts = self._amounts
        if not amounts:
            raise ValueError("give `ranks`, `parameters` or `energy`, at least one of them")
        if len(set(amounts)) != len(amounts):
            raise ValueError("the same amount stands twice")
        return self

    @property
    def _amounts(self) -> list[str]:
        """Their names, in the order of the levels."""
        return [
            *(f"r{rank}" for rank in self.ranks),
            *(percent(share) for share in self.parameters),
            *(f"e{percent(share)}" for share in self.energy),
        ]

    def level_names(self) -> list[str]:
        """`low_rank-r64`, `low_rank-25%`, `low_rank-e99%-8b-g64`, ..."""
        ends = [""] if self.then is None else [f"-{name}" for name in self.then.grid_names()]
        dtype = "" if self.dtype == "float16" or self.then is not None else f"-{self.dtype}"
        return [f"{self.method}-{amount}{dtype}{end}" for amount in self._amounts for end in ends]

    def refuses(self, unit: Unit) -> str | None:
        """Ranks at which two factors have as many parameters as the weight."""
        most = greatest_rank(unit.shape)
        if most == 0:
            return f"two factors of a {unit.shape[0]} x {unit.shape[1]} weight are never smaller than it"
        too_large = [rank for rank in self.ranks if rank > most]
        if too_large:
            return (
                f"rank {too_large[0]} of a {unit.shape[0]} x {unit.shape[1]} weight saves nothing: at most {most} "
                "does; `parameters` gives each weight a rank that fits"
            )
        return super().refuses(unit)

    def again(self, level: str) -> MenuEntry | None:
        """The same for the amount and the bits of that level."""
        each = 1 if self.then is None else len(self.then.bits)
        number, place = divmod(self.level_names().index(level), each)
        one: dict[str, Any] = {}
        for key in ("ranks", "parameters", "energy"):
            values = getattr(self, key)
            one[key] = values[number : number + 1] if 0 <= number < len(values) else ()
            number -= len(values)
        if self.then is not None:
            one["then"] = self.then.model_copy(update={"bits": (self.then.bits[place],)})
        return self.model_copy(update=one)


def greatest_rank(shape: tuple[int, int]) -> int:
    """The greatest rank at which two factors have fewer parameters than a weight of that shape; 0 if none has."""
    rows, columns = shape
    return (rows * columns - 1) // (rows + columns)


def low_rank(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level for each amount, and for each number of bits of it.

    Returns:
        levels in the order of `params.level_names`.
    Raises:
        NotFinite: a weight or a statistic is NaN or Inf, the Hessian is zero, a factor is too large for its dtype, or
            the weight was pruned before.
    """
    from layerwise.solvers.ranks import energy_rank
    from layerwise.stages.compress.factors import best_factors, check_unpruned, damped
    from layerwise.stages.compress.recursion import check_layer
    from layerwise.stages.levels.low_rank import low_rank_level

    check_unpruned(task)
    weight, H = task.weights[task.unit].double(), task.statistic(task.unit, "hessian").double()
    check_layer(weight, H)
    H = damped(H, params.damp_percent)
    most = max(1, greatest_rank(task.units[task.unit].shape))
    factors = best_factors(weight, most, H)
    rows, columns = weight.shape
    shares = [max(1, int(share * rows * columns / (rows + columns))) for share in params.parameters]
    by_energy = [min(most, energy_rank(factors.values.cpu().numpy(), share)) for share in params.energy]
    ranks = [*params.ranks, *shares, *(max(1, rank) for rank in by_energy)]
    squares = factors.values.square()
    names, levels = iter(params.level_names()), []
    for rank in ranks:
        recipe = {
            "method": params.method,
            "energy": float(squares[:rank].sum() / squares.sum()) if squares.any() else 1.0,
            "parameters_share": rank * (rows + columns) / (rows * columns),
            "damp_percent": params.damp_percent,
        }
        A, B = factors.A[:rank], factors.B[:, :rank]
        if params.then is None:
            levels.append(low_rank_level(next(names), recipe, *(_whole(factor, params.dtype) for factor in (A, B))))
            continue
        for bits in params.then.bits:
            levels.append(low_rank_level(next(names), recipe, *_rounded(A, B, weight, H, params.then, bits)))
    return {task.unit: levels}


def _whole(factor: Tensor, dtype: str) -> Level:
    import torch

    from layerwise.stages.levels.dense import dense_level

    return dense_level(factor.to(getattr(torch, dtype)))


def _rounded(A: Tensor, B: Tensor, weight: Tensor, H: Tensor, then: Then, bits: int) -> tuple[Level, Level]:
    """Both factors on grids, the second fitted to what the first became.

    B minimises tr((W - BÂ) H (W - BÂ)ᵀ): B = W H Âᵀ (Â H Âᵀ)⁻¹.
    """
    import torch

    on_grid = _on_grid(A, then, bits, H.diagonal())
    A = on_grid.decode().double()
    seen = A @ H
    inner = seen @ A.T
    if inner.diagonal().all():  # a row that became zero leaves its column of B free
        B = torch.linalg.lstsq(inner, seen @ weight.T).solution.T
    return on_grid, _on_grid(B, then, bits, inner.diagonal())


def _on_grid(factor: Tensor, then: Then, bits: int, importance: Tensor) -> Level:
    """Args:
    factor: (rows, columns).
    importance: (columns,), what a squared error in a column counts by.
    """
    from layerwise.stages.compress.grid import grid_or_masked

    scale, zero, codes = rounded(factor, bits, then, importance.expand_as(factor))
    return grid_or_masked("factor", {"method": "rtn", **grid_recipe(then, bits)}, codes, scale=scale, zero=zero)
