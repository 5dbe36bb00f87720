"""Tiles of the quantized kernel: a fixed table, chosen by what compiles well, not by timing at run time.

A choice made by timing differs from process to process, and with it the order of sums and the bits of the result; a
table does not, and every entry of it is compiled and counted by the tests. The entries come from the SASS of each: no
spills in any variant, shared memory for several programs on a multiprocessor, few instructions per weight. They have
not been timed.

    m <= 16, 32    the weights are the right operand: 2.2 and 2.7 instructions per 4-bit weight (sm_90, groups of 128)
    m <= 64        the left one, and half as many of them, which leaves registers for more programs: 3.8
    more           the left one, 128 rows of x by 8 warps: 4.5. Where a scale belongs to every field or two, or tensor
                   cores take their operands from registers only (sm_80), 128 rows spill, so it is 64

Left out: devices other than NVIDIA's, which get the table of sm_80.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """How the kernel is cut into programs.

    Args:
        rows: of x in a tile.
        columns: of y in a tile: rows of the weight.
        left: the weights are the left operand of the dot product.
        num_warps: of a program.
        num_stages: of the pipeline of loads.
        programs: that fill the device: two for each multiprocessor where loads are waited for, one where tensor cores
            are.
    """

    rows: int
    columns: int
    left: bool
    num_warps: int
    num_stages: int
    programs: int

    def tiles(self, m: int, n: int) -> tuple[int, int]:
        """Tiles of y, along m and along n."""
        return -(-m // self.rows), -(-n // self.columns)

    def splits(self, m: int, n: int, blocks: int) -> int:
        """Programs that share the columns of the weight: as many as fill the device, but each has at least one block.

        With few rows of x the device may be filled more than once, with many it is rather left a little empty: a second
        round costs as much as the first.
        """
        along_m, along_n = self.tiles(m, n)
        tiles = max(1, along_m * along_n)
        wanted = self.programs // tiles if m > DECODE_ROWS else -(-self.programs // tiles)
        return max(1, min(wanted, blocks))


DECODE_ROWS = 64
"""Up to so many rows the time goes by the bytes of the weight."""

BUCKETS = (16, 32, 64, 1 << 31)
"""Upper ends of the numbers of rows that share an entry."""

MULTIPROCESSORS = {80: 108, 90: 132}
"""Of an A100 and an H100: the devices that the tables are for."""


def config_for(capability: int, bits: int, group_size: int, m: int) -> Config:
    """The entry of a case.

    Args:
        capability: 90 for 9.0; below 90 the entries of sm_80 hold, above it those of sm_90.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale, -1 for the whole row.
        m: rows of x.
    """
    device = 90 if capability >= 90 else 80
    bucket = next(index for index, rows in enumerate(BUCKETS) if m <= rows)
    awkward = (bits, group_size) == (3, 32)  # a scale for every two fields, and two planes of words
    if awkward and bucket == 1:
        bucket = 2  # 32 rows spill, by 4 warps and by 8
    rows, columns, left, warps = _TILES[bucket]
    stages = _STAGES[bits][bucket]
    if rows == 128 and (device == 80 or 0 < group_size < 128):
        rows = 64
    if awkward and rows == 16:
        warps, stages = 8, 2  # 4 warps spill
    return Config(
        rows=rows,
        columns=columns,
        left=left,
        num_warps=warps,
        num_stages=stages,
        programs=MULTIPROCESSORS[device] * (2 if m <= DECODE_ROWS else 1),
    )


_TILES = ((16, 128, False, 4), (32, 128, False, 4), (64, 64, True, 4), (128, 128, True, 8))
"""Of each bucket: rows, columns, left, warps."""

_STAGES = {2: (4, 3, 2, 2), 3: (3, 2, 2, 2), 4: (4, 3, 3, 3), 8: (3, 3, 3, 3)}
"""By bits and bucket. A block of 2 or 3 bits is 256 columns of x, so fewer of them fit."""
