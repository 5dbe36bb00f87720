"""`gptq`: quantize a layer column by column, and let the columns still to come make up for each error.

All bit-widths of a unit come from one factorisation and go through one loop over the columns, side by side, because its
many small steps cost less together than one after another. Everything is in float64, so that neither the order in which
a machine adds up nor the blocking turns one code into another; that takes twice the time of float32. Measured for
1024 × 4096 and six bit-widths, on one CPU thread of a 2-core machine: 7.5 s, of which 2.5 s for the factorisation (one
bit-width: 4.6 s). More threads help little with such small steps, and on busy cores they harm.

Three differences from the published code, none in the method:
- The factor U with UᵀU = H⁻¹ comes from one Cholesky factorisation, of H with rows and columns reversed, and one
  triangular inverse; no H⁻¹ is formed and factored again.
- A group's grid is fitted to weights that carry *every* earlier correction. The published code leaves out those of the
  current block of 128 columns, which matters when a group is smaller than a block.
- If the factorisation fails, damping rises in steps of 0.01, as GPTQModel does it; the recipe keeps what was used.

Left out: grids found by search. Inputs of the already compressed block: `gptq_sequential`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import AliasChoices, Field

from layerwise.errors import NotFinite
from layerwise.stages.compress import Task, rtn
from layerwise.stages.compress.grid import GridParams, check_finite, dequantize, fit, grid_or_masked, quantize

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level

DAMP_STEP = 0.01
MAX_ELEMENTS = 1 << 24
"""Weights, times bit-widths, that are worked on at a time: 128 MiB in float64. Rows do not depend on each other."""


class Params(GridParams):
    """Grid, damping, order."""

    method: Literal["gptq"] = "gptq"
    damp_percent: float = Field(
        0.01,
        gt=0,
        lt=1,
        validation_alias=AliasChoices("damp_percent", "percdamp", "dampening_frac", "rel_damp"),
        description="share of the Hessian's mean diagonal that is added to its diagonal",
    )
    desc_act: bool | Literal["static"] = Field(
        False,
        validation_alias=AliasChoices("desc_act", "act_order"),
        description="true: columns with large activations first, groups formed in that order, and stored; "
        "static: the same order, but groups and their grids as without it",
    )
    block_size: int = Field(
        128, ge=1, description="columns between updates of all later ones; changes the speed, not the result"
    )

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def _name_suffixes(self) -> list[str]:
        order = {False: [], True: ["act"], "static": ["static"]}[self.desc_act]
        return [*order, *([] if self.damp_percent == 0.01 else [f"damp{self.damp_percent:g}"])]

    def fallback(self) -> rtn.Params:
        """Rounding to nearest, on the same grid."""
        return rtn.Params(bits=self.bits, group_size=self.group_size, sym=self.sym)


def gptq(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level per bit-width, from one factorisation.

    Args:
        task: one unit with its Hessian.
    Returns:
        levels in the order of `params.bits`.
    Raises:
        NotFinite: NaN or Inf in the weight or the Hessian, a Hessian that is zero (no token reached the layer) or that
            no damping makes positive definite, or weights too large for a float16 scale.
    Source: GPTQ, arXiv:2210.17323, algorithm 1.
    """
    hessian = task.statistic(task.unit, "hessian")
    return {task.unit: quantized(task.weights[task.unit], hessian, params, keep=task.keep.get(task.unit))}


def quantized(weight: Tensor, hessian: Tensor, params: Params, *, keep: Tensor | None = None) -> list[Level]:
    """The levels of one weight.

    Args:
        weight: (out, in), any float dtype; not changed.
        hessian: (in, in), `X Xᵀ` of the calibration inputs, any float dtype; not changed.
        keep: (out, in) bool: weights that are not pruned. Pruned ones stay zero, and what that costs is made up for
            by the columns to come, as SparseGPT does it (arXiv:2301.00774, algorithm 1).
    """
    check_finite("weight", weight)
    check_finite("Hessian", hessian)
    W, H = weight.detach().double().T.clone(), hessian.detach().double().clone()  # W: (in, out), a row per column
    dead = H.diagonal() == 0
    if dead.all():
        raise NotFinite("the Hessian is zero: no calibration token reached this layer", hint="calibrate on more text")
    H.diagonal()[dead] = 1  # inputs that are always zero: their weights are free, and become zero
    W[dead] = 0

    plan = _plan(H, params)
    U, damp_percent_used = inverse_factor(H[plan.order][:, plan.order], params.damp_percent)
    codes, scale, zero = _quantize_rows(W[plan.order], U, plan, params, None if keep is None else keep.T[plan.order])
    codes = codes[plan.order.argsort()]
    recipe = {
        "method": params.method,
        "group_size": params.group_size,
        "sym": params.sym,
        "desc_act": params.desc_act,
        "damp_percent": params.damp_percent,
        "damp_percent_used": damp_percent_used,
        "block_size": params.block_size,
    }
    return [
        grid_or_masked(
            name,
            recipe | {"bits": bits},
            codes[:, b].T,
            scale=scale[:, b].T,
            zero=zero[:, b].T,
            group=plan.stored_groups,
            keep=keep,
        )
        for b, (name, bits) in enumerate(zip(params.level_names(), params.bits, strict=True))
    ]


@dataclass(frozen=True)
class _Plan:
    """In which order columns are quantized, and which of them share a grid.

    Args:
        order: (in,), the columns.
        members: for each group, the positions in that order that it covers.
        fits: the groups whose grids are fitted just before a position.
        group_size: what blocks must not cut a group by; 1 if all grids are fitted beforehand.
        stored_groups: (in,), the group of each column, if a reader cannot know it.
    """

    order: Tensor
    members: list[slice | Tensor]
    fits: dict[int, list[int]]
    group_size: int
    stored_groups: Tensor | None = None


