"""The Viterbi algorithm on the bitshift trellis: the sequence of states whose values come closest to given weights.

Many sequences are worked on side by side, state by state along the first axis and sequence by sequence along the last,
so that the least over predecessors and the error of every state are a few passes over contiguous memory, on a CPU as on
a GPU. A pass keeps the least cost of every set of predecessors, not which of them it came from: on the way back that is
found again for the few states of the path, from the same numbers.

The bits of a sequence are a circle, so its first and its last state must fit together. Trying every way to close it
would take 2^(L - k) passes; two are enough in practice (QTIP, arXiv:2406.11235, algorithm 4): the first finds the best
path over the seam, the second the whole path through what the first had there. QTIP's first pass is over the whole
sequence, turned by half of it. A window around the seam does as well, for paths that start anywhere soon meet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.kernels.trellis_code import new_bits, values

if TYPE_CHECKING:
    from torch import Tensor

SEAM = 32
"""Weights on each side of the seam that the first pass looks at. Mean squared error at 2 bits and 2^12 states, on 256
Gaussian sequences: 0.0746 with 32, 0.0742 with the whole sequence."""

MEMORY = {"cpu": 1 << 28, "cuda": 1 << 32}
"""Bytes that one batch of sequences may take for its least costs."""

CACHE = {"cpu": 1 << 20, "cuda": 1 << 32}
"""Bytes that the costs of one batch may take, so that they stay in a cache."""


@dataclass(frozen=True)
class Trellis:
    """The code that is searched.

    Args:
        bits: of a weight, a multiple of 1/8.
        state_bits: L; there are 2^L states.
    """

    bits: float
    state_bits: int

    def encode(self, x: Tensor, weight: Tensor) -> Tensor:
        """The states whose values are nearest to x, in the sum of weighted squares.

        Args:
            x: (length, sequences), float32, in the unit of the values.
            weight: (length, sequences), float32, how much each error counts; zero where it does not.
        Returns:
            (sequences, length), int64.
        """
        import torch

        batch = self._batch(x)
        parts = zip(x.split(batch, dim=1), weight.split(batch, dim=1), strict=True)
        return torch.cat([self._encode(part.contiguous(), w.contiguous()) for part, w in parts], dim=1).T

    def _batch(self, x: Tensor) -> int:
        states, kind = 1 << self.state_bits, x.device.type
        history = 4 * len(x) * (states >> int(self.bits))
        return max(1, min(MEMORY[kind] // history, CACHE[kind] // (4 * states)))

    def _encode(self, x: Tensor, weight: Tensor) -> Tensor:
        import torch

        length = len(x)
        shifts = new_bits(length, self.bits)
        half = min(SEAM, length // 2)
        seam = slice(length - half, length), slice(0, half)
        x_there, weight_there = (torch.cat([part[seam[0]], part[seam[1]]]) for part in (x, weight))
        first = self._path(x_there, weight_there, [*shifts[seam[0]], *shifts[seam[1]]], None)
        overlap = first[half] & ((1 << self.state_bits - shifts[0]) - 1)
        return self._path(x, weight, shifts, overlap)

    def _path(self, x: Tensor, weight: Tensor, shifts: list[int], overlap: Tensor | None) -> Tensor:
        """The best path, (length, sequences); through an overlap of its ends, (sequences,), if there is one."""
        import torch

        length, batch = x.shape
        states = 1 << self.state_bits
        value = values(self.state_bits, x.device)[:, None]
        square = value * value
        linear = -2 * x * weight  # w (x - v)² without w x², which all states have
        least = [x.new_zeros((states >> shifts[0], batch))]
        if overlap is not None:
            least[0].fill_(torch.inf).scatter_(0, overlap[None], 0)
        cost = x.new_empty((states, batch))
        for t, shift in enumerate(shifts):
            shared = states >> shift  # states that have the bits in common which were there before
            if t:
                least.append(cost.view(shared, 1 << shift, batch).amin(1))
            new, old = (1 << shift, shared, batch), least[t][None]
            torch.addcmul(old, square.view(*new[:2], 1), weight[t], out=cost.view(new))
            cost.addcmul_(value, linear[t])

        path = torch.empty((length, batch), dtype=torch.int64, device=x.device)
        if overlap is None:
            path[-1] = cost.argmin(0)
        else:
            path[-1] = _best(overlap, shifts[0], lambda state: cost.gather(0, state))
        flat_value, flat_square = value[:, 0], square[:, 0]
        for t in range(length - 1, 0, -1):

            def before(state: Tensor, t: int = t - 1) -> Tensor:
                mask = (states >> shifts[t]) - 1
                found = torch.addcmul(least[t].gather(0, state & mask), flat_square[state], weight[t])
                return found.addcmul_(flat_value[state], linear[t])

            path[t - 1] = _best(path[t] & ((states >> shifts[t]) - 1), shifts[t], before)
        return path


def _best(shared: Tensor, shift: int, cost: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the states whose upper bits are given, (sequences,), the one of the least cost."""
    import torch

    lower = torch.arange(1 << shift, device=shared.device)[:, None]
    state = (shared << shift) + lower
    return state.gather(0, cost(state).argmin(0, keepdim=True))[0]
