"""Rotations are orthogonal, known where a Hadamard matrix is, flat elsewhere, and the same bit for bit."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard

from layerwise.kernels.hadamard import rotate, rotate_both, signs, transform, unrotate, unrotate_both

PINNED = [1, 1, -1, 1, -1, -1, 1, -1, 1, 1, 1, -1, 1, 1, -1, -1]
"""The first signs of seed 0: levels on disk depend on them."""

WIDTHS = [1, 2, 3, 20, 64, 172, 257, 384]


@pytest.mark.parametrize("n", WIDTHS)
def test_a_rotation_is_orthogonal_and_undone_by_its_transpose(n: int) -> None:
    eye = torch.eye(n, dtype=torch.float64)
    R = rotate(eye, 3).T
    assert torch.allclose(R @ R.T, eye, atol=1e-13)  # float64, sums of 2 log2 n terms
    x = torch.randn((4, n), dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    assert torch.allclose(rotate(x, 3), x @ R.T, atol=1e-13)
    assert torch.allclose(unrotate(x, 3), x @ R, atol=1e-13)


def test_a_power_of_two_has_its_hadamard_matrix() -> None:
    x = torch.randn((3, 64), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H = torch.from_numpy(hadamard(64)).double() / 8
    assert torch.allclose(transform(x), x @ H, atol=1e-13)
    assert torch.allclose(rotate(x, 0), (x * signs(64, 0).double()) @ H, atol=1e-13)


@pytest.mark.parametrize("n", [20, 172, 257, 384])
def test_no_input_stands_out_after_a_rotation_of_any_width(n: int) -> None:
    R = rotate(torch.eye(n), 0)
    # Entries of a random orthogonal matrix are about normal, with 1 / sqrt(n); 5 is beyond all of so many.
    assert R.abs().max() * n**0.5 < 5


def test_a_rotation_is_the_same_on_every_machine() -> None:
    assert signs(16, 0).tolist() == PINNED
    assert signs(64, 1).tolist() != signs(64, 2).tolist()
    assert abs(signs(4096, 5).mean().item()) < 5 / 64  # five standard deviations
    x = torch.arange(20, dtype=torch.float32)
    assert torch.equal(rotate(x, 7), rotate(x[None].expand(3, 20), 7)[1])  # whatever stands beside it


def test_a_weight_is_turned_on_both_sides() -> None:
    W = torch.randn((12, 20), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned = rotate_both(W, 4)
    left, right = rotate(torch.eye(12).double(), 9).T, rotate(torch.eye(20).double(), 8).T
    assert torch.allclose(turned, left @ W @ right.T, atol=1e-13)
    assert torch.allclose(unrotate_both(turned, 4), W, atol=1e-13)
