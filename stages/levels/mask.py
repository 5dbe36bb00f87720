"""`mask`: pruned weights: one bit for each weight, and the values of those that are kept.

    mask     uint8 (out, ceil(in / 8))   bit i % 8 of byte i // 8 of a row: the weight of column i is kept
    values   (kept,)                     row by row, in the dtype of the checkpoint

The bitmask is the index, and it is counted. Below about one weight kept in sixteen a list of columns would be smaller;
that is left out, for no network survives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerwise.kernels import labels
from layerwise.stages.levels.level import Level

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.kernels.packed import Packed


def mask_level(name: str, recipe: dict[str, Any], weight: Tensor, keep: Tensor) -> Level:
    """Encode a pruned weight as a level.

    Args:
        name: the level's.
        recipe: with `method` and `sparsity`; `encoding` is added.
        weight: (out, in), in the dtype to be stored.
        keep: (out, in) bool.
    """
    rows, columns = weight.shape
    tensors = {"mask": pack_mask(keep), "values": weight.detach()[keep]}
    dtype = str(weight.dtype).removeprefix("torch.")
    return Level(name, {"encoding": "mask", "dtype": dtype, **recipe}, (rows, columns), tensors)


def pack_mask(keep: Tensor) -> Tensor:
    """(out, in) bool to (out, ceil(in / 8)) uint8."""
    import torch
    from torch.nn.functional import pad

    rows, columns = keep.shape
    bits = pad(keep.to(torch.uint8), (0, -columns % 8)).view(rows, -1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(2, dtype=torch.uint8)


def unpack_mask(mask: Tensor, columns: int) -> Tensor:
    """Undo `pack_mask`."""
    import torch

    bits = mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits & 1).bool().flatten(1)[:, :columns]


def kept(level: Level) -> Tensor:
    """(out, in) bool: what a pruned level keeps."""
    return unpack_mask(level.tensors["mask"], level.shape[1])


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
        return level.n_weights + int(values.numel() * 8 * values.element_size())

    @staticmethod
    def parameters(level: Level) -> int:
        return int(level.tensors["values"].numel())

    @staticmethod
    def pack(level: Level) -> Packed | None:
        from layerwise.kernels.unstructured import DTYPES, MAX_COLUMNS, Unstructured

        values = level.tensors["values"]
        if values.dtype not in DTYPES or level.shape[1] > MAX_COLUMNS:
            return None
        return Unstructured.from_mask(kept(level), values)

    @staticmethod
    def label(recipe: Mapping[str, Any]) -> str:
        return labels.unstructured(round(100 * recipe["sparsity"]), recipe["dtype"])
