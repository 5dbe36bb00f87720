"""`gptq`: quantize a layer column by column, and let the columns still to come make up for each error.

All bit-widths of a unit come from one factorisation and go through one loop over the columns, side by side, because its
many small steps cost less together than one after another. Everything is in the precision of `precision.py`, float64 as
a rule. Times: `benchmarks/results/quantization.md`.

Three differences from the published code, none in the method:
- The factor U with UᵀU = H⁻¹ comes from one Cholesky factorisation, of H with rows and columns reversed, and one
  triangular inverse; no H⁻¹ is formed and factored again.
- Without static order, a group's grid is fitted to weights that carry *every* earlier correction. The published code
  leaves out those of the current block of 128 columns. By minimum and maximum that is now and then the better of the
  two, where groups are small; with the grids that are the default here it never was.
- If the factorisation fails, damping rises in steps of 0.01, as GPTQModel does it; the recipe keeps what was used.

The defaults (static order, grids by Hessian-weighted search, symmetric) are those of
`benchmarks/results/quantization.md`: with grids that are searched for, zero points are not worth their bytes there.
Groups of 16 under 4-bit scales take hardly more bytes than groups of 64 under float16 scales and err less (on the demo
model 2.35 and 2.25 bits, KL 0.289 and 0.405), but fewer exports can write them.

Inputs of the already compressed block: `gptq_sequential`; of all blocks before: `apply` with `remake`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from layerwise.stages.compress import Task, rtn
from layerwise.stages.compress.grid import StoredGridParams, dequantize, fit, grid_or_masked, quantize
from layerwise.stages.compress.precision import precision_recipe, working_dtype
from layerwise.stages.compress.recursion import DampPercent, blocks, check_layer, inverse_factor, pass_on
from layerwise.stages.levels.scales import WHOLE, Scales

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level
    from layerwise.stages.models.network import Unit

MAX_ELEMENTS = 1 << 24
"""Weights, times bit-widths, that are worked on at a time: 128 MiB in float64. Rows do not depend on each other."""

ON_GPU = 16
"""Times as many on a GPU, where a column takes as long for a few rows as for thousands."""


class Params(StoredGridParams):
    """Grid, damping, order."""

    method: Literal["gptq"] = "gptq"
    damp_percent: DampPercent = 0.01
    desc_act: bool | Literal["static"] = Field(
        "static",
        validation_alias=AliasChoices("desc_act", "act_order"),
        description="static: columns with large activations first, but groups of neighbours, whose grids are fitted "
        "beforehand; true: the same order, groups formed in it, and stored; false: columns in their order",
    )
    grid: Literal["minmax", "mse", "hessian"] = Field(
        "hessian",
        description="minmax: from the least to the greatest weight of a group; mse: the range of least squared error; "
        "hessian: the same with each column weighed by what an error in it costs",
    )
    block_size: int = Field(
        128, ge=1, description="columns between updates of all later ones; changes the speed, not the result"
    )

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    @model_validator(mode="after")
    def _known_beforehand(self) -> Self:
        if self.scale_bits != WHOLE and self.desc_act != "static":
            raise ValueError("scale_bits below 16 need grids that are fitted beforehand: desc_act: static")
        return self

    def _name_suffixes(self) -> list[str]:
        order = {False: ["inorder"], True: ["act"], "static": []}[self.desc_act]
        damping = [] if self.damp_percent == 0.01 else [f"damp{self.damp_percent:g}"]
        return [*super()._name_suffixes(), *order, *([] if self.grid == "hessian" else [self.grid]), *damping]

    def refuses(self, unit: Unit) -> str | None:
        """Of a convolution in groups each group is a layer of its own, so grids must not reach over several."""
        stored_apart = self.desc_act is not True and self.scale_bits == WHOLE and not self.along_outputs
        return None if stored_apart else super().refuses(unit)

    def fallback(self) -> rtn.Params:
        """Rounding to nearest, on the same grid."""
        shared = self.model_dump(include=set(StoredGridParams.model_fields) - {"method"})
        return rtn.Params.model_validate(shared | {"grid": "minmax" if self.grid == "minmax" else "mse"})


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
        hessian: (in, in), `X Xᵀ` of the calibration inputs, any float dtype; not changed. (groups, in, in) where equal
            parts of the rows have inputs of their own; each is then a layer by itself.
        keep: (out, in) bool: weights that are not pruned. Pruned ones stay zero, and what that costs is made up for
            by the columns to come, as SparseGPT does it (arXiv:2301.00774, algorithm 1).
    """
    import torch

    check_layer(weight, hessian)
    hessians = hessian if hessian.dim() == 3 else hessian[None]
    keeps = [None] * len(hessians) if keep is None else list(keep.chunk(len(hessians)))
    parts = zip(weight.chunk(len(hessians)), hessians, keeps, strict=True)
    layers = [_layer(W, H, params, kept) for W, H, kept in parts]
    dtype = working_dtype(weight.device)
    recipe = {
        "desc_act": params.desc_act,
        "grid": params.grid,
        "damp_percent": params.damp_percent,
        "damp_percent_used": max(layer.damp_percent_used for layer in layers),
        "block_size": params.block_size,
    } | precision_recipe(dtype)
    return [
        grid_or_masked(
            name,
            params.grid_recipe(bits) | recipe,
            torch.cat([layer.codes[b] for layer in layers]),
            scale=_joined([layer.scales[b] for layer in layers]),
            zero=torch.cat([layer.zeros[b] for layer in layers]),
            group=layers[0].stored_groups,
            keep=keep,
        )
        for b, (name, bits) in enumerate(zip(params.level_names(), params.bits, strict=True))
    ]


