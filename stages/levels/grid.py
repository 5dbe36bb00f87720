"""`grid`: integer codes on a uniform grid, one scale (and zero point) for each group of a line.

A line is a row of the weight, (in,), or, grouped along outputs, a column of it, (out,).

    codes        int32 (lines, ceil(length · bits / 32))       packed, layerwise.kernels.packing
    scale        float16 (lines, groups)
    zero         int32 (1, ceil(lines · groups · bits / 32))   packed like codes, as one stream; absent if symmetric,
                                                               then 2^(bits-1)
    g_idx        int32 (in,)                                   group of each column; absent if columns are grouped in
                                                               their order
    input_scale  float16 (in,)                                 what an input is multiplied by before the product; absent
                                                               if by nothing

With `scale_bits` below 16 in the recipe scales are quantized, too (`scales.py`), and in the place of `scale` stand

    scale_codes  int32 (1, ceil(lines · groups · scale_bits / 32))
    scale_above  float16 (lines, ceil(groups / scale_group))   one for each line if `scale_group` is -1

A weight is (code - zero) · scale, exactly: in float32 a code less a zero point has 9 bits, a float16 scale 11. An input
scale is multiplied onto that in float32.

Source of the orientation: AdaDim, arXiv:2309.15531, section 4: an input channel of large activations keeps to itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerwise.errors import NotFinite
from layerwise.kernels import labels
from layerwise.stages.levels.level import Level
from layerwise.stages.levels.scales import WHOLE, Scales

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.kernels.packed import Packed

KERNEL_BITS = (2, 3, 4, 8)
"""Widths of a grid that kernels take; the others do not divide a word into equal fields and planes."""


def grid_level(
    name: str,
    recipe: dict[str, Any],
    codes: Tensor,
    *,
    scale: Tensor | Scales,
    zero: Tensor,
    group: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Level:
    """Encode codes and grids as a level.

    Args:
        name: the level's.
        recipe: with `method`, `bits`, `group_size` and `sym`; with `group_along: outputs` a line is a column of the
            weight, else a row. `encoding` is added, and what reading the scales takes.
        codes: (out, in), whole numbers of any dtype.
        scale, zero: (lines, groups).
        group: (in,), the group of each column if columns are not grouped in their order; only along inputs.
        input_scale: (in,), what inputs are multiplied by before the product with the weight that codes stand for.
    Raises:
        NotFinite: a scale is too large for float16.
    """
    import torch

    from layerwise.kernels.packing import pack

    lines = codes.T if along_outputs(recipe) else codes
    tensors = {"codes": pack(lines.to(torch.uint8), recipe["bits"])}
    tensors |= grid_tensors(name, recipe, scale=scale, zero=zero, group=group, input_scale=input_scale)
    rows, columns = codes.shape
    return Level(name, {"encoding": "grid", **recipe, **reading(scale, input_scale)}, (rows, columns), tensors)


def reading(scale: Tensor | Scales, input_scale: Tensor | None = None) -> dict[str, Any]:
    """What a recipe says of how scales are stored."""
    found: dict[str, Any] = {}
    if isinstance(scale, Scales):
        found |= {"scale_bits": scale.bits, "scale_group": scale.size, "scale_signed": scale.signed}
    if input_scale is not None:
        found["scaled_inputs"] = True
    return found


def grid_tensors(
    name: str,
    recipe: Mapping[str, Any],
    *,
    scale: Tensor | Scales,
    zero: Tensor,
    group: Tensor | None,
    input_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """What is stored of the grids themselves; arguments and errors as of `grid_level`."""
    import torch

    tensors: dict[str, Tensor] = {}
    whole = scale.above if isinstance(scale, Scales) else scale
    if not whole.half().isfinite().all():
        raise NotFinite(f"level {name}: a group's weights are too large for a float16 scale")
    if isinstance(scale, Scales):
        tensors["scale_codes"] = as_stream(scale.codes, scale.bits)
        tensors["scale_above"] = scale.above.half().contiguous()
    else:
        tensors["scale"] = scale.half().contiguous()
    if not recipe["sym"]:
        tensors["zero"] = as_stream(zero, recipe["bits"])
    if group is not None:
        assert not along_outputs(recipe), "along outputs every column has its own grids"
        tensors["g_idx"] = group.to(torch.int32)
    if input_scale is not None:
        tensors["input_scale"] = input_scale.half().contiguous()
        if not tensors["input_scale"].isfinite().all():
            raise NotFinite(f"level {name}: an input scale is too large for float16")
    return tensors


def as_stream(codes: Tensor, bits: int) -> Tensor:
    """Codes of every group as one stream: a line of its own for each row would be padded to whole words."""
    import torch

    from layerwise.kernels.packing import pack

    return pack(codes.reshape(1, -1).to(torch.uint8), bits)


def along_outputs(recipe: Mapping[str, Any]) -> bool:
    """Whether a line is a column of the weight."""
    return recipe.get("group_along") == "outputs"


def grid_columns(level: Level) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The unpacked parts of a `grid` level, for kernels and exports that lay them out anew.

    Returns:
        codes (lines, length) uint8, scale (lines, groups) float16, zero (lines, groups) uint8 or None if symmetric, and
        the group of each place in a line (length,) int32. Lines are rows, and places columns, unless
        `along_outputs(level.recipe)`.
    """
    from layerwise.kernels.packing import unpack

    scale, zero, group = group_grids(level)
    return unpack(level.tensors["codes"], level.recipe["bits"], len(group)), scale, zero, group


