"""`sparsegpt`: prune a layer column by column, and let the columns still to come make up for what goes.

Every sparsity and every number of bits of a unit comes from one factorisation of one Hessian and goes through one loop
over the columns, side by side (each M of an N:M pattern through one of its own). The mask of 128 columns is chosen when
the first of them is reached, that of an N:M group when the group is reached, so both see what earlier columns left.
Where rounding follows (`then`), a kept weight is rounded when its column has its turn, and the columns to come make up
for that as well. Grids are fitted to what is kept when their group is reached; of weights whose mask is chosen later,
to what would be kept by then.

Differences from the published program:
- Counts are exact (`pruning.py`); it prunes one weight more in every block.
- The linear algebra is in float64 (`precision.py`), and the factor of the inverse is computed as for `gptq`. If the
  factorisation fails, damping rises in steps of 0.01, and the recipe keeps what was used.
- Grids follow the corrections; it fits one to each row of the dense weight.

Convolutions in groups are a layer for each group.

Source: SparseGPT, arXiv:2301.00774, algorithm 1; section 3.5 for N:M and for rounding in the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from layerwise.errors import NotFinite
from layerwise.stages.compress import Task, magnitude
from layerwise.stages.compress.grid import dequantize, fit, quantize
from layerwise.stages.compress.precision import precision_recipe, working_dtype
from layerwise.stages.compress.pruning import Amount, PruningParams, Then, keep_pattern, least, lost, rounded_level
from layerwise.stages.compress.recursion import DampPercent, blocks, check_layer, inverse_factor, pass_on
from layerwise.stages.levels.index import spread_blocks

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level
    from layerwise.stages.models.network import Unit

MAX_ELEMENTS = 1 << 26
"""Weights, times levels, that are worked on at a time, unless one level has more: 512 MiB in float64. A mask is chosen
over all rows."""

FEW = 8
MOST_CHOICES = 256
"""Over the layer the masks of 8 columns are chosen at a time, of more where 256 choices would not be enough, for each
looks at all that is to come. On layers of the demo model the error at 50 % is 0.0236 by blocks of 128, 0.0165 over the
layer, and 0.0159 with a choice for every column."""


class Params(PruningParams):
    """How much is pruned, damping, blocks."""

    method: Literal["sparsegpt"] = "sparsegpt"
    damp_percent: DampPercent = 0.01
    block_size: int = Field(
        128, ge=1, description="columns whose mask is chosen at a time; N:M masks are chosen a group at a time"
    )
    compare: Literal["block", "layer"] = Field(
        "block",
        description="single weights: block: each `block_size` columns lose the same share, as published; layer: each "
        "few columns lose what is least of all that is still to come, which errs less and takes longer",
    )

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    @model_validator(mode="after")
    def _of_single_weights(self) -> Self:
        if self.compare == "layer" and (self.pattern or self.block is not None):
            raise ValueError("compare: layer is of single weights; give patterns and blocks an entry of their own")
        return self

    def _name_suffixes(self) -> list[str]:
        wide = ["layer"] if self.compare == "layer" else []
        damping = [] if self.damp_percent == 0.01 else [f"damp{self.damp_percent:g}"]
        return [*wide, *damping, *([] if self.block_size == 128 else [f"block{self.block_size}"])]

    def refuses(self, unit: Unit) -> str | None:
        """Blocks of a convolution in groups: each group is a layer, which blocks would reach over."""
        return None if self.block is None else super().refuses(unit)

    def fallback(self) -> magnitude.Params:
        """The same amounts by magnitude."""
        return magnitude.Params.model_validate(self.model_dump(include={"sparsity", "pattern", "block", "then"}))


def sparsegpt(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level for each amount, and for each number of bits of it, from one factorisation.

    Returns:
        levels in the order of `params.level_names`; values that are not rounded in the dtype of the checkpoint.
    Raises:
        NotFinite: NaN or Inf in the weight or the Hessian, a Hessian that is zero (no token reached the layer) or that
            no damping makes positive definite, or weights that become too large for how they are stored.
    """
    hessian = task.statistic(task.unit, "hessian")
    return {task.unit: pruned(task.weights[task.unit], hessian, params, keep=task.keep.get(task.unit))}


def pruned(weight: Tensor, hessian: Tensor, params: Params, *, keep: Tensor | None = None) -> list[Level]:
    """The levels of one weight.

    Args:
        weight: (out, in), any float dtype; not changed.
        hessian: (in, in), `X Xᵀ` of the calibration inputs; not changed. (groups, in, in) where equal parts of the rows
            have inputs of their own.
        keep: (out, in) bool, what an earlier pruning left.
    """
    import torch

    check_layer(weight, hessian)
    hessians = hessian if hessian.dim() == 3 else hessian[None]
    rows = len(weight) // len(hessians)
    parts = [
        _part(weight[first : first + rows], H, params, None if keep is None else keep[first : first + rows], first)
        for first, H in zip(range(0, len(weight), rows), hessians, strict=True)
    ]
    used = max(damped for _, damped in parts)
    dtype = working_dtype(weight.device)
    recipe = {
        "damp_percent": params.damp_percent,
        "damp_percent_used": used,
        "block_size": params.block_size,
        "compare": params.compare,
    }
    levels = []
    named = zip(params.level_names(), _variants(params, weight.shape[1]), strict=True)
    for number, (name, variant) in enumerate(named):
        made = [layers[number] for layers, _ in parts]
        said: dict[str, Any] = {"method": params.method, **variant.amount.recipe, **recipe, **precision_recipe(dtype)}
        kept = torch.cat([layer.keep for layer in made], 1).T
        values = torch.cat([layer.values for layer in made], 1).T
        if variant.bits is None:
            levels.append(_values_level(name, said, values.to(weight.dtype), kept))
            continue
        assert params.then is not None
        scale, zero = (torch.cat(part, 1).T for part in zip(*(layer.grids for layer in made), strict=True))
        levels.append(rounded_level(name, said, values, params.then, variant.bits, keep=kept, scale=scale, zero=zero))
    return levels


def _values_level(name: str, recipe: dict[str, Any], values: Tensor, keep: Tensor) -> Level:
    from layerwise.stages.levels.mask import mask_level

    if not values[keep].isfinite().all():
        raise NotFinite(f"level {name}: what is kept becomes too large for {str(values.dtype)[6:]}")
    return mask_level(name, recipe, values, keep)


@dataclass(frozen=True)
class _Variant:
    """One level: how much goes, and how wide the codes of the rest are, None for values as they are.

    Args:
        step: columns whose mask is chosen at a time.
        cell: rows and columns of what is compared with all that is still to come; None where nothing is.
    """

    amount: Amount
    bits: int | None
    step: int
    cell: tuple[int, int] | None


def _variants(params: Params, columns: int) -> list[_Variant]:
    widths: Sequence[int | None] = [None] if params.then is None else params.then.bits
    steps = [_step(amount, columns, params) for amount in params.amounts]
    return [_Variant(amount, bits, *steps[a]) for a, amount in enumerate(params.amounts) for bits in widths]


