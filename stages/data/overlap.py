"""How much of a text stands in another, too, wherever it stands there and however its lines are broken.

A text is taken as its words with one space between them. Passages of equal length of the one are looked for at every
place of the other by a rolling hash (Karp and Rabin, 1987; polynomial, modulo 2^64), and what is found is compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PASSAGE = 256
"""Bytes of a passage: sentences agree by chance, paragraphs do not."""

BLOCK = 2**20
"""Places of the other text that are hashed at a time."""

_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Overlap:
    """What two texts have in common.

    Args:
        passages: that one text was taken apart into.
        shared: how many of them the other text holds.
        first: the first of those.
    """

    passages: int
    shared: int
    first: str

    @property
    def share(self) -> float:
        """Of the text."""
        return self.shared / self.passages


def overlap(text: str, other: str, passage: int = PASSAGE) -> Overlap:
    """How much of a text another one holds.

    Args:
        text: taken apart into passages, the rest at its end left out; one passage if it is shorter.
        other: looked through at every byte.
        passage: bytes of one.
    """
    mine, theirs = _words(text), _words(other)
    length = min(passage, len(mine))
    if length == 0 or len(theirs) < length:
        return Overlap(max(1, len(mine) // max(1, length)), 0, "")
    starts = np.arange(len(mine) // length) * length
    wanted = _hashes(mine, length)[starts]
    places = _places(theirs, length, np.unique(wanted))
    passages = [mine[start : start + length] for start in starts]
    shared = [
        part
        for part, key in zip(passages, wanted.tolist(), strict=True)
        if theirs.startswith(part, places.get(key, len(theirs)))
    ]
    return Overlap(len(passages), len(shared), shared[0].decode(errors="replace") if shared else "")


def _words(text: str) -> bytes:
    return " ".join(text.split()).encode()


def _places(text: bytes, length: int, wanted: NDArray[np.uint64]) -> dict[int, int]:
    """Where a passage with one of some hashes begins, by hash; the first such place."""
    found: dict[int, int] = {}
    ends = np.zeros(2**24, dtype=bool)  # of the hashes that are wanted: most places are out by a look at this
    ends[wanted >> np.uint64(40)] = True
    for start in range(0, len(text) - length + 1, BLOCK):
        hashes = _hashes(text[start : start + BLOCK + length - 1], length)
        maybe = np.flatnonzero(ends[hashes >> np.uint64(40)])
        for place in maybe[np.isin(hashes[maybe], wanted)].tolist():
            found.setdefault(int(hashes[place]), start + place)
    return found


def _hashes(text: bytes, length: int) -> NDArray[np.uint64]:
    """Of the passages that begin at each byte, those that are whole: (bytes - length + 1,).

    With weights b^i for the byte at i, the passage at i has (S[i + length] - S[i]) b^-i; an odd b has an inverse.
    """
    values = np.frombuffer(text, dtype=np.uint8).astype(np.uint64) + np.uint64(1)
    powers = _powers(_BASE, len(text))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers, dtype=np.uint64)])
    inverse = np.uint64(pow(int(_BASE), -1, 2**64))
    hashes: NDArray[np.uint64] = (sums[length:] - sums[:-length]) * _powers(inverse, len(text) - length + 1)
    return hashes


def _powers(base: np.uint64, count: int) -> NDArray[np.uint64]:
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)
