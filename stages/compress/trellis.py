"""`trellis`: turn a layer so that its weights look Gaussian, and code them as sequences on a trellis, column by column.

Weights are quantized by sequences of 256 at 1 to 4 bits each, in steps of an eighth, with less error than any grid has:
at 2 bits on a Gaussian source 0.073 of the variance with 2^12 states, where rounding each weight to the best four
values has 0.118 and no code can have less than 0.0625. `layerwise.kernels.trellis_code` says what the code is.

1. The weight is turned on both sides (`layerwise.kernels.hadamard`), and the Hessian with its inputs: no weight stands
   out, and one scale serves all.
2. Column by column, in sequences of 256 rows, it goes through the Viterbi algorithm (`viterbi.py`), and the columns
   still to come make up for the error, as in GPTQ (BlockLDLQ in QTIP, section 2.2, and QuIP#, arXiv:2402.04396,
   algorithm 5). QTIP's sequences are tiles of 16 x 16; with `columns: 16` they are here, too. But nothing makes up for
   an error within a tile, and what that loses grows with the correlation of the inputs. In a tile, an error counts as
   much as it costs after all later columns have made up for it.
3. The scale is fitted once more to the codes that were found, by least squares with the Hessian.

Left out: fine-tuning of scales and norms, and a tile's errors made up for within the tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, Field, field_validator

from layerwise.errors import NotFinite
from layerwise.stages.compress import MenuEntry, Task
from layerwise.stages.compress.precision import precision_recipe, working_dtype
from layerwise.stages.compress.recursion import DampPercent, check_layer, inverse_factor
from layerwise.stages.quantities import listed

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level

SPREAD = {1: 1.28, 1.5: 1.2, 2: 1.12, 3: 1.06, 4: 1.03}
"""By bits, the standard deviation of Gaussian weights, in the unit of the codebook, at which the code errs least; in
between, by interpolation. Measured with 2^12 states on 64 sequences of 256, in steps of 0.05."""

SHORTEST = 64
"""Weights of a sequence that a column alone makes up, at least. Shorter ones lose more to being circles than feedback
between neighbouring columns gains."""


class TrellisParams(MenuEntry):
    """Parameters of every method that codes on a trellis."""

    bits: Annotated[tuple[Annotated[float, Field(ge=1, le=4, multiple_of=0.125)], ...], listed(float)] = Field(
        min_length=1,
        validation_alias=AliasChoices("bits", "num_bits", "wbits"),
        description="bits per weight, one level for each; a number or a list of 1 to 4, in steps of an eighth",
    )
    state_bits: int = Field(
        12,
        ge=10,
        le=16,
        description="the trellis has two to this many states: one more takes twice the time",
    )
    columns: int | None = Field(
        None,
        ge=1,
        le=256,
        description="of a tile, whose 256 weights are coded as one sequence; if left out, one column, more where a "
        "column has fewer than 64 weights",
    )
    scales: Literal["weight", "row"] = Field("weight", description="one scale for the weight, or one for each row")
    seed: int = Field(0, ge=0, description="of the rotations; units that read one input share its rotation")

    @field_validator("bits")
    @classmethod
    def _distinct(cls, bits: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(bits)) != len(bits):
            raise ValueError("the same number of bits stands twice")
        return bits

    def level_names(self) -> list[str]:
        """`trellis-2b-L12`, `trellis-2.5b-L16-c8-rows`, ..."""
        others = {f"c{self.columns}": self.columns, "rows": self.scales == "row", f"seed{self.seed}": self.seed}
        suffixes = [*(text for text, given in others.items() if given), *self._name_suffixes()]
        return ["-".join([self.method, f"{bits:g}b", f"L{self.state_bits}", *suffixes]) for bits in self.bits]

    def nominal_bits(self) -> Sequence[float]:
        """As they stand in the menu."""
        return self.bits

    def tile_columns(self, rows: int) -> int:
        """Columns of a tile, of a weight with so many rows."""
        return self.columns or -(-SHORTEST // rows)

    def again(self, level: str) -> MenuEntry | None:
        """The same for the bits of that level."""
        entry = super().again(level)
        one = self.bits[self.level_names().index(level)]
        return None if entry is None else entry.model_copy(update={"bits": (one,)})

    def _name_suffixes(self) -> list[str]:
        return []


class Params(TrellisParams):
    """Bits, states, tiles, scales, damping."""

    method: Literal["trellis"] = "trellis"
    damp_percent: DampPercent = 0.01

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def _name_suffixes(self) -> list[str]:
        return [] if self.damp_percent == 0.01 else [f"damp{self.damp_percent:g}"]

    def fallback(self) -> MenuEntry:
        """The same without feedback."""
        from layerwise.stages.compress import trellis_nearest

        return trellis_nearest.Params.model_validate(
            {"method": "trellis_nearest", **self.model_dump(exclude={"method", "damp_percent"})}
        )


def trellis(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level per number of bits, from one factorisation.

    Args:
        task: one unit with its Hessian.
    Returns:
        levels in the order of `params.bits`.
    Raises:
        NotFinite: NaN or Inf in the weight or the Hessian, a Hessian that is zero (no token reached the layer) or that
            no damping makes positive definite, or weights too large for a float16 scale.
    Source: QTIP, arXiv:2406.11235.
    """
    weight, H = task.weights[task.unit], task.statistic(task.unit, "hessian")
    check_layer(weight, H)
    dtype = working_dtype(weight.device)
    H = H.detach().to(dtype, copy=True)
    dead = H.diagonal() == 0
    W = weight.detach().to(dtype, copy=True)
    W[:, dead] = 0  # inputs that are always zero: their weights are free
    return {task.unit: coded(W, H, params, keep=task.keep.get(task.unit), damp_percent=params.damp_percent)}