@dataclass(frozen=True)
class _Layer:
    """What was made of rows with one Hessian: by bit-width codes (out, in), scales and zero points as of a level."""

    codes: list[Tensor]
    scales: list[Tensor | Scales]
    zeros: list[Tensor]
    stored_groups: Tensor | None
    damp_percent_used: float


def _layer(weight: Tensor, hessian: Tensor, params: Params, keep: Tensor | None) -> _Layer:
    """Quantize rows with one Hessian; arguments as of `quantized`."""
    dtype = working_dtype(weight.device)
    W, H = weight.detach().to(dtype).T.clone(), hessian.detach().to(weight.device, dtype, copy=True)
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1  # inputs that are always zero: their weights are free, and become zero
    W[dead] = 0

    plan = _plan(H, len(weight), params)
    U, damp_percent_used = inverse_factor(H[plan.order][:, plan.order], params.damp_percent)
    made = _quantize_rows(W[plan.order], U, plan, params, None if keep is None else keep.T[plan.order])
    back = plan.order.argsort()
    codes = [made.codes[back, b].T for b in range(len(params.bits))]
    return _Layer(codes, made.scales, made.zeros, plan.stored_groups, damp_percent_used)


def _joined(scales: list[Tensor | Scales]) -> Tensor | Scales:
    """The scales of all layers, one below the other; quantized ones are those of a single layer."""
    import torch

    whole = [scale for scale in scales if not isinstance(scale, Scales)]
    return torch.cat(whole) if len(whole) == len(scales) else scales[0]


@dataclass(frozen=True)
class _Plan:
    """In which order columns are quantized, and which of them share grids.

    Along outputs a column shares its grids with no other, and has several of them.

    Args:
        order: (in,), the columns.
        members: for each group, the positions in that order that it covers.
        fits: by position, the groups whose grids are fitted just before it; empty if all are fitted beforehand.
        group_size: what blocks must not cut a group by; 1 if all grids are fitted beforehand.
        stored_groups: (in,), the group of each column, if a reader cannot know it.
        rows: along outputs, those that share a grid; else None.
    """

    order: Tensor
    members: list[slice | Tensor]
    fits: dict[int, list[int]]
    group_size: int
    stored_groups: Tensor | None = None
    rows: int | None = None

    @property
    def beforehand(self) -> bool:
        """Whether all grids are fitted to the weights as they were."""
        return not self.fits


