"""Paths against a search over all of them, and the code against its published errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from layerwise.kernels.trellis_code import new_bits, pack, states, values
from layerwise.stages.compress import viterbi
from layerwise.stages.compress.trellis import SPREAD
from layerwise.stages.compress.viterbi import Trellis


def gaussian(length: int, sequences: int, seed: int = 0) -> Tensor:
    return torch.randn((length, sequences), generator=torch.Generator().manual_seed(seed))


def every_circle(length: int, bits: float, state_bits: int) -> Tensor:
    """The states of all circles of bits: (circles, length)."""
    circle = sum(new_bits(length, bits))
    every = torch.tensor(list(itertools.product([0, 1], repeat=circle)), dtype=torch.uint8)
    every = torch.nn.functional.pad(every, (0, -circle % 8)).view(len(every), -1, 8)
    sequences = (every << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)
    return states(sequences, length, bits, state_bits)


@pytest.mark.parametrize(("length", "bits", "state_bits"), [(12, 1, 4), (6, 2, 5), (7, 1.5, 4), (5, 2.5, 6)])
def test_a_path_closes_and_none_is_better_of_those_that_close_so(length: int, bits: float, state_bits: int) -> None:
    x = gaussian(length, 24)
    weight = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    found = Trellis(bits, state_bits).encode(x, weight)
    assert torch.equal(states(pack(found, bits, state_bits), length, bits, state_bits).long(), found)
    every = every_circle(length, bits, state_bits)
    overlap = (1 << state_bits - new_bits(length, bits)[0]) - 1
    best_of_all = 0
    for one, w, path in zip(x.T, weight.T, found, strict=True):
        errors = (w * (values(state_bits)[every] - one).square()).sum(1)
        error = (w * (values(state_bits)[path] - one).square()).sum()
        alike = every[:, 0] & overlap == path[0] & overlap
        assert error <= errors[alike].min() + 1e-5  # float32, sums of up to 12
        best_of_all += int(error <= errors.min() + 1e-5)
    assert best_of_all >= 8  # a third, of sequences that are all seam


def test_batches_do_not_change_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(40, 7)
    whole = Trellis(2, 10).encode(x, torch.ones_like(x))
    monkeypatch.setattr(viterbi, "CACHE", {"cpu": 3 * 4 * 1024})
    assert torch.equal(Trellis(2, 10).encode(x, torch.ones_like(x)), whole)


def test_weights_that_do_not_count_leave_the_others_free() -> None:
    x = gaussian(256, 8)
    weight = torch.ones_like(x)
    weight[1::2] = 0
    trellis, table = Trellis(2, 10), values(10)
    error = (table[trellis.encode(x, weight)].T - x).square()[::2].mean()
    among_all = (table[trellis.encode(x, torch.ones_like(x))].T - x).square()[::2].mean()
    assert error < among_all / 3  # each of those that count has about four bits now


PUBLISHED = [
    # Tail-biting sequences of 256, k bits, L = 12: table 2 of QTIP, arXiv:2406.11235; and 1MAD with L = 16, table 1.
    pytest.param(1, 12, 0.2803, 64, id="1 bit"),
    pytest.param(2, 12, 0.0733, 64, id="2 bits"),
    pytest.param(3, 12, 0.0198, 64, id="3 bits"),
    pytest.param(2, 16, 0.069, 16, id="2 bits, 2^16 states", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("bits", "state_bits", "published", "sequences"), PUBLISHED)
def test_a_gaussian_source_has_the_published_error(
    bits: float, state_bits: int, published: float, sequences: int
) -> None:
    x = gaussian(256, sequences, seed=3)
    scaled = x * SPREAD[bits]
    found = values(state_bits)[Trellis(bits, state_bits).encode(scaled, torch.ones_like(x))].T / SPREAD[bits]
    error = ((found - x).square().mean() / x.square().mean()).item()
    assert error > 2 ** (-2 * bits)  # the rate-distortion bound
    assert error == pytest.approx(published, rel=0.03)  # of 4096 weights, twice the standard deviation


def test_half_a_bit_lies_between_its_neighbours() -> None:
    x = gaussian(256, 16)
    errors = []
    for bits in (1, 1.5, 2, 2.5, 3, 3.5, 4):
        found = values(10)[Trellis(bits, 10).encode(1.1 * x, torch.ones_like(x))].T / 1.1
        errors.append((found - x).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    for before, error, after in zip(errors[:-1:2], errors[1::2], errors[2::2], strict=True):
        assert error == pytest.approx((before * after) ** 0.5, rel=0.1)