def _step(amount: Amount, columns: int, params: Params) -> tuple[int, tuple[int, int] | None]:
    """`step` and `cell` of a variant: of N:M a group; of blocks as many whole ones as `block_size` holds, one at least;
    of single weights a few columns if they are compared over the layer, else `block_size`."""
    if amount.pattern is not None:
        return amount.pattern[1], None
    if amount.block is not None:
        return max(amount.block[1], params.block_size - params.block_size % amount.block[1]), amount.block
    if params.compare == "layer":
        return max(FEW, -(-columns // MOST_CHOICES)), (1, 1)
    return params.block_size, None


@dataclass(frozen=True)
class _Layer:
    """What was made of rows with one Hessian, as one level; columns stand first.

    Args:
        values: (in, rows), what is kept, float64, or its codes, uint8.
        keep: (in, rows) bool.
        grids: scale and zero point, each (groups, rows); none without rounding.
    """

    values: Tensor
    keep: Tensor
    grids: tuple[Tensor, ...]


def _part(
    weight: Tensor, hessian: Tensor, params: Params, keep: Tensor | None, first: int
) -> tuple[list[_Layer], float]:
    """Prune rows with one Hessian; gives their levels, and the damping that was used.

    Args:
        weight, hessian, keep: of these rows, as of `pruned`.
        first: how many rows stand above them.
    """
    dtype = working_dtype(weight.device)
    W, H = weight.detach().to(dtype).T, hessian.detach().to(weight.device, dtype, copy=True)
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1  # inputs that are always zero: their weights are free, and go first
    W = W * ~dead[:, None]
    U, used = inverse_factor(H, params.damp_percent)
    variants = _variants(params, len(W))
    at_a_time = max(1, MAX_ELEMENTS // W.numel())
    layers = []

    def chosen_at(number: int) -> tuple[int, bool]:
        return variants[number].step, variants[number].cell is None

    for _, together in groupby(sorted(range(len(variants)), key=chosen_at), key=chosen_at):
        numbers = list(together)
        for start in range(0, len(numbers), at_a_time):
            some = numbers[start : start + at_a_time]
            kept = None if keep is None else keep.T
            made = _Pass(W, U, [variants[number] for number in some], params, kept, first).run()
            layers += list(zip(some, made, strict=True))
    return [layer for _, layer in sorted(layers, key=lambda pair: pair[0])], used


class _Pass:
    """One loop over the columns, for levels whose masks are chosen at the same columns side by side.

    Args:
        weight: (in, rows).
        U: (in, in), from `inverse_factor`.
        before: (in, rows) bool, what an earlier pruning left.
        first: rows of the unit above these.
    """

    def __init__(
        self,
        weight: Tensor,
        U: Tensor,
        variants: Sequence[_Variant],
        params: Params,
        before: Tensor | None,
        first: int,
    ) -> None:
        import torch

        self.U, self.variants, self.then, self.before, self.first = U, variants, params.then, before, first
        self.columns, self.rows = weight.shape
        self.step = variants[0].step
        self.W = weight[:, None].repeat(1, len(variants), 1)
        self.keep = torch.ones(self.W.shape, dtype=torch.bool, device=weight.device)
        self.costs = U.diagonal().square()  # an error of e in column j costs e² / U_jj²  (eq. 3)
        self.size = 1
        if params.then is not None:
            self.size = params.then.columns_per_group(self.columns)
            shape = (-(-self.columns // self.size), len(variants), self.rows)
            self.scale, self.zero = self.W.new_empty(shape), self.W.new_empty(shape)
            self.codes = torch.empty(self.W.shape, dtype=torch.uint8, device=weight.device)
            codes = [[2 ** (variant.bits or 0) - 1] for variant in variants]
            self.max_code = torch.tensor(codes, dtype=weight.dtype, device=weight.device)
        self.cell = variants[0].cell
        if self.cell is not None:
            self.going = [self._cells(variant.amount.share) for variant in variants]  # yet to go
            self.factors = _diagonal_blocks(U, self.cell[1])
        self.groups = (self.step, self.size)
        self.cuts = list(blocks(self.columns, params.block_size, self.groups))

    def run(self) -> list[_Layer]:
        """Go through the columns; gives what became of each variant."""
        pass_on(self.W.view(self.columns, -1), self.U, self._column, self.cuts, self.groups)
        made = []
        for v in range(len(self.variants)):
            grids = () if self.then is None else (self.scale[:, v], self.zero[:, v])
            made.append(_Layer((self.W if self.then is None else self.codes)[:, v], self.keep[:, v], grids))
        return made

    def _column(self, j: int) -> Tensor:
        """Choose what must be chosen, settle column j, and give its error."""
        if j % self.step == 0:
            self._choose(j, min(j + self.step, self.columns))
        if self.then is not None and j % self.size == 0:
            self._fit(j, min(j + self.size, self.columns), self.then)
        w, keep = self.W[j], self.keep[j]
        Q = w * keep
        if self.then is not None:
            scale, zero = self.scale[j // self.size], self.zero[j // self.size]
            self.codes[j] = q = quantize(Q, scale, zero, self.max_code)
            Q = dequantize(q, scale, zero) * keep
        E = (w - Q) / self.U[j, j]
        self.W[j] = Q
        return E.view(-1)

    def _choose(self, start: int, end: int) -> None:
        """The masks of some columns, of every variant."""
        for v in range(len(self.variants)):
            if self.cell is None:
                self.keep[start:end, v] = self._chosen(start, end, v)
                continue
            kept = self._kept_cells(start, end, v)
            self.going[v] -= int((~kept).sum())
            self.keep[start:end, v] = self._of_cells(kept, start, end)

    def _chosen(self, start: int, end: int, v: int) -> Tensor:
        """What one variant keeps of some columns as they are now, (columns, rows) bool.

        Of a share, all columns so far have lost as many weights as their part of all is, rounded.
        """
        amount = self.variants[v].amount
        if self.cell is not None:
            return self._of_cells(self._kept_cells(start, end, v), start, end)
        before = None if self.before is None else self.before[start:end]
        saliency = self.W[start:end, v].square() / self.costs[start:end, None]  # (eq. 3)
        if before is not None:
            saliency = saliency.where(before, -1)
        if amount.pattern is None:
            keep = ~least(saliency, self._gone(end, amount.share) - self._gone(start, amount.share))
        else:
            keep = keep_pattern(saliency.T, amount.pattern).T
        return keep if before is None else keep & before

    def _cells(self, share: float) -> int:
        """How many of what is compared go in all."""
        assert self.cell is not None
        if self.cell == (1, 1):
            return self._gone(self.columns, share)
        return lost(-(-self.rows // self.cell[0]) * -(-self.columns // self.cell[1]), share)

    def _of_cells(self, kept: Tensor, start: int, end: int) -> Tensor:
        assert self.cell is not None
        keep = spread_blocks(kept, self.cell[::-1], (end - start, self.rows))
        return keep if self.before is None else keep & self.before[start:end]

    def _kept_cells(self, start: int, end: int, v: int) -> Tensor:
        """Of the cells in some columns those that are kept, (cells along the columns, cells along the rows) bool.

        They are compared with all that are still to come: as many go as are yet to go. Without the columns B a row w
        errs by ‖w_B U_BB⁻¹‖² once the columns behind have made up for it, which for one column is eq. 3, and for
        several the second-order objective of LPViT, arXiv:2407.02068, of a layer's own output. What a block costs the
        hardware is the same for all, also for those at the ends.
        """
        import torch
        from torch.nn.functional import pad

        assert self.cell is not None
        tall, wide = self.cell
        W = self.W[start:, v]
        if self.before is not None:
            W = W * self.before[start:]  # what is gone already costs nothing
        if wide == 1:
            errors = W.square() / self.costs[start:, None]
        else:
            W = pad(W, (0, 0, 0, -(self.columns - start) % wide)).unflatten(0, (-1, wide))
            errors = torch.linalg.solve_triangular(self.factors[start // wide :].mT, W, upper=False).square().sum(1)
        errors = pad(errors, (0, -self.rows % tall)).unflatten(1, (-1, tall)).sum(2)
        return ~least(errors, self.going[v])[: -(-(end - start) // wide)]

    def _gone(self, columns: int, share: float) -> int:
        """Weights that are pruned in so many columns from the first.

        What all rows lose is counted over the rows of the whole unit, so that its parts add up.
        """
        above, with_these = (lost(self.columns * rows, share) for rows in (self.first, self.first + self.rows))
        return round((with_these - above) * columns / self.columns)

    def _fit(self, start: int, end: int, then: Then) -> None:
        """The grids of a group of columns, of every variant."""
        from layerwise.stages.compress.grid_search import search

        chosen = min(end, start - start % self.step + self.step)
        importance = 1 / self.costs[start:end]
        for v, variant in enumerate(self.variants):
            keep = self.keep[start:end, v].clone()
            if chosen < end:
                keep[chosen - start :] = self._chosen(chosen, end, v)
            members, bits = self.W[start:end, v] * keep, variant.bits
            assert bits is not None
            if then.grid == "minmax":
                grids = fit(members.amin(0), members.amax(0), 2**bits - 1, then.sym)
            else:
                grids = search(members, bits, sym=then.sym, importance=importance)
            self.scale[start // self.size, v], self.zero[start // self.size, v] = grids


def _diagonal_blocks(U: Tensor, wide: int) -> Tensor:
    """(blocks, wide, wide): those of U along its diagonal, the last filled up with the identity."""
    import torch

    found = torch.eye(wide, dtype=U.dtype, device=U.device).repeat(-(-len(U) // wide), 1, 1)
    for number, block in enumerate(found):
        own = U[number * wide : (number + 1) * wide, number * wide : (number + 1) * wide]
        block[: len(own), : len(own)] = own
    return found
