"""Random orthogonal matrices that are never written down: signs and fast Walsh-Hadamard transforms.

    R x = F₂ S₂ F₁ S₁ x

S₁ and S₂ are random signs, F₁ a Hadamard matrix (scaled to be orthogonal) of the first P entries of x, F₂ of the last
P, where P is the greatest power of two up to the width n. Where the width is a power of two, F₁ reaches every entry,
and F₂ and S₂ are left out: the randomized Hadamard transform of QuIP# (arXiv:2402.04396, section 3). Two transforms
that overlap serve every other width, for more than half of the entries are in each: no Hadamard matrix of odd parts
need be known (QuIP#), and no width is refused.

Signs are computed from the seed by integer arithmetic, and a transform is additions in a fixed order: the result is the
same bit for bit on every machine and device, in each dtype.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def rotate(x: Tensor, seed: int) -> Tensor:
    """R x, for every vector along the last axis.

    Args:
        x: (..., n), any float dtype; not changed.
        seed: two seeds give two matrices; one seed and width give the same one.
    Returns:
        as x.
    """
    n = x.shape[-1]
    power = power_of_two(n)
    y = x * signs(n, 2 * seed, x.device).to(x.dtype)
    y[..., :power] = transform(y[..., :power])
    if power < n:
        y *= signs(n, 2 * seed + 1, x.device).to(x.dtype)
        y[..., n - power :] = transform(y[..., n - power :])
    return y


def unrotate(y: Tensor, seed: int) -> Tensor:
    """Rᵀ y, which undoes `rotate`; arguments and result as there."""
    n = y.shape[-1]
    power = power_of_two(n)
    x = y.clone()
    if power < n:
        x[..., n - power :] = transform(x[..., n - power :])
        x *= signs(n, 2 * seed + 1, y.device).to(y.dtype)
    x[..., :power] = transform(x[..., :power])
    x *= signs(n, 2 * seed, y.device).to(y.dtype)
    return x


def rotate_both(weight: Tensor, seed: int) -> Tensor:
    """R_out W R_inᵀ: what a weight becomes whose inputs and outputs are turned.

    Args:
        weight: (out, in), any float dtype; not changed.
        seed: of both; all weights that read one input share its rotation.
    """
    return rotate(rotate(weight, 2 * seed).T.contiguous(), 2 * seed + 1).T.contiguous()


def unrotate_both(weight: Tensor, seed: int) -> Tensor:
    """R_outᵀ W R_in, which undoes `rotate_both`."""
    return unrotate(unrotate(weight, 2 * seed).T.contiguous(), 2 * seed + 1).T.contiguous()


def transform(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform, scaled to be orthogonal, along the last axis.

    Args:
        x: (..., P), P a power of two; not changed.
    """
    power = x.shape[-1]
    y = x.reshape(-1, power)
    half = 1
    while half < power:
        pairs = y.view(-1, power // (2 * half), 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack([first + second, first - second], dim=2).view(-1, power)
        half *= 2
    scaled: Tensor = y * power**-0.5
    return scaled.view(x.shape)


def power_of_two(n: int) -> int:
    """The greatest power of two up to n."""
    return 1 << (n.bit_length() - 1)


@cache
def signs(n: int, seed: int, device: torch.device | None = None) -> Tensor:
    """(n,) float32 of ±1: the lowest bit of a hash of place and seed (the finalizer of lowbias32)."""
    x = (torch.arange(n, dtype=torch.int64, device=device) + ((seed + 1) * 0x9E3779B9 & MASK)) & MASK
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) & MASK
    return (1 - 2 * ((x ^ (x >> 15)) & 1)).float()