def _plan(H: Tensor, params: Params) -> _Plan:
    import torch

    columns = len(H)
    size = params.columns_per_group(columns)
    starts = range(0, columns, size)
    groups = [slice(start, min(start + size, columns)) for start in starts]
    at_their_start = {start: [g] for g, start in enumerate(starts)}
    if params.desc_act is False:
        return _Plan(torch.arange(columns, device=H.device), list(groups), at_their_start, size)
    order = H.diagonal().argsort(descending=True, stable=True)
    position = order.argsort()
    if params.desc_act == "static":
        return _Plan(order, [position[group] for group in groups], {0: list(range(len(groups)))}, 1)
    # One group needs no index: every column is in it.
    return _Plan(order, list(groups), at_their_start, size, position // size if len(groups) > 1 else None)


def inverse_factor(H: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """The upper triangular U with UᵀU = (H + damping)⁻¹, whose rows are GPTQ's corrections.

    With J for reversal and L Lᵀ = J H J, U = J L⁻¹ J.

    Args:
        H: (in, in), float64.
        damp_percent: share of the mean diagonal to add; raised in steps of 0.01 as long as H is not positive definite.
    Returns:
        U, and the share that was added.
    Raises:
        NotFinite: no share below 1 is enough.
    """
    import torch

    used, mean = damp_percent, H.diagonal().mean()
    while used < 1:
        reversed_H = H.flip(0, 1)
        reversed_H.diagonal().add_(used * mean)
        L, failed = torch.linalg.cholesky_ex(reversed_H)
        if not failed and L.isfinite().all():
            eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
            return torch.linalg.solve_triangular(L, eye, upper=False).flip(0, 1), used
        used = round(used + DAMP_STEP, 9)
    raise NotFinite("the Hessian is not positive definite, whatever the damping", hint="calibrate again")


def _quantize_rows(
    W: Tensor, U: Tensor, plan: _Plan, params: Params, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`_quantize`, for as many rows of the weight at a time as memory allows; they do not depend on each other."""
    import torch

    rows = max(1, MAX_ELEMENTS // (len(W) * len(params.bits)))
    kept = [None] * len(range(0, W.shape[1], rows)) if keep is None else torch.split(keep, rows, dim=1)
    parts = [
        _quantize(part, U, plan, params, part_kept)
        for part, part_kept in zip(torch.split(W, rows, dim=1), kept, strict=True)
    ]
    codes, scale, zero = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return codes, scale, zero


def _quantize(
    weight: Tensor, U: Tensor, plan: _Plan, params: Params, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ's recursion, for all bit-widths side by side.

    Columns of the weight are rows here, so that each is contiguous.

    Args:
        weight: (in, out), columns in the plan's order.
        U: (in, in), from `inverse_factor`, in the same order.
        keep: (in, out) bool in the same order: weights that are not pruned.
    Returns:
        codes (in, bit-widths, out) uint8, scale and zero (groups, bit-widths, out).
    Source: GPTQ, arXiv:2210.17323, algorithm 1. Its outer loop is over blocks, `err` is its E, U its (H⁻¹) after the
        Cholesky factorisation.
    """
    import torch

    columns = len(weight)
    max_code = torch.tensor([[2**bits - 1] for bits in params.bits], dtype=weight.dtype, device=weight.device)
    W = weight[:, None, :].repeat(1, len(params.bits), 1)
    kept = None if keep is None else keep[:, None, :].to(W.dtype)
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    scale = W.new_empty((len(plan.members), *W.shape[1:]))
    zero = torch.empty_like(scale)
    group_of = torch.empty(columns, dtype=torch.long, device=W.device)
    for g, members in enumerate(plan.members):
        group_of[members] = g
    groups = group_of.tolist()

    flat = W.view(columns, -1)  # the same memory: a column of every bit-width and row
    for start, end in _blocks(columns, params.block_size, plan.group_size):
        err = torch.empty_like(flat[start:end])
        for j in range(start, end):
            for g in plan.fits.get(j, ()):
                members = W[plan.members[g]] if kept is None else W[plan.members[g]] * kept[plan.members[g]]
                scale[g], zero[g] = fit(members.amin(0), members.amax(0), max_code, params.sym)
            g = groups[j]
            codes[j] = q = quantize(W[j], scale[g], zero[g], max_code)
            Q = dequantize(q, scale[g], zero[g]) if kept is None else dequantize(q, scale[g], zero[g]) * kept[j]
            err[j - start] = ((W[j] - Q) / U[j, j]).view(-1)  # E = (W - Q) / [H⁻¹]_jj
            flat[j + 1 : end].addr_(U[j, j + 1 : end], err[j - start], alpha=-1)  # W -= E [H⁻¹]_j, within the block
        flat[end:].addmm_(U[start:end, end:].T, err, alpha=-1)  # and beyond it
    if not W.isfinite().all():
        raise NotFinite("the corrections of GPTQ overflow: the Hessian is close to singular", hint="raise damp_percent")
    return codes, scale, zero


def _blocks(columns: int, block_size: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Cut the columns into blocks, none of which ends inside a group that started in it.

    So whenever a group starts, its columns carry all corrections, or get them within the block.
    """
    start = 0
    while start < columns:
        end = min(start + block_size, columns)
        whole = end - end % group_size
        if end < columns and whole > start:
            end = whole
        yield start, end
        start = end