def _plan(H: Tensor, rows: int, params: Params) -> _Plan:
    import torch

    columns = len(H)
    in_order = torch.arange(columns, device=H.device)
    order = in_order if params.desc_act is False else H.diagonal().argsort(descending=True, stable=True)
    if params.along_outputs:
        single: list[slice | Tensor] = [slice(j, j + 1) for j in range(columns)]
        fits = {} if params.desc_act == "static" else {j: [j] for j in range(columns)}
        return _Plan(order, single, fits, 1, rows=params.columns_per_group(rows))
    size = params.columns_per_group(columns)
    starts = range(0, columns, size)
    groups = [slice(start, min(start + size, columns)) for start in starts]
    position = order.argsort()
    if params.desc_act == "static":
        return _Plan(order, [position[group] for group in groups], {}, 1)
    # One group needs no index: every column is in it.
    index = position // size if params.desc_act is True and len(groups) > 1 else None
    return _Plan(order, list(groups), {start: [g] for g, start in enumerate(starts)}, size, index)


@dataclass(frozen=True)
class _Made:
    """Codes (in, bit-widths, out) uint8 in the plan's order, and by bit-width scales and zero points as of a level."""

    codes: Tensor
    scales: list[Tensor | Scales]
    zeros: list[Tensor]


def _quantize_rows(W: Tensor, U: Tensor, plan: _Plan, params: Params, keep: Tensor | None) -> _Made:
    """`_quantize`, for as many rows of the weight at a time as memory allows; they do not depend on each other.

    Along outputs those that share a grid stay together.
    """
    import torch

    grids = _Grids(W.shape[1], U, plan, params)
    if plan.beforehand:
        grids.fit_all(W if keep is None else W * keep)
    elements = MAX_ELEMENTS * (ON_GPU if W.is_cuda else 1)
    rows = max(1, elements // (len(W) * len(params.bits)))
    if plan.rows is not None:
        rows = max(plan.rows, rows - rows % plan.rows)
    codes = [
        _quantize(W, U, plan, params, keep, grids, slice(start, start + rows)) for start in range(0, W.shape[1], rows)
    ]
    lines = [grids.lines(b) for b in range(len(params.bits))]
    scales = grids.stored or [scale for scale, _ in lines]
    return _Made(torch.cat(codes, dim=2), scales, [zero for _, zero in lines])


class _Grids:
    """The grids of all groups, of every bit-width.

    Args:
        rows: of the weight.
        U, plan, params: as of `_quantize`.
    Attributes:
        scale, zero: (groups, bit-widths, out).
        stored: by bit-width, if they are stored as anything else.
    """

    def __init__(self, rows: int, U: Tensor, plan: _Plan, params: Params) -> None:
        self._plan, self._params = plan, params
        self._importance = U.diagonal() ** -2  # eq. 2: what an error costs once the columns to come made up for it
        self.scale = U.new_empty((len(plan.members), len(params.bits), rows))
        self.zero = U.new_empty(self.scale.shape)
        self.stored: list[Tensor | Scales] = []

    def fit(self, g: int, members: Tensor, rows: slice) -> None:
        """Fit those of one group to its weights, (size, bit-widths, some rows)."""
        for b, bits in enumerate(self._params.bits):
            found = self._fitted(members[:, b], bits, self._importance[self._plan.members[g]])
            self.scale[g, b, rows], self.zero[g, b, rows] = found

    def fit_all(self, W: Tensor) -> None:
        """Fit all to the weights (in, out), and make of them what will be stored."""
        for g, part in enumerate(self._plan.members):
            self.fit(g, W[part][:, None].expand(-1, len(self._params.bits), -1), slice(None))
        if self._params.scale_bits == WHOLE:
            return
        for b, bits in enumerate(self._params.bits):
            scales, scale, zero = self._params.stored(*self.lines(b), bits)
            self.stored.append(scales)
            self.scale[:, b], self.zero[:, b] = self._of_lines(scale), self._of_lines(zero)

    def lines(self, b: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of one bit-width as a level has them, (lines, groups)."""
        if self._plan.rows is None:
            return self.scale[:, b].T, self.zero[:, b].T
        back = self._plan.order.argsort()
        return self.scale[back, b, :: self._plan.rows], self.zero[back, b, :: self._plan.rows]

    def _of_lines(self, part: Tensor) -> Tensor:
        """Undo `lines`, for one of the two."""
        if self._plan.rows is None:
            return part.T
        return part[self._plan.order].repeat_interleave(self._plan.rows, 1)[:, : self.scale.shape[2]]

    def _fitted(self, members: Tensor, bits: int, importance: Tensor) -> tuple[Tensor, Tensor]:
        from torch.nn.functional import pad

        from layerwise.stages.compress.grid_search import search

        params, rows = self._params, members.shape[1]
        shared = self._plan.rows
        if shared is not None:  # one column: its groups are runs of rows, filled up with zeros, which change no grid
            members = pad(members, (0, -rows % shared)).view(-1, shared).T
        if params.grid == "minmax":
            scale, zero = fit(members.amin(0), members.amax(0), 2**bits - 1, params.sym)
        else:
            weigh = importance if params.grid == "hessian" and shared is None else None
            scale, zero = search(members, bits, sym=params.sym, importance=weigh)
        if shared is None:
            return scale, zero
        return scale.repeat_interleave(shared)[:rows], zero.repeat_interleave(shared)[:rows]


def _quantize(
    weight: Tensor, U: Tensor, plan: _Plan, params: Params, keep: Tensor | None, grids: _Grids, rows: slice
) -> Tensor:
    """GPTQ's recursion, for all bit-widths side by side.

    Columns of the weight are rows here, so that each is contiguous.

    Args:
        weight: (in, out), columns in the plan's order.
        U: (in, in), from `inverse_factor`, in the same order.
        keep: (in, out) bool in the same order: weights that are not pruned.
        grids: those that were not fitted beforehand are fitted here.
        rows: of the weight, which are worked on.
    Returns:
        codes (in, bit-widths, rows) uint8.
    Source: GPTQ, arXiv:2210.17323, algorithm 1. Its outer loop is over blocks, `err` is its E, U its (H⁻¹) after the
        Cholesky factorisation.
    """
    import torch

    columns = len(weight)
    max_code = torch.tensor([[2**bits - 1] for bits in params.bits], dtype=weight.dtype, device=weight.device)
    W = weight[:, None, rows].repeat(1, len(params.bits), 1)
    kept = None if keep is None else keep[:, None, rows].to(W.dtype)
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    group_of = torch.empty(columns, dtype=torch.long, device=W.device)
    for g, members in enumerate(plan.members):
        group_of[members] = g
    groups = group_of.tolist()
    scale, zero = grids.scale[..., rows], grids.zero[..., rows]
    flat = W.view(columns, -1)  # the same memory: a column of every bit-width and row

    def column(j: int) -> Tensor:
        for g in plan.fits.get(j, ()):
            members = plan.members[g]
            grids.fit(g, W[members] if kept is None else W[members] * kept[members], rows)
        g = groups[j]
        codes[j] = q = quantize(W[j], scale[g], zero[g], max_code)
        Q = dequantize(q, scale[g], zero[g]) if kept is None else dequantize(q, scale[g], zero[g]) * kept[j]
        return ((W[j] - Q) / U[j, j]).view(-1)  # E = (W - Q) / [H⁻¹]_jj

    cuts = list(blocks(columns, params.block_size, [plan.group_size]))
    pass_on(flat, U, column, cuts, [plan.group_size])
    return codes
