"""The block-sparse kernel against float64, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels import block_sparse_matmul as module
from layerwise.kernels.block_sparse import BlockSparse
from layerwise.kernels.block_sparse_matmul import block_sparse_matmul
from layerwise.kernels.configs import config_for

Error = Callable[[Tensor, Tensor], float]

BOUND = 1e-3
"""Of the relative Frobenius error: the result is rounded to 11 bits (2.8e-4 at most), sums are in float32."""


def packed_weight(
    n: int, k: int, bits: int, group_size: int, block: tuple[int, int], density: float = 0.5, sym: bool = True
) -> BlockSparse:
    generator = torch.Generator().manual_seed(n + k + bits)
    groups = 1 if group_size == -1 else -(-k // group_size)
    return BlockSparse.pack(
        torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8),
        (torch.rand(n, groups, generator=generator) / 16 + 0.01).half(),
        torch.rand(-(-n // block[0]), -(-k // block[1]), generator=generator) < density,
        None if sym else torch.randint(0, 2**bits, (n, groups), generator=generator, dtype=torch.uint8),
        bits=bits,
        group_size=group_size,
        block=block,
    )


def activations(m: int, k: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


@pytest.mark.parametrize(
    ("m", "n", "k", "bits", "group_size", "block", "sym"),
    [
        (1, 100, 512, 4, 128, (64, 128), True),
        (3, 64, 700, 4, 128, (64, 256), False),
        (17, 50, 256, 4, 64, (32, 128), True),
        (1, 130, 384, 4, 32, (16, 128), False),
        (2, 70, 600, 2, 64, (64, 256), True),
        (5, 40, 512, 2, 128, (32, 256), False),
        (1, 64, 512, 3, 128, (64, 256), True),
        (2, 20, 300, 3, 64, (16, 256), False),
        (40, 64, 256, 8, -1, (64, 128), True),
        (4, 130, 200, 8, 128, (128, 128), True),
    ],
    ids=str,
)
def test_it_multiplies(
    guard: Any,
    device: torch.device,
    relative_error: Error,
    m: int,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    block: tuple[int, int],
    sym: bool,
) -> None:
    packed, x = packed_weight(n, k, bits, group_size, block, 0.6, sym), activations(m, k)
    with guard:
        y = block_sparse_matmul(guard.around(x.to(device)), guard.around(packed.to(device)))
    assert y.shape == (m, n)
    assert relative_error(y.cpu(), x.double() @ packed.dense().double().T) <= BOUND


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_kept_and_everything_kept(
    guard: Any, device: torch.device, relative_error: Error, density: float
) -> None:
    packed, x = packed_weight(96, 384, 4, 128, (32, 128), density), activations(2, 384)
    with guard:
        y = block_sparse_matmul(guard.around(x.to(device)), guard.around(packed.to(device)))
    assert relative_error(y.cpu(), x.double() @ packed.dense().double().T) <= BOUND


def test_uneven_tiles_are_shared_among_any_number_of_programs(
    guard: Any, device: torch.device, relative_error: Error, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    codes = torch.randint(0, 16, (48, 512), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale = torch.full((48, 4), 0.1).half()
    packed = BlockSparse.pack(codes, scale, keep, bits=4, group_size=128, block=(16, 128))
    x = activations(2, 512)
    for programs in (1, 6, 1000):
        few = replace(config_for(90, 4, 128, 2), programs=programs)
        monkeypatch.setattr(module, "config_for", lambda *case, few=few: few)
        with guard:
            y = block_sparse_matmul(x.to(device), guard.around(packed.to(device)))
        assert relative_error(y.cpu(), x.double() @ packed.dense().double().T) <= BOUND


def test_the_same_input_gives_the_same_bits(device: torch.device) -> None:
    x, packed = activations(2, 512).to(device), packed_weight(64, 512, 4, 128, (32, 128)).to(device)
    assert torch.equal(block_sparse_matmul(x, packed), block_sparse_matmul(x, packed))


def test_what_it_cannot_take_is_refused(device: torch.device) -> None:
    packed = packed_weight(64, 256, 4, 128, (64, 128)).to(device)
    x = activations(65, 256).to(device)
    with pytest.raises(UsageError, match="at most 64 rows of activations, not 65"):
        block_sparse_matmul(x, packed)
    with pytest.raises(UsageError, match="must be m x 256"):
        block_sparse_matmul(x[:2, :200], packed)
    assert block_sparse_matmul(x[:0], packed).shape == (0, 64)


@pytest.mark.parametrize(
    ("bits", "group_size", "block"),
    [(4, 16, (64, 128)), (8, 48, (64, 384)), (4, 96, (64, 384)), (4, 192, (64, 384)), (8, 16, (16, 64))],
    ids=str,
)
def test_groups_that_do_not_fit_the_steps_of_the_kernel_are_refused(
    device: torch.device, bits: int, group_size: int, block: tuple[int, int]
) -> None:
    packed = packed_weight(64, 768, bits, group_size, block).to(device)
    with pytest.raises(UsageError, match=f"groups of {group_size} columns do not fit into blocks of"):
        block_sparse_matmul(activations(1, 768).to(device), packed)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whatever_groups_are_not_refused_are_right(device: torch.device, relative_error: Error, bits: int) -> None:
    """All that can be packed with blocks of so many columns."""
    columns, accepted = 768, []
    for group_size in (size for size in range(16, columns + 1, 16) if columns % size == 0):
        try:
            packed = packed_weight(16, columns, bits, group_size, (16, columns), 1.0, sym=False)
        except UsageError:
            continue
        if module.refuses(packed, 2) is None:
            accepted.append(group_size)
            x = activations(2, columns)
            y = block_sparse_matmul(x.to(device), packed.to(device))
            assert relative_error(y.cpu(), x.double() @ packed.dense().double().T) <= BOUND, f"groups of {group_size}"
    assert {64, 128, 256} <= set(accepted)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_weights_on_a_gpu(
    device: torch.device, relative_error: Error, bits: int, m: int, dtype: torch.dtype
) -> None:
    packed, x = packed_weight(2000, 4096, bits, 128, (64, 256)), activations(m, 4096, dtype)
    y = block_sparse_matmul(x.to(device), packed.to(device))
    bound = BOUND if dtype == torch.float16 else 2**-8  # bfloat16 rounds the result to 8 bits
    assert relative_error(y.cpu(), x.double() @ packed.dense().double().T) <= bound
