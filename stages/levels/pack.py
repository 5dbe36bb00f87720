"""From a level to the weight that a kernel takes, for every encoding that has a kernel.

`Level.decode` says what a level means, and what is packed here means the same, bit for bit. A level without a kernel (a
grid of 5, 6 or 7 bits, say) packs to None: it runs as the dense weight that it decodes to, and whoever reports times
says so. A new encoding that has a kernel is one entry of `PACKERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from layerwise.stages.levels.level import Level, grid_columns

if TYPE_CHECKING:
    from layerwise.kernels.packed import Packed

KERNEL_BITS = (2, 3, 4, 8)
"""Widths of a grid that kernels take; the others do not divide a word into equal fields and planes."""


def pack_level(level: Level) -> Packed | None:
    """Lay a level out for a kernel.

    Args:
        level: with its tensors.
    Returns:
        a weight whose `dense()` is `level.decode()` exactly; None if there is no kernel for it.
    """
    packer = PACKERS.get(level.recipe["encoding"])
    return None if packer is None else packer(level)


def pack_or_dense(level: Level) -> Packed:
    """The same; a level without a kernel as the dense weight that it decodes to, in float32."""
    from layerwise.kernels.dense import Dense

    packed = pack_level(level)
    return Dense(level.shape, level.decode()) if packed is None else packed


def kind(recipe: Mapping[str, Any]) -> str:
    """What of a recipe decides how fast a level of a given shape runs: levels of one kind are timed once.

    Only what is written in the index of a database is looked at, because to read every level of a large model in order
    to learn that five of them differ would take longer than to time those five.
    """
    if recipe["encoding"] == "dense":
        return "dense"
    if recipe["encoding"] != "grid":
        return json.dumps({name: recipe[name] for name in sorted(recipe)})
    if recipe["bits"] not in KERNEL_BITS:
        return f"no kernel for {recipe['bits']} bits"
    size = "row" if recipe["group_size"] == -1 else recipe["group_size"]
    order = " ordered" if recipe.get("desc_act") is True and size != "row" else ""
    return f"grid {recipe['bits']} bits {size} {'sym' if recipe['sym'] else 'asym'}{order}"


def _pack_grid(level: Level) -> Packed | None:
    import torch

    from layerwise.kernels.quantized import Quantized

    bits, size, columns = level.recipe["bits"], level.recipe["group_size"], level.shape[1]
    if bits not in KERNEL_BITS:
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


def _pack_dense(level: Level) -> Packed:
    from layerwise.kernels.dense import Dense

    return Dense(level.shape, level.tensors["weight"])


PACKERS: dict[str, Callable[[Level], Packed | None]] = {"grid": _pack_grid, "dense": _pack_dense}
"""By encoding, how a level is laid out for a kernel."""
