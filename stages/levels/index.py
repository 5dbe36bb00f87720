"""Which weights of a pruned level are kept, in few bits.

The tensor `mask` is a stream of bits, least significant first, in one of three codings, the smallest that holds the
mask. The recipe's `index` says which, and what else it takes to read it; without it, it is a bitmask.

    bitmask      one bit for each weight; rows begin with a byte: uint8 (out, ceil(in / 8))
    n_m          for each group of M neighbours in a row ceil(log2(C(M, N))) bits: which choice of N it is. That is 3 at
                 2:4, where two indices of 2 bits would take 4, and 7 at 4:8. A shorter group at the end of a row takes
                 as many
    enumerated   for each run of 63 weights of the flattened mask how many are kept, and which choice of so many it is:
                 first all counts, less the least of them, in fields of one width, then all choices, each in the bits
                 that its count takes. Within 0.05 bits a weight of the entropy of a random mask, which is 0.88 at 70 %

A choice is numbered by its places p_1 < p_2 < ... as Σ C(p_i, i), the combinatorial number system (Cover, Enumerative
source encoding, 1973). 63 weights are as many as have their choices counted in 63 bits. Where whole blocks go, all this
is said of blocks, one by one along their rows, instead of weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, device

    from layerwise.stages.levels.level import Level

PLAIN: Mapping[str, Any] = {"coding": "bitmask"}
COMMON = ((2, 4), (4, 8), (1, 4), (1, 2))
"""Patterns that an earlier pruning may have left."""

RUN = 63
AT_A_TIME = 1 << 16
"""Fields whose bits are spread out at a time: as whole numbers of 64 bits, 32 MiB for each of a few steps."""


def store_index(
    keep: Tensor, pattern: tuple[int, int] | None = None, block: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Encode a mask.

    Args:
        keep: (out, in) bool.
        pattern: (N, M) that it may have; common ones are tried without being told. Where an earlier pruning left a
            group with fewer than N, it is stored as any other.
        block: rows and columns of blocks that are kept or not as a whole, the last ones smaller; where an earlier
            pruning left parts of some, it is not stored in blocks.
    Returns:
        tensors, and what the recipe says of them.
    """
    said: dict[str, Any] = {}
    if block is not None and bool(
        (spread_blocks(blocks := keep[:: block[0], :: block[1]], block, keep.shape) == keep).all()
    ):
        said["block"] = list(block)
        keep = blocks
    counts = _runs(keep).sum(1)
    least, width = int(counts.min()), int(counts.max() - counts.min()).bit_length()
    bits = len(counts) * width + int(_widths(keep.device)[counts].sum())
    for n_m in COMMON if pattern is None else (pattern,):
        size = len(_groups(keep, n_m[1])) * _pattern_bits(n_m)
        if size < min(bits, keep.numel()) and _holds(keep, n_m):
            stream = _write_pattern(keep, n_m)
            return {"mask": stream}, {"index": {"coding": "n_m", "bits": size, "pattern": list(n_m), **said}}
    if bits < keep.numel():
        stream = _write_enumerated(keep, counts, least, width)
        said |= {"least": least, "width": width}
        return {"mask": stream}, {"index": {"coding": "enumerated", "bits": bits, **said}}
    bitmask = {"index": {"coding": "bitmask", "bits": keep.numel(), **said}} if said else {}
    return {"mask": pack_mask(keep)}, bitmask


