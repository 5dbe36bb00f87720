"""Codes of 1 to 8 bits, packed into 32-bit words.

Each row is one stream of bits: code i takes bits i·b to (i+1)·b - 1, least significant bit first, and the stream is cut
into words, the last one padded with zeros. This is the `pack-quantized` layout of compressed-tensors since 0.18, so an
export copies the words as they are. Nothing is wasted at 3, 5, 6 or 7 bits, where a code may straddle two words.

32 codes fill exactly b words, so every place in that period has its own constant shift and 32 strided tensor operations
do a matrix of any size; gathering by index is three to seven times slower (1024 × 4096, one CPU thread). Left out:
layouts shuffled for one particular kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

WORD = 32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes row by row.

    Args:
        codes: (rows, n), any integer dtype, each in 0 .. 2**bits - 1 (not checked: a larger one spills into its
            neighbours).
        bits: 1 to 8.
    Returns:
        (rows, ceil(n · bits / 32)), int32.
    Source: compressed-tensors 0.20, `pack-quantized`.
    """
    rows, n = codes.shape
    periods = pad(codes, (0, -n % WORD)).view(rows, -1, WORD)
    words = codes.new_zeros((rows, periods.shape[1], bits), dtype=torch.int64)
    for place in range(WORD):
        word, shift = divmod(place * bits, WORD)
        code = periods[..., place].to(torch.int64) << shift
        words[..., word] |= code & 0xFFFFFFFF
        if shift + bits > WORD:  # the code straddles two words
            words[..., word + 1] |= code >> WORD
    return words.view(rows, -1)[:, : words_per_row(n, bits)].to(torch.int32)


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """Undo `pack`.

    Args:
        words: (rows, ceil(n · bits / 32)), int32.
        bits: 1 to 8.
        n: codes per row.
    Returns:
        (rows, n), uint8.
    """
    rows, n_words = words.shape
    if n_words != words_per_row(n, bits):
        raise ValueError(f"{n} codes of {bits} bits take {words_per_row(n, bits)} words a row, not {n_words}")
    periods = pad(words, (0, -n_words % bits)).view(rows, -1, bits)
    codes = words.new_empty((rows, periods.shape[1], WORD), dtype=torch.uint8)
    for place in range(WORD):
        word, shift = divmod(place * bits, WORD)
        code = periods[..., word] >> shift  # copies the sign into the upper bits; the masks cut it off again
        if shift + bits > WORD:
            low = WORD - shift
            code = (code & ((1 << low) - 1)) | (periods[..., word + 1] << low)
        codes[..., place] = code & ((1 << bits) - 1)
    return codes.view(rows, -1)[:, :n].contiguous()


def words_per_row(n: int, bits: int) -> int:
    """How many 32-bit words hold n codes."""
    return -(-n * bits // WORD)
