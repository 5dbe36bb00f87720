"""`mask`: pruned weights: which are kept, and their values.

    mask     which are kept, layerwise.stages.levels.index
    values   (kept,)    row by row, in the dtype of the checkpoint

N:M patterns of values with 16 bits pack for their kernel, all others as single weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerwise.kernels import labels
from layerwise.stages.levels.index import index_bits, read_index, store_index
from layerwise.stages.levels.level import Level

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.kernels.packed import Packed

KERNEL_GROUP = 16
"""Greatest M that a kernel takes."""


def mask_level(name: str, recipe: Mapping[str, Any], weight: Tensor, keep: Tensor) -> Level:
    """Encode a pruned weight as a level.

    Args:
        name: the level's.
        recipe: with `method` and `sparsity`, and `pattern` or `block` if the mask has one; what reading it takes is
            added.
        weight: (out, in), in the dtype to be stored.
        keep: (out, in) bool.
    """
    rows, columns = weight.shape
    tensors, index = masked(keep, recipe)
    tensors["values"] = weight.detach()[keep]
    dtype = str(weight.dtype).removeprefix("torch.")
    return Level(name, {"encoding": "mask", "dtype": dtype, **recipe, **index}, (rows, columns), tensors)


def masked(keep: Tensor, recipe: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The mask of a level and what its recipe says of it, given what was asked for: `pattern`, `block`."""
    pattern, block = recipe.get("pattern"), recipe.get("block")
    return store_index(keep, None if pattern is None else n_and_m(pattern), None if block is None else tuple(block))


def kept(level: Level) -> Tensor:
    """(out, in) bool: what a pruned level keeps."""
    return read_index(level)


def n_and_m(pattern: str) -> tuple[int, int]:
    """Of `2:4`, 2 and 4."""
    n, m = pattern.split(":")
    return int(n), int(m)


def kernel_pattern(recipe: Mapping[str, Any]) -> tuple[int, int] | None:
    """(N, M) of a level that a kernel for N:M takes: of 16-bit values in groups of at most 16; None for others."""
    if "pattern" not in recipe or recipe["dtype"] not in ("float16", "bfloat16"):
        return None
    n, m = n_and_m(recipe["pattern"])
    return (n, m) if m <= KERNEL_GROUP else None


class Mask:
    """See the module."""

    @staticmethod
    def decode(level: Level) -> Tensor:
        import torch

        values = level.tensors["values"]
        return torch.zeros(level.shape, device=values.device).masked_scatter_(kept(level), values.float())

    @staticmethod
    def nominal_bits(level: Level) -> float:
        values = level.tensors["values"]
        return float(values.numel() * 8 * values.element_size())

    @staticmethod
    def stored_bits(level: Level) -> int:
        values = level.tensors["values"]
        return index_bits(level) + int(values.numel() * 8 * values.element_size())

    @staticmethod
    def parameters(level: Level) -> int:
        return int(level.tensors["values"].numel())

    @staticmethod
    def pack(level: Level) -> Packed | None:
        from layerwise.kernels.n_m_sparse import NMSparse
        from layerwise.kernels.unstructured import DTYPES, MAX_COLUMNS, Unstructured

        values = level.tensors["values"]
        pattern = kernel_pattern(level.recipe)
        if pattern is not None:
            return NMSparse.pack(level.decode(), *pattern, dtype=values.dtype)
        if values.dtype not in DTYPES or level.shape[1] > MAX_COLUMNS:
            return None
        return Unstructured.from_mask(kept(level), values)

    @staticmethod
    def label(recipe: Mapping[str, Any]) -> str:
        pattern = kernel_pattern(recipe)
        if pattern is not None:
            return labels.n_m_sparse(*pattern, recipe["dtype"])
        return labels.unstructured(round(100 * recipe["sparsity"]), recipe["dtype"])