def coded(
    W: Tensor, H: Tensor | None, params: TrellisParams, *, keep: Tensor | None = None, damp_percent: float = 0
) -> list[Level]:
    """The levels of one weight.

    Args:
        W: (out, in), float64 or float32, finite; not changed.
        H: (in, in), the same, finite, `X Xᵀ` of the calibration inputs; None: all columns weigh alike.
        keep: (out, in) bool: weights that are not pruned. Pruned ones stay zero; so that they do, nothing is turned.
        damp_percent: of H; see `inverse_factor`.
    """
    from layerwise.kernels.hadamard import rotate, rotate_both
    from layerwise.stages.levels.trellis import trellis_level

    seed = params.seed if keep is None else None
    recipe: dict[str, Any] = {
        "method": params.method,
        "state_bits": params.state_bits,
        "columns": params.tile_columns(W.shape[0]),
        "seed": seed,
    } | precision_recipe(W.dtype)
    if seed is not None:
        W = rotate_both(W, seed)
    U = None
    if H is not None:
        if seed is not None:
            H = rotate(rotate(H, 2 * seed).T.contiguous(), 2 * seed)
        else:
            H = H.clone()
            H.diagonal()[H.diagonal() == 0] = 1
        U, used = inverse_factor(H, damp_percent)
        recipe |= {"damp_percent": damp_percent, "damp_percent_used": used}
    levels = []
    for name, bits in zip(params.level_names(), params.bits, strict=True):
        stream, scale = _encode(W, H, U, bits, params, keep)
        levels.append(
            trellis_level(name, recipe | {"bits": bits}, (W.shape[0], W.shape[1]), stream, scale=scale, keep=keep)
        )
    return levels


def _encode(
    W: Tensor, H: Tensor | None, U: Tensor | None, bits: float, params: TrellisParams, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The stream of a weight and its scales.

    Source: QTIP, arXiv:2406.11235, section 2.2 (BlockLDLQ); with UᵀU = H⁻¹ as in GPTQ, arXiv:2210.17323, algorithm 1.
    """
    import torch

    from layerwise.kernels.trellis_code import Tiles, pack, values
    from layerwise.stages.compress.viterbi import Trellis

    kept = torch.ones_like(W) if keep is None else keep.to(W.dtype)
    scale = _first_scale(W, kept, bits, params)
    step = scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # a row of zeros stays zero
    code, table = Trellis(bits, params.state_bits), values(params.state_bits, W.device)
    tiles = Tiles(W.shape[0], W.shape[1], params.tile_columns(W.shape[0]), bits, params.state_bits)
    target, C, streams = W.clone(), torch.empty_like(W), []
    for band in tiles.bands():
        here, after = slice(band.first, band.last), slice(band.last, None)
        weight = kept[:, here].clone()
        if U is not None:
            # What an error costs once later columns have made up for it: ‖(U_bb)⁻ᵀ e‖², here without mixed terms.
            eye = torch.eye(band.last - band.first, dtype=W.dtype, device=W.device)
            inverse = torch.linalg.solve_triangular(U[here, here], eye, upper=True)
            cost = inverse.square().sum(1)
            weight *= cost / cost.mean()
        x = band.cut(target[:, here] / step)
        states = code.encode(x, band.cut(weight))
        streams.append(pack(states, bits, params.state_bits).flatten())
        C[:, here] = band.join(table[states], W.shape[0])
        if U is not None:
            err = (target[:, here] - C[:, here] * step * kept[:, here]) @ inverse
            target[:, after] -= err @ U[here, after]
    if not target.isfinite().all():
        raise NotFinite("the corrections overflow: the Hessian is close to singular", hint="raise damp_percent")
    return torch.cat(streams), _refit(W, C * kept, H, scale)


def _first_scale(W: Tensor, kept: Tensor, bits: float, params: TrellisParams) -> Tensor:
    """By which the code is multiplied: (1,) or (out,)."""
    import numpy as np

    spread = float(np.interp(bits, list(SPREAD), list(SPREAD.values())))
    if params.scales == "row":
        return ((W * kept).square().sum(1) / kept.sum(1).clamp(min=1)).sqrt() / spread
    return ((W * kept).square().sum() / kept.sum().clamp(min=1)).sqrt()[None] / spread


def _refit(W: Tensor, C: Tensor, H: Tensor | None, scale: Tensor) -> Tensor:
    """The scale s of the least tr((W - s C) H (W - s C)ᵀ), of the weight or of each row."""
    CH = C if H is None else C @ H
    along, square = (W * CH).sum(1), (C * CH).sum(1)
    if len(scale) == 1:
        along, square = along.sum(0, keepdim=True), square.sum(0, keepdim=True)
    fitted = (along / square).where(square > 0, scale)
    return fitted.where(scale > 0, 0)
