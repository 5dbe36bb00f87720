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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

FEW = 16
"""A batch of fewer sequences takes longer than one after another, where a step is long: no run of sequences fills a
vector. With 2^15 states 90 s for a million weights in batches of 8, 73 s one by one (`benchmarks/trellis.py`)."""


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
        fitting = min(MEMORY[kind] // history, CACHE[kind] // (4 * states))
        return fitting if fitting >= FEW else 1

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

        batch = x.shape[1]
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
                least.append(_least(cost.view(shared, 1 << shift, batch)))
            new, old = (1 << shift, shared, batch), least[t][None]
            torch.addcmul(old, square.view(*new[:2], 1), weight[t], out=cost.view(new))
            cost.addcmul_(value, linear[t])
        if overlap is None:
            last = cost.argmin(0)
        else:
            ends = (overlap << shifts[0]) + torch.arange(1 << shifts[0], device=x.device)[:, None]
            last = ends.gather(0, cost.gather(0, ends).argmin(0, keepdim=True))[0]
        return _way_back(last, least, shifts, value[:, 0], weight, linear)


def _least(costs: Tensor) -> Tensor:
    """The least over the middle axis, (shared, ways, batch). Torch's own reduction takes three times as long for more
    than one sequence, for it does not vectorize along the last axis."""
    import torch

    if costs.shape[2] == 1:
        return costs.amin(1)
    while costs.shape[1] > 1:  # a power of two
        costs = torch.minimum(*costs.chunk(2, dim=1))
    return costs[:, 0]


def _way_back(
    last: Tensor, least: Sequence[Tensor], shifts: Sequence[int], value: Tensor, weight: Tensor, linear: Tensor
) -> Tensor:
    """The path that ends in a state of the last weight, (length, sequences).

    Args:
        last: (sequences,), the state of the last weight.
        least: by weight, the least cost before it, of every set of states that share their lower bits.
        shifts: new bits of each weight.
        value: (states,).
        weight, linear: (length, sequences), by which the square of a value and the value itself are multiplied.
    """
    import torch

    path = torch.empty((len(least), len(last)), dtype=torch.int64, device=last.device)
    which = torch.arange(len(last), device=last.device)
    lower = {shift: torch.arange(1 << shift, device=last.device)[:, None] for shift in set(shifts)}
    state, way, value_, weight_, linear_, which_ = map(_light, (last, path, value, weight, linear, which))
    least_, lower_ = [_light(costs) for costs in least], {shift: _light(low) for shift, low in lower.items()}
    square, states = value_ * value_, len(value_)
    way[-1] = state
    for t in range(len(least) - 2, -1, -1):
        shift = shifts[t + 1]
        options = ((state & ((states >> shift) - 1)) << shift) + lower_[shift]  # states before it, (ways, sequences)
        known = least_[t][options & ((states >> shifts[t]) - 1), which_]
        cost = known + square[options] * weight_[t] + value_[options] * linear_[t]
        way[t] = state = options[cost.argmin(0), which_]
    return path


def _light(tensor: Tensor) -> Any:
    """What steps of few numbers are made with: on a CPU numpy, whose calls take a third of the time of torch's."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor
