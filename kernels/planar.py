"""Codes of 2, 3, 4 or 8 bits in planar 16-bit words: the layout that the matrix kernels read.

A word holds P = 16 / bits codes. Along the columns the weight is cut into blocks; inside a block of P · R columns that
starts at k0, field i of word row r (bits i · b and up) holds column k0 + i · R + r. One tile of R word rows therefore
unpacks into P tiles of the weight, each for R *neighbouring* activations: nothing is shuffled, neither words nor x, and
a 16-bit word takes the place of a half-precision weight in the registers of a tensor core.

Rows of the weight run along the second axis, so that a warp reads neighbouring words. That axis is padded to a multiple
of 16 rows, for loads of 16 bytes; the columns are padded to whole blocks. Padding is zero.

3 bits are a plane of 2 bits (blocks of 128 columns) and a plane of 1 bit, the upper one, whose block of 256 columns
covers two of those. The bits of the upper plane are not in the order of their columns but where one shift serves
several fields (`UPPER_BITS`).

Left out: how rows are stored on disk (`packing.py`), and scales and zero points (`quantized.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from layerwise.errors import UsageError

WORD = 16
BITS = (2, 3, 4, 8)
"""The widths that have a planar layout."""

ROW_MULTIPLE = 16
"""Rows of the weight are padded to this."""

UPPER_BITS = (2, 4, 6, 8, 3, 5, 7, 9, 10, 12, 14, 0, 11, 13, 15, 1)
"""The bit of an upper word that belongs to each of its 16 fields. Fields 0-3 and 4-7 stand above the 2-bit fields of
the first block after one shift of each word, fields 8-15 above those of the second block, save two that go round."""


def fields(bits: int) -> int:
    """Codes in one word; of the lower plane at 3 bits."""
    return WORD // (2 if bits == 3 else bits)


def field_columns(bits: int, group_size: int) -> int:
    """R: neighbouring columns that one field of a tile of words holds.

    No field may reach over the border of a group; 16 is the least that a tensor core multiplies. At 8 bits, with two
    fields, longer ones give each step of the kernel as much to do as at 4.
    """
    if bits == 8 and (group_size == -1 or group_size % 64 == 0):
        return 64
    return 16 if bits == 3 else 32


def block_columns(bits: int, group_size: int) -> int:
    """Columns of the weight that are packed together, and to a multiple of which they are padded."""
    return field_columns(bits, group_size) * (WORD if bits == 3 else fields(bits))


def padded(size: int, multiple: int) -> int:
    """The least multiple that holds it."""
    return -(-size // multiple) * multiple


def pack(codes: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor | None]:
    """Lay codes out in planar words.

    Args:
        codes: (n, k), uint8, each in 0 .. 2**bits - 1 (not checked: a larger one spills into its neighbours).
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale, -1 for the whole row; it decides the block.
    Returns:
        words (k_padded / P, n_padded) int16, at 3 bits the plane of the lower two; and at 3 bits the plane of the upper
        one, (k_padded / 16, n_padded) int16, else None.
    Raises:
        UsageError: no planar layout for that many bits.
    """
    if bits not in BITS:
        raise UsageError(f"{bits}-bit codes have no planar layout (known: {', '.join(map(str, BITS))})")
    n, k = codes.shape
    columns = pad(codes.T, (0, -n % ROW_MULTIPLE, 0, -k % block_columns(bits, group_size)))
    run = field_columns(bits, group_size)
    if bits != 3:
        return _pack_plane(columns, run, tuple(range(0, WORD, bits))), None
    return _pack_plane(columns & 3, run, tuple(range(0, WORD, 2))), _pack_plane(columns >> 2, run, UPPER_BITS)


def unpack(words: Tensor, high: Tensor | None, bits: int, group_size: int, shape: tuple[int, int]) -> Tensor:
    """Undo `pack`.

    Args:
        shape: n, k of the codes without padding.
    Returns:
        (n, k), uint8.
    """
    run = field_columns(bits, group_size)
    if high is None:
        columns = _unpack_plane(words, run, tuple(range(0, WORD, bits)), (1 << bits) - 1)
    else:
        columns = _unpack_plane(words, run, tuple(range(0, WORD, 2)), 3)
        columns |= _unpack_plane(high, run, UPPER_BITS, 1) << 2
    return columns[: shape[1], : shape[0]].T.contiguous()


def _pack_plane(columns: Tensor, run: int, shifts: tuple[int, ...]) -> Tensor:
    """(k_padded, n_padded) codes to (k_padded / P, n_padded) words, where field i stands at bit shifts[i]."""
    tiles = columns.reshape(-1, len(shifts), run, columns.shape[1]).to(torch.int32)
    words = sum((tiles[:, i] << shift for i, shift in enumerate(shifts)), start=torch.zeros_like(tiles[:, 0]))
    return words.to(torch.int16).reshape(-1, columns.shape[1]).contiguous()  # codes were transposed


def _unpack_plane(words: Tensor, run: int, shifts: tuple[int, ...], mask: int) -> Tensor:
    # Shifting a negative word copies its sign into the upper bits; the mask cuts it off again.
    tiles = words.reshape(-1, run, words.shape[1])
    parts = [((tiles >> shift) & mask).to(torch.uint8) for shift in shifts]
    return torch.stack(parts, dim=1).reshape(-1, words.shape[1])
