"""A level: encoded tensors plus the recipe that made them.

`Level.decode` is the single definition of what a level means; kernels, export and search are tested against it. What is
particular to one way of encoding (how to decode it, how many bits it stores) is one entry of `ENCODINGS`, so that
sparse, low-rank and dropped levels join without a change elsewhere.

Torch is imported only by the work itself, because the recipes and costs of levels are also read where there is none.
Left out: packing for a particular kernel, and anything about a unit's place in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerwise.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Level:
    """One compressed variant of one unit.

    Args:
        name: `gptq-3b-g128`, `dense`, ...; unique within a unit.
        recipe: JSON values: `encoding`, `method`, and everything else that it takes to decode the tensors or to make
            them again.
        shape: (out, in) of the weight.
        tensors: what is stored, by the names that the encoding gives them.
    """

    name: str
    recipe: Mapping[str, Any]
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    def decode(self) -> Tensor:
        """The dense weight that this level stands for: (out, in), float32, on the device of the tensors."""
        return self._encoding.decode(self)

    @property
    def bits(self) -> float:
        """Nominal bits per weight, without overhead."""
        return self._encoding.bits(self)

    @property
    def effective_bits(self) -> float:
        """Bits per weight over everything that is stored: codes, scales, zero points and indices; no word padding."""
        return self.stored_bits / self.n_weights

    @property
    def stored_bits(self) -> int:
        """The exact sum behind `effective_bits`."""
        return self._encoding.stored_bits(self)

    @property
    def size_bytes(self) -> int:
        """Bytes of the stored tensors, word padding included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def n_weights(self) -> int:
        """Weights of the dense matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def _encoding(self) -> Encoding:
        name = self.recipe["encoding"]
        if name not in ENCODINGS:
            raise UsageError(
                f"level {self.name}: unknown encoding '{name}' (known: {', '.join(ENCODINGS)})",
                hint="it was written by another version of layerwise; make the levels again",
            )
        return ENCODINGS[name]


@dataclass(frozen=True)
class Encoding:
    """What is particular to one way of storing a weight.

    Args:
        decode: the dense float32 weight.
        bits: nominal bits per weight.
        stored_bits: every bit stored for the level, without word padding.
    """

    decode: Callable[[Level], Tensor]
    bits: Callable[[Level], float]
    stored_bits: Callable[[Level], int]


# --- grid: integer codes on a uniform grid, one scale (and zero point) per group of a row -------------------------
#
#   codes   int32 (out, ceil(in · bits / 32))      packed, layerwise.kernels.packing
#   scale   float16 (out, groups)
#   zero    int32 (out, ceil(groups · bits / 32))  packed like the codes; absent if symmetric, then 2^(bits-1)
#   g_idx   int32 (in,)                            group of each column; absent if columns are grouped in their order


def grid_columns(level: Level) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The unpacked parts of a `grid` level, for kernels and exports that lay them out anew.

    Returns:
        codes (out, in) uint8, scale (out, groups) float16, zero (out, groups) uint8 or None if symmetric, and the
        group of each column (in,) int32.
    """
    import torch

    from layerwise.kernels.packing import unpack

    tensors, bits, columns = level.tensors, level.recipe["bits"], level.shape[1]
    scale = tensors["scale"]
    zero = unpack(tensors["zero"], bits, scale.shape[1]) if "zero" in tensors else None
    if "g_idx" in tensors:
        group = tensors["g_idx"]
    else:
        size = columns if level.recipe["group_size"] == -1 else level.recipe["group_size"]
        group = torch.arange(columns, dtype=torch.int32, device=scale.device) // size
    return unpack(tensors["codes"], bits, columns), scale, zero, group


def _decode_grid(level: Level) -> Tensor:
    # Exact in float32: a code minus a zero point has 9 bits, a float16 scale has 11.
    codes, scale, zero, group = grid_columns(level)
    W = codes.float()
    W -= 2 ** (level.recipe["bits"] - 1) if zero is None else zero.float().index_select(1, group)
    W *= scale.float().index_select(1, group)
    return W


def _grid_bits(level: Level) -> int:
    bits, groups = level.recipe["bits"], level.tensors["scale"].numel()
    zeros = groups * bits if "zero" in level.tensors else 0
    index = 32 * level.shape[1] if "g_idx" in level.tensors else 0
    return int(level.n_weights * bits + 16 * groups + zeros + index)


# --- dense: the weight itself, in the dtype of the checkpoint -------------------------------------------------------


def _dense_width(level: Level) -> int:
    return 8 * level.tensors["weight"].element_size()


ENCODINGS = {
    "grid": Encoding(_decode_grid, lambda level: level.recipe["bits"], _grid_bits),
    "dense": Encoding(
        lambda level: level.tensors["weight"].float(),
        _dense_width,
        lambda level: level.n_weights * _dense_width(level),
    ),
}