def group_grids(level: Level) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scale, zero point and the group of each place in a line, as `grid_columns` gives them."""
    import torch

    from layerwise.kernels.packing import unpack

    tensors, recipe = level.tensors, level.recipe
    length, lines = level.shape if along_outputs(recipe) else level.shape[::-1]
    device = next(iter(tensors.values())).device
    if "g_idx" in tensors:
        group = tensors["g_idx"]
    else:
        size = length if recipe["group_size"] == -1 else recipe["group_size"]
        group = torch.arange(length, dtype=torch.int32, device=device) // size
    if "scale" in tensors:
        scale = tensors["scale"]
    else:
        groups = int(group[-1]) + 1
        codes = unpack(tensors["scale_codes"], recipe["scale_bits"], lines * groups).view(lines, groups)
        stored = {name: recipe[f"scale_{name}"] for name in ("bits", "signed")} | {"size": recipe["scale_group"]}
        scale = Scales(codes, tensors["scale_above"], **stored).values()
    zero = unpack(tensors["zero"], recipe["bits"], scale.numel()).view(scale.shape) if "zero" in tensors else None
    return scale, zero, group


def grid_overhead_bits(level: Level) -> int:
    """Bits of scales, zero points, group index and input scale."""
    tensors, recipe = level.tensors, level.recipe
    scale, zero, _ = group_grids(level)
    groups = scale.numel()
    scales = WHOLE * groups
    if "scale_codes" in tensors:
        scales = recipe["scale_bits"] * groups + WHOLE * tensors["scale_above"].numel()
    zeros = groups * recipe["bits"] if zero is not None else 0
    columns = level.shape[1]
    index = 32 * columns if "g_idx" in tensors else 0
    inputs = WHOLE * columns if "input_scale" in tensors else 0
    return int(scales + zeros + index + inputs)


def grid_label(recipe: Mapping[str, Any]) -> str:
    """`int4-g128-sym`, ...: bits, group size, symmetry and order; how scales are stored changes nothing, for kernels
    take them as float16."""
    ordered = recipe.get("desc_act") is True and recipe["group_size"] != -1
    return labels.quantized(recipe["bits"], recipe["group_size"], recipe["sym"], ordered)


def without_kernel(recipe: Mapping[str, Any]) -> str | None:
    """Why no kernel takes such a grid; None if one does."""
    if recipe["bits"] not in KERNEL_BITS:
        return f"{recipe['bits']} bits"
    if along_outputs(recipe):
        return "groups along outputs"
    return "scaled inputs" if recipe.get("scaled_inputs") else None


class Grid:
    """See the module."""

    @staticmethod
    def decode(level: Level) -> Tensor:
        codes, scale, zero, group = grid_columns(level)
        W = codes.float()
        W -= 2 ** (level.recipe["bits"] - 1) if zero is None else zero.float().index_select(1, group)
        W *= scale.float().index_select(1, group)
        if along_outputs(level.recipe):
            W = W.T.contiguous()
        if "input_scale" in level.tensors:
            W *= level.tensors["input_scale"].float()
        return W

    @staticmethod
    def nominal_bits(level: Level) -> float:
        return float(level.n_weights * level.recipe["bits"])

    @staticmethod
    def stored_bits(level: Level) -> int:
        return int(level.n_weights * level.recipe["bits"]) + grid_overhead_bits(level)

    @staticmethod
    def parameters(level: Level) -> int:
        return level.n_weights

    @staticmethod
    def pack(level: Level) -> Packed | None:
        import torch

        from layerwise.kernels.quantized import Quantized

        bits, size, columns = level.recipe["bits"], level.recipe["group_size"], level.shape[1]
        if without_kernel(level.recipe) is not None:
            return None
        codes, scale, zero, group = grid_columns(level)
        order = None
        if "g_idx" in level.tensors:
            order = group.argsort(stable=True).to(torch.int32)
            in_order = torch.arange(columns, dtype=group.dtype, device=group.device) // size
            if not torch.equal(group[order], in_order):
                return None  # groups of unequal sizes: a kernel finds a column's group by division
        one_group = size == -1 or size >= columns
        return Quantized.pack(codes, scale, zero, bits=bits, group_size=-1 if one_group else size, order=order)

    @staticmethod
    def label(recipe: Mapping[str, Any]) -> str:
        why = without_kernel(recipe)
        return grid_label(recipe) if why is None else f"no kernel: {why}"