def read_index(level: Level) -> Tensor:
    """(out, in) bool: what a level keeps, on the device of its tensors."""
    mask, index, (rows, columns) = level.tensors["mask"], level.recipe.get("index", PLAIN), level.shape
    tall, wide = index.get("block", (1, 1))
    shape = -(-rows // tall), -(-columns // wide)
    if index["coding"] == "bitmask":
        keep = unpack_mask(mask, shape[1])
    elif index["coding"] == "n_m":
        n, m = index["pattern"]
        keep = _read_pattern(mask, (n, m), shape)
    else:
        keep = _read_enumerated(mask, index["least"], index["width"], shape)
    return keep if tall == wide == 1 else spread_blocks(keep, (tall, wide), level.shape)


def index_bits(level: Level) -> int:
    """Bits of the index, without what fills up its last byte or, of a bitmask, those of its rows."""
    index = level.recipe.get("index")
    return level.n_weights if index is None else int(index["bits"])


def spread_blocks(of_blocks: Tensor, block: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """What is said of blocks, for each of their weights: (tiles, blocks of a tile) to (out, in)."""
    return of_blocks.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


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


# --- N:M --------------------------------------------------------------------------------------------------------------


def _groups(keep: Tensor, m: int) -> Tensor:
    """(out, in) to (out · groups, M), the last of a row filled up with what is not kept."""
    from torch.nn.functional import pad

    return pad(keep, (0, -keep.shape[1] % m)).reshape(-1, m)


def _group_counts(shape: tuple[int, int], pattern: tuple[int, int], where: device) -> Tensor:
    """How many each group of `_groups` keeps: N, and of r columns at the end of a row ceil(r · N / M)."""
    import torch

    n, m = pattern
    counts = torch.full((shape[0], -(-shape[1] // m)), n, device=where)
    counts[:, -1] = -(-(m - -shape[1] % m) * n // m)
    return counts.view(-1)


def _holds(keep: Tensor, pattern: tuple[int, int]) -> bool:
    counts = _group_counts((keep.shape[0], keep.shape[1]), pattern, keep.device)
    return bool((_groups(keep, pattern[1]).sum(1) == counts).all())


def _write_pattern(keep: Tensor, pattern: tuple[int, int]) -> Tensor:
    choices = _number(_groups(keep, pattern[1]))
    return _write_same(choices, _pattern_bits(pattern))


def _read_pattern(mask: Tensor, pattern: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    counts = _group_counts(shape, pattern, mask.device)
    choices = _read_same(mask, _pattern_bits(pattern), len(counts))
    return _choice(choices, counts, pattern[1]).view(shape[0], -1)[:, : shape[1]]


def _pattern_bits(pattern: tuple[int, int]) -> int:
    n, m = pattern
    return (math.comb(m, n) - 1).bit_length()


# --- any mask ---------------------------------------------------------------------------------------------------------


def _runs(keep: Tensor) -> Tensor:
    """(runs, 63), the last filled up with what is not kept."""
    from torch.nn.functional import pad

    return pad(keep.reshape(-1), (0, -keep.numel() % RUN)).view(-1, RUN)


def _write_enumerated(keep: Tensor, counts: Tensor, least: int, width: int) -> Tensor:
    import torch

    fields = torch.cat([counts - least, _number(_runs(keep))])
    return write_fields(fields, torch.cat([counts.new_full(counts.shape, width), _widths(keep.device)[counts]]))


def _read_enumerated(mask: Tensor, least: int, width: int, shape: tuple[int, int]) -> Tensor:
    runs = -(-shape[0] * shape[1] // RUN)
    counts = least + _read_same(mask, width, runs)
    choices = read_fields(mask, _widths(mask.device)[counts], runs * width)
    return _choice(choices, counts, RUN).view(-1)[: shape[0] * shape[1]].view(shape)


@cache
def _binomials() -> list[list[int]]:
    """C(p, i) by p and i, both up to 63."""
    return [[math.comb(p, i) for i in range(RUN + 1)] for p in range(RUN + 1)]


def _table(where: device) -> Tensor:
    import torch

    return torch.tensor(_binomials(), dtype=torch.int64, device=where)


def _widths(where: device) -> Tensor:
    """Bits of the number of a choice, by how many of 63 are kept."""
    import torch

    return torch.tensor([(count - 1).bit_length() for count in _binomials()[RUN]], device=where)


def _number(kept: Tensor) -> Tensor:
    """The number of each choice: (choices, length) bool to (choices,)."""
    import torch

    table = _table(kept.device)
    found = torch.zeros(len(kept), dtype=torch.int64, device=kept.device)
    place = torch.zeros_like(found)
    for p in range(kept.shape[1]):
        here = kept[:, p].long()
        place += here
        found += here * table[p, place]
    return found


def _choice(number: Tensor, counts: Tensor, length: int) -> Tensor:
    """Undo `_number`, given how many each choice is of: (choices, length) bool."""
    import torch

    table = _table(number.device)
    kept = torch.empty((len(number), length), dtype=torch.bool, device=number.device)
    number, left = number.clone(), counts.clone()
    for p in range(length - 1, -1, -1):
        below = table[p, left]
        kept[:, p] = here = number >= below
        number -= below * here
        left -= here.long()
    return kept


# --- fields of bits ---------------------------------------------------------------------------------------------------


def write_fields(values: Tensor, widths: Tensor) -> Tensor:
    """Numbers one after the other, each in so many bits, least significant first: uint8 (ceil(Σ widths / 8),).

    Args:
        values, widths: (fields,) int64, values below 2^63.
    """
    import torch

    bits = [torch.zeros(0, dtype=torch.bool, device=values.device)]
    for some, wide in zip(values.split(AT_A_TIME), widths.split(AT_A_TIME), strict=True):
        field, shift = _spread(wide)
        bits.append((some[field] >> shift & 1).bool())
    return pack_mask(torch.cat(bits)[None])[0]


def read_fields(stream: Tensor, widths: Tensor, start: int = 0) -> Tensor:
    """Undo `write_fields`, from a bit on: (fields,) int64."""
    import torch

    bits = unpack_mask(stream[None], 8 * len(stream))[0]
    values = []
    for wide in widths.split(AT_A_TIME):
        field, shift = _spread(wide)
        value = torch.zeros_like(wide, dtype=torch.int64)
        values.append(value.index_add_(0, field, bits[start : start + len(field)].long() << shift))
        start += len(field)
    return torch.cat(values)


def _write_same(values: Tensor, width: int) -> Tensor:
    """`write_fields` of one width; up to 8 bits as codes are packed, which is the same and faster."""
    import torch

    from layerwise.kernels.packing import pack

    if not 1 <= width <= 8:
        return write_fields(values, torch.full_like(values, width))
    return pack(values[None], width).view(torch.uint8)[0, : -(-len(values) * width // 8)].clone()


def _read_same(stream: Tensor, width: int, count: int) -> Tensor:
    """`read_fields` of one width, from the first bit on: (count,) int64."""
    import torch
    from torch.nn.functional import pad

    from layerwise.kernels.packing import unpack, words_per_row

    if not 1 <= width <= 8:
        return read_fields(stream, torch.full((count,), width, device=stream.device))
    size = 4 * words_per_row(count, width)
    words = pad(stream[:size], (0, max(0, size - len(stream)))).view(torch.int32)
    return unpack(words[None], width, count)[0].long()


def _spread(widths: Tensor) -> tuple[Tensor, Tensor]:
    """Of every bit of some fields, which field it is of, and its place in it."""
    import torch

    field = torch.repeat_interleave(torch.arange(len(widths), device=widths.device), widths)
    first = widths.cumsum(0) - widths
    return field, torch.arange(len(field), device=widths.device) - first[field]
