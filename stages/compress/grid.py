"""Uniform grids: integer codes, and for each group of a row one scale and, if asymmetric, one zero point.

Here is what rounding to nearest and GPTQ share: parameters, fitting by minimum and maximum, rounding, and the level
made of it. A weight is (code - zero) · scale. Scales are rounded to float16 *before* anything is quantized, so that a
level decodes to exactly the values that the method saw. Everything is computed in the dtype of what comes in; the
methods use float64, where two ways of ordering the same sum practically never round to different codes.

Smaller ranges than minimum to maximum: `grid_search`. Left out: non-uniform grids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AliasChoices, Field, field_validator

from layerwise.errors import NotFinite
from layerwise.stages.compress import MenuEntry
from layerwise.stages.contract import Params
from layerwise.stages.levels.scales import WHOLE, Scales, nearest_float16, quantized_scales
from layerwise.stages.quantities import listed

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level


class Grids(Params):
    """Uniform grids: how wide their codes are, and which weights share one."""

    bits: Annotated[tuple[Annotated[int, Field(ge=2, le=8)], ...], listed(int)] = Field(
        min_length=1,
        validation_alias=AliasChoices("bits", "num_bits", "wbits"),
        description="bits per weight, one level for each; a number or a list of 2 to 8",
    )
    group_size: int = Field(128, ge=-1, description="input weights that share one scale; -1 for the whole row")
    sym: bool = Field(
        True,
        validation_alias=AliasChoices("sym", "symmetric"),
        description="the grid is centred on zero; otherwise a zero point is stored per group",
    )

    @field_validator("bits")
    @classmethod
    def _distinct(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(bits)) != len(bits):
            raise ValueError("the same number of bits stands twice")
        return bits

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, group_size: int) -> int:
        if group_size == 0:
            raise ValueError("must be at least 1, or -1 for the whole row")
        return group_size

    def grid_names(self) -> list[str]:
        """`3b-g128`, `4b-row-asym`, ..., one for each number of bits."""
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        rest = [*([] if self.sym else ["asym"]), *self._name_suffixes()]
        return ["-".join([f"{bits}b", group, *rest]) for bits in self.bits]

    def _name_suffixes(self) -> list[str]:
        """What else tells apart the levels of two menu entries of one method."""
        return []

    def columns_per_group(self, columns: int) -> int:
        """Columns that share one scale, of a unit with so many; the last group may be shorter."""
        return columns if self.group_size == -1 else min(self.group_size, columns)


class GridParams(Grids, MenuEntry):
    """Parameters of every method that rounds to a uniform grid."""

    def level_names(self) -> list[str]:
        """`gptq-3b-g128`, `rtn-4b-row-asym`, ..."""
        return [f"{self.method}-{name}" for name in self.grid_names()]

    def nominal_bits(self) -> tuple[int, ...]:
        """As they stand in the menu."""
        return self.bits

    def again(self, level: str) -> MenuEntry | None:
        """The same for the bits of that level."""
        entry = super().again(level)
        one = self.bits[self.level_names().index(level)]
        return None if entry is None else entry.model_copy(update={"bits": (one,)})


class StoredGridParams(GridParams):
    """How grids are laid over a weight and stored; for methods that take any grid."""

    group_along: Literal["inputs", "outputs"] = Field(
        "inputs",
        description="weights that share one scale: neighbours in a row of the weight, which belong to one output, or "
        "in a column, which belong to one input",
    )
    scale_bits: Literal[4, 5, 6, 7, 8, 16] = Field(
        16, description="of each group's scale; below 16 it is quantized, under a float16 scale of several groups"
    )
    scale_group: int = Field(
        -1, ge=-1, description="groups under one float16 scale, -1 for all of a row; only with `scale_bits` below 16"
    )

    @field_validator("scale_group")
    @classmethod
    def _some_groups(cls, scale_group: int) -> int:
        if scale_group == 0:
            raise ValueError("must be at least 1, or -1 for all groups of a row")
        return scale_group

    @property
    def along_outputs(self) -> bool:
        """Whether a line of groups is a column of the weight."""
        return self.group_along == "outputs"

    def _name_suffixes(self) -> list[str]:
        above = "" if self.scale_group == -1 else f"x{self.scale_group}"
        scales = [] if self.scale_bits == WHOLE else [f"s{self.scale_bits}{above}"]
        return [*(["out"] if self.along_outputs else []), *scales]

    def grid_recipe(self, bits: int) -> dict[str, Any]:
        """What every level says of its grid."""
        recipe: dict[str, Any] = {"method": self.method, "bits": bits, "group_size": self.group_size, "sym": self.sym}
        return recipe | ({"group_along": self.group_along} if self.along_outputs else {})

    def stored(self, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor | Scales, Tensor, Tensor]:
        """Fitted grids as they will be stored.

        Args:
            scale, zero: (lines, groups).
        Returns:
            the scales to store, their values, and zero points for these, both (lines, groups).
        """
        if self.scale_bits == WHOLE:
            return scale, scale, zero
        scales = quantized_scales(scale, self.scale_bits, self.scale_group, signed=bool((scale < 0).any()))
        values = scales.values()
        return scales, values, zero if self.sym else clamp_codes((zero * scale / values).round(), 2**bits - 1)


def fit(low: Tensor, high: Tensor, max_code: Tensor | int, sym: bool) -> tuple[Tensor, Tensor]:
    """Fit one grid to each range of weights.

    Symmetric: scale = max|w| / ((2^b - 1) / 2), zero = 2^(b-1). Asymmetric: the range is widened to contain 0, scale =
    (high - low) / (2^b - 1), zero = -low / scale, rounded and clamped.

    Args:
        low, high: least and greatest weight of each group, any shape.
        max_code: 2^b - 1; several bit-widths as a tensor that broadcasts against `low`.
        sym: centred on zero.
    Returns:
        scale, with values that float16 holds (Inf where it does not), and zero point, both in the dtype of `low`.
    Source: GPTQ, arXiv:2210.17323, section 4; formulas as in compressed-tensors 0.20.
    """
    if sym:
        scale = nearest_float16(low.abs().maximum(high.abs()) / (max_code / 2))
        return scale, ((max_code + 1) / 2) + scale.new_zeros(scale.shape)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = nearest_float16((high - low) / max_code)
    return scale, clamp_codes((-low / scale).round(), max_code)


def quantize(W: Tensor, scale: Tensor, zero: Tensor, max_code: Tensor | int) -> Tensor:
    """Codes of the nearest grid points, in the dtype of `W`; weights beyond the ends of a grid get its end."""
    return clamp_codes((W / scale).round() + zero, max_code)


def clamp_codes(codes: Tensor, max_code: Tensor | int) -> Tensor:
    """Bring codes into 0 .. max_code."""
    codes = codes.clamp(min=0)
    return codes.clamp(max=max_code) if isinstance(max_code, int) else codes.minimum(max_code)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weights that codes stand for; what `Level.decode` does, for grids that are not a level yet."""
    return (codes - zero) * scale


def grid_or_masked(
    name: str,
    recipe: dict[str, Any],
    codes: Tensor,
    *,
    scale: Tensor | Scales,
    zero: Tensor,
    group: Tensor | None = None,
    keep: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Level:
    """Encode codes and grids as a level: as `grid_level`, or with a mask where an earlier pruning left one.

    Args:
        name, recipe, codes, scale, zero, group, input_scale: as of `layerwise.stages.levels.grid.grid_level`.
        keep: (out, in) bool.
    Raises:
        NotFinite: a scale is too large for float16.
    """
    from layerwise.stages.levels.grid import grid_level
    from layerwise.stages.levels.masked_grid import masked_grid_level

    if keep is None:
        return grid_level(name, recipe, codes, scale=scale, zero=zero, group=group, input_scale=input_scale)
    return masked_grid_level(
        name, recipe, codes, keep=keep, scale=scale, zero=zero, group=group, input_scale=input_scale
    )


def check_finite(what: str, tensor: Tensor) -> None:
    """Raise NotFinite if there is a NaN or Inf."""
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise NotFinite(f"the {what} has {bad} NaN or Inf among its {tensor.numel()} values")
