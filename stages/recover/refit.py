"""`refit`: what a level leaves continuous, fitted anew to the outputs of the dense layer by least squares.

Of a grid these are its scales (of quantized ones, those above several groups): with codes and zero points as they are
a row is a sum of its groups, each times its scale, so all scales of a row come from one small linear system. Of a
pruned weight they are the values that are kept, from the system of the kept columns. Codes, zero points and masks stay
bit for bit, and so does the size. A row whose error does not fall, as it is stored, stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from layerwise.stages.recover import RepairEntry, UnitRepair
from layerwise.stages.recover.grid_parts import GridParts, as_stored, grid_misfit

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level

BATCH_BYTES = 256 << 20
"""Of the linear systems that are solved at a time."""


class Params(RepairEntry):
    """Damping, and nothing else: the level says what can move."""

    method: Literal["refit"] = "refit"
    damp_percent: float = Field(
        0.01, ge=0, lt=1, description="share of a system's mean diagonal that pulls towards what was stored before"
    )

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def misfit(self, recipe: Mapping[str, Any]) -> str | None:
        """It fits grids of rows and pruned weights, with an adapter beside them or without."""
        if recipe["encoding"] == "adapted":
            return self.misfit(recipe["base"])
        return None if recipe["encoding"] == "mask" else grid_misfit(recipe)


def refit(task: UnitRepair, params: Params) -> Level:
    """Fit scales or kept values anew.

    Raises:
        NotFinite: a weight or a statistic is not finite.
    Source: the closed-form scales of layer-wise calibration, LayerCalib-IP, arXiv:2006.10518, section 3; kept values as
        in SparseGPT, arXiv:2301.00774, equation 2.
    """
    from layerwise.stages.compress.grid import check_finite
    from layerwise.stages.levels.adapted import below, over

    base = below(task.level)
    W = task.weight.double()
    if base is not task.level:  # what the adapter adds is not the level's to give
        W = W - (task.level.decode().double() - base.decode().double())
    H = task.statistic("hessian").double()
    check_finite("weight", W)
    check_finite("Hessian", H)
    fit = _kept_values if base.recipe["encoding"] == "mask" else _scales
    return over(task.level, fit(base, W, H, params.damp_percent))


def row_errors(W: Tensor, level: Level, H: Tensor) -> Tensor:
    """tr(E H Eᵀ) by rows, (out,), of a level."""
    E = W - level.decode().double()
    return ((E @ H) * E).sum(1)


def _better_rows(W: Tensor, H: Tensor, old: Level, make: Callable[[Tensor | None], Level]) -> Level:
    """The level with new values in those rows only whose error falls.

    Args:
        make: gives the level with new values in some rows, (out,) bool; in all rows for None.
    """
    better = row_errors(W, make(None), H) < row_errors(W, old, H)
    return make(better) if bool(better.any()) else old


def _renamed(level: Level, tensors: Mapping[str, Tensor]) -> Level:
    recipe = dict(level.recipe) | {"repairs": [*level.recipe.get("repairs", ()), "refit"]}
    return replace(level, name=f"{level.name}+refit", recipe=recipe, tensors={**level.tensors, **tensors})


def _scales(level: Level, W: Tensor, H: Tensor, damp: float) -> Level:
    import torch

    from layerwise.stages.levels.scales import nearest_float16

    parts = GridParts.of(level)
    basis, group, key = scale_basis(parts), parts.scale_of, parts.key
    stored = parts.scale.half()
    old = stored.double()
    fitted = []
    size = max(1, BATCH_BYTES // (8 * (old.shape[1] ** 2 + 3 * W.shape[1])))
    for rows in torch.arange(len(W), device=W.device).split(size):
        M, b = normal_equations(basis[rows], W[rows], H, group, old.shape[1])
        pull = damp * M.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float64).tiny
        system = M + pull[:, None, None] * torch.eye(old.shape[1], dtype=M.dtype, device=M.device)
        right = b - (M @ old[rows][..., None]).squeeze(-1)
        fitted.append(old[rows] + torch.linalg.solve(system, right[..., None]).squeeze(-1))
    new = torch.cat(fitted)
    new = (nearest_float16(new.abs()) * torch.where(new < 0, -1.0, 1.0)).half()
    if key == "scale_above":  # the sign of a quantized scale stands in its code
        new = torch.where(new > 0, new, stored)
    new = torch.where(new.isfinite(), new, stored)

    def make(rows: Tensor | None) -> Level:
        return _renamed(level, as_stored(level, key, new if rows is None else torch.where(rows[:, None], new, stored)))

    return _better_rows(W, H, level, make)


def scale_basis(parts: GridParts) -> Tensor:
    """What the scales of a level multiply: the weight (out, in) that scales of one would give, in float64."""
    return (parts.codes - parts.zero.index_select(1, parts.group)) * parts.factor


def normal_equations(U: Tensor, W: Tensor, H: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The systems M s = b whose solutions are the scales of least output error.

    Args:
        U, W: (rows, in), the basis of the scales and the weight.
        H: (in, in).
        group: (in,), which scale each column has.
        groups: how many there are.
    Returns:
        M (rows, groups, groups), with M_gh = Σ U_i H_ij U_j over i in g and j in h; and b (rows, groups), with
        b_g = Σ U_i H_ij W_j over i in g and all j.
    """
    import torch

    rows = len(U)
    M = U.new_zeros(rows, groups, groups)
    for number in range(groups):
        (members,) = torch.nonzero(group == number, as_tuple=True)
        seen = (U[:, members] @ H[members]) * U
        M[:, number].index_add_(1, group, seen)
    b = U.new_zeros(rows, groups).index_add_(1, group, U * (W @ H))
    return M, b


def _kept_values(level: Level, W: Tensor, H: Tensor, damp: float) -> Level:
    import torch

    from layerwise.stages.levels.mask import kept

    keep = kept(level)
    values = level.tensors["values"]
    old = level.decode().double()
    new = torch.cat([old[rows] + step for rows, step in _steps(keep, W - old, H, damp)])
    stored = torch.zeros(level.shape, dtype=values.dtype, device=values.device).masked_scatter_(keep, values)
    fitted = torch.where(new.to(values.dtype).isfinite(), new.to(values.dtype), stored)

    def make(rows: Tensor | None) -> Level:
        chosen = fitted if rows is None else torch.where(rows[:, None], fitted, stored)
        return _renamed(level, {"values": chosen[keep]})

    return _better_rows(W, H, level, make)


def _steps(keep: Tensor, E: Tensor, H: Tensor, damp: float) -> Iterator[tuple[Tensor, Tensor]]:
    """By rows, what to add to the kept weights: H_SS δ = (E H)_S, and zero elsewhere."""
    import torch

    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    damped = H + (damp * H.diagonal().mean() + torch.finfo(torch.float64).tiny) * eye
    for rows in torch.arange(len(E), device=E.device).split(max(1, BATCH_BYTES // (16 * H.numel()))):
        K = keep[rows].double()
        systems = damped * K[:, :, None] * K[:, None, :] + torch.diag_embed(1 - K)
        yield rows, torch.linalg.solve(systems, (K * (E[rows] @ H))[..., None]).squeeze(-1)
