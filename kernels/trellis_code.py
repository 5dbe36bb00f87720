"""The bitshift trellis: a sequence of weights as a circle of bits, each weight a function of the bits before its end.

With b bits a weight, weight t of a sequence stands for the L bits of the circle that end at bit e(t) = ⌈(t + 1) b⌉: its
*state*. A state shares all but k = e(t) - e(t - 1) bits with the one before it, so neighbours constrain each other,
and that makes the code better than rounding each weight (QTIP, arXiv:2406.11235, section 3.1). b need not be whole: at
2.5 bits, k is 3 and 2 in turn. Because the bits are a circle ("tail-biting", section 3.3), no L bits of a start need be
stored beside.

A state's value is computed, so a kernel needs no table (section 3.2.1, "1MAD"): the four bytes of a · state + b mod
2³², added up, are about Gaussian. Here it is that sum less its mean, a whole number within ±510, over 128: exact in
half precision, with standard deviation SIGMA.

Of a weight (n, k), tiles of up to `width` columns and as many rows as make up LENGTH weights are one sequence each, row
by row; `Tiles` says which. The stream of a sequence takes whole bytes; of LENGTH weights, whole words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

LENGTH = 256
"""Weights of a sequence: QTIP's T."""

MULTIPLIER, INCREMENT = 34038481, 76625530
"""Of the codebook: QTIP, arXiv:2406.11235, algorithm 1."""

UNIT = 1 / 128
"""What a value is a multiple of."""

SIGMA = (4 * (256**2 - 1) / 12) ** 0.5 * UNIT
"""Standard deviation of the values: 1.155."""


@cache
def values(state_bits: int, device: torch.device | None = None) -> Tensor:
    """The value of every state: (2**state_bits,), float32.

    Source: QTIP, arXiv:2406.11235, algorithm 1 (1MAD).
    """
    state = torch.arange(1 << state_bits, dtype=torch.int64, device=device)
    x = (state * MULTIPLIER + INCREMENT) & 0xFFFFFFFF
    total = (x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24)
    return (total - 510).float() * UNIT


def ends(length: int, bits: float) -> list[int]:
    """The bit before which each weight's state ends; the last is the length of the circle.

    `bits` is a multiple of 1/8, so that nothing here is rounded.
    """
    eighths = round(8 * bits)
    return [-(-(t + 1) * eighths // 8) for t in range(length)]


def new_bits(length: int, bits: float) -> list[int]:
    """How many bits of each weight's state are not in that of the one before it."""
    found = ends(length, bits)
    return [end - before for before, end in zip([0, *found[:-1]], found, strict=True)]


@dataclass(frozen=True)
class Band:
    """Neighbouring columns of a weight whose sequences are equally long.

    Args:
        first, last: the columns, last excluded.
        sequences: how many there are.
        length: weights of each; those beyond the last of the band are not looked at.
        size_bytes: of each sequence's bits.
    """

    first: int
    last: int
    sequences: int
    length: int
    size_bytes: int

    def cut(self, part: Tensor) -> Tensor:
        """The band of a weight, (rows, width), as sequences: (length, sequences), float32, filled up with zeros."""
        flat = part.float().flatten()
        return pad(flat, (0, self.sequences * self.length - len(flat))).view(self.sequences, self.length).T.contiguous()

    def join(self, sequences: Tensor, rows: int) -> Tensor:
        """Undo `cut`, of sequences that stand side by side, (sequences, length): (rows, width)."""
        width = self.last - self.first
        return sequences.reshape(-1)[: rows * width].view(rows, width)


@dataclass(frozen=True)
class Tiles:
    """How a weight is cut into sequences.

    Args:
        rows: n.
        columns: k.
        width: columns of a tile; the last band may be narrower.
        bits: of a weight.
        state_bits: L.
    """

    rows: int
    columns: int
    width: int
    bits: float
    state_bits: int

    def bands(self) -> Iterator[Band]:
        """From left to right. All but the last are alike."""
        for first in range(0, self.columns, self.width):
            last = min(first + self.width, self.columns)
            weights = self.rows * (last - first)
            sequences = -(-weights // LENGTH)
            # A circle shorter than a state would hold some of its bits twice.
            length = max(-(-weights // sequences), int(-(-self.state_bits // self.bits)))
            yield Band(first, last, sequences, length, -(-ends(length, self.bits)[-1] // 8))

    def decode(self, stream: Tensor) -> Tensor:
        """The values that all sequences stand for: (n, k), float32.

        Args:
            stream: (bytes,), uint8, the bits of one sequence after the other.
        """
        found, start = stream.new_empty((self.rows, self.columns), dtype=torch.float32), 0
        for band in self.bands():
            end = start + band.sequences * band.size_bytes
            sequences = stream[start:end].view(band.sequences, band.size_bytes)
            state = states(sequences, band.length, self.bits, self.state_bits)
            decoded = values(self.state_bits, stream.device)[state]
            found[:, band.first : band.last] = band.join(decoded, self.rows)
            start = end
        return found


def states(sequences: Tensor, length: int, bits: float, state_bits: int) -> Tensor:
    """The states that bytes hold.

    Args:
        sequences: (sequences, bytes), uint8.
        length: weights of each.
    Returns:
        (sequences, length), int32.
    """
    place = torch.tensor(ends(length, bits), device=sequences.device)
    circle = int(place[-1])
    first = (place - state_bits) % circle
    # The circle is unrolled a little, so that every state is a run of bits within four bytes.
    unrolled = _unroll(sequences, circle, state_bits)
    byte, shift = first // 8, (first % 8).int()
    word = unrolled[:, byte].int()
    for more in range(1, 3):
        word |= unrolled[:, byte + more].int() << 8 * more
    return (word >> shift) & ((1 << state_bits) - 1)


def _unroll(sequences: Tensor, circle: int, more: int) -> Tensor:
    """(sequences, bytes) uint8 with at least `more` bits of the start again after the end of the circle."""
    size = sequences.shape[1]
    whole, spare = divmod(circle, 8)
    head = sequences[:, : -(-more // 8) + 1]
    head = pad(head, (0, 4))
    if not spare:
        return torch.cat([sequences, head], dim=1)
    shifted = head.int() << spare
    carried = pad(shifted >> 8, (1, 0))[:, :-1]
    tail = ((shifted | carried) & 255).to(torch.uint8)
    tail[:, 0] |= sequences[:, whole]
    assert size == whole + 1
    return torch.cat([sequences[:, :whole], tail], dim=1)


def pack(states: Tensor, bits: float, state_bits: int) -> Tensor:
    """Undo `states`.

    Args:
        states: (sequences, length), any integer dtype, each of whose neighbours fit together, the last and the first
            included.
    Returns:
        (sequences, bytes), uint8.
    """
    count, length = states.shape
    place = ends(length, bits)
    circle = place[-1]
    stream = states.new_zeros((count, -(-circle // 8) * 8), dtype=torch.uint8)
    for t, (end, new) in enumerate(zip(place, new_bits(length, bits), strict=True)):
        for bit in range(new):
            stream[:, end - new + bit] = (states[:, t] >> (state_bits - new + bit)) & 1
    weights = 1 << torch.arange(8, dtype=torch.int32, device=states.device)
    packed: Tensor = (stream.view(count, -1, 8).int() * weights).sum(2).to(torch.uint8)
    return packed
