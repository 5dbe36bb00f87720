"""The fused low-rank kernel and its other forms against float64, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels import low_rank_matmul as module
from layerwise.kernels.block_sparse import BlockSparse
from layerwise.kernels.configs import config_for
from layerwise.kernels.dense import Dense
from layerwise.kernels.low_rank import LowRank
from layerwise.kernels.low_rank_matmul import form, low_rank_matmul
from layerwise.kernels.n_m_sparse import NMSparse
from layerwise.kernels.packed import Packed
from layerwise.kernels.quantized import Quantized
from layerwise.kernels.split_k import counters
from layerwise.kernels.unstructured import Unstructured

Error = Callable[[Tensor, Tensor], float]

BOUND = 1e-3
"""Of the relative Frobenius error: the result is rounded to 11 bits (2.8e-4 at most), sums are in float32; where there
are two launches also t and the result of the base."""


def quantized(n: int, k: int, bits: int = 4, group_size: int = 128, sym: bool = True, order: bool = False) -> Quantized:
    generator = torch.Generator().manual_seed(n + k)
    groups = 1 if group_size == -1 else -(-k // group_size)
    return Quantized.pack(
        torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8),
        (torch.rand(n, groups, generator=generator) / 2**bits).half(),
        None if sym else torch.randint(0, 2**bits, (n, groups), generator=generator, dtype=torch.uint8),
        bits=bits,
        group_size=group_size,
        order=torch.randperm(k, generator=generator) if order else None,
    )


def low_rank(base: Packed | None, shape: tuple[int, int], rank: int, dtype: torch.dtype = torch.float16) -> LowRank:
    generator = torch.Generator().manual_seed(rank)
    A = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
    B = torch.randn(shape[0], rank, generator=generator)
    return LowRank(shape, A.to(dtype), B.to(dtype), base)


def activations(m: int, k: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


def exact(x: Tensor, packed: LowRank) -> Tensor:
    base = 0 if packed.base is None else packed.base.dense().double()
    return x.double() @ (base + packed.B.double() @ packed.A.double()).T


@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "base"),
    [
        (1, 72, 512, 16, {}),
        (3, 130, 300, 5, {"sym": False}),
        (16, 40, 256, 33, {"group_size": 64}),
        (2, 50, 384, 20, {"order": True}),
        (1, 64, 600, 64, {"bits": 2}),
        (2, 30, 256, 1, {"bits": 8, "group_size": -1}),
        (1, 48, 512, 40, {"bits": 3}),
    ],
    ids=str,
)
def test_the_fused_kernel_multiplies_by_both(
    guard: Any, device: torch.device, relative_error: Error, m: int, n: int, k: int, rank: int, base: dict[str, Any]
) -> None:
    packed, x = low_rank(quantized(n, k, **base), (n, k), rank), activations(m, k)
    assert form(packed, m, x.dtype) == "fused"
    with guard:
        y = low_rank_matmul(guard.around(x.to(device)), guard.around(packed.to(device)))
    assert y.shape == (m, n)
    assert relative_error(y.cpu(), exact(x, packed)) <= BOUND
    assert not counters(1, y.device).any()


def test_large_projections_lose_no_digits(device: torch.device, relative_error: Error) -> None:
    """B takes most of t away again, so what is left shows how exact t was."""
    generator = torch.Generator().manual_seed(0)
    A, x = torch.randn(2, 256, generator=generator).half(), activations(1, 256)
    A[1] = A[0]
    A[1, 0] += 0.125
    B = torch.tensor([[100.0, -100.0]]).half().expand(40, 2).contiguous()
    base = quantized(40, 256)
    packed = LowRank((40, 256), A, B, replace(base, scale=base.scale * 0))
    y = low_rank_matmul(x.to(device), packed.to(device))
    assert relative_error(y.cpu(), exact(x, packed)) <= BOUND


@pytest.mark.parametrize("programs", [1, 100])
def test_splits_and_single_programs_agree(
    guard: Any, device: torch.device, relative_error: Error, monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    monkeypatch.setattr(module, "config_for", lambda *case: replace(config_for(*case), programs=programs))
    packed, x = low_rank(quantized(150, 384), (150, 384), 24), activations(2, 384)
    with guard:
        y = low_rank_matmul(x.to(device), guard.around(packed.to(device)))
    assert relative_error(y.cpu(), exact(x, packed)) <= BOUND


@pytest.mark.parametrize("patience", [0, 3])
def test_whoever_waits_too_long_computes_the_projections_itself(
    guard: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
    """Programs run from the last to the first, so nothing of t is there when the tiles of y want it."""
    if device.type == "cuda":
        pytest.skip("a GPU orders programs as it likes")
    from triton.runtime.interpreter import interpreter_builder

    packed, x = low_rank(quantized(140, 256), (140, 256), 20), activations(2, 256)
    y = low_rank_matmul(x, packed)
    number, seen = interpreter_builder.set_grid_idx, []

    def from_the_last(place: int, *others: int) -> None:
        seen.append(interpreter_builder.grid_dim[0] - 1 - place)
        number(seen[-1], *others)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", from_the_last)
    monkeypatch.setattr(module, "PATIENCE", patience)
    with guard:
        assert torch.equal(low_rank_matmul(x, packed), y)
    assert seen == sorted(seen, reverse=True)
    assert len(seen) > 3
    assert not counters(1, device).any()


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16])
def test_programs_without_patience_agree_on_a_gpu(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, m: int
) -> None:
    packed = low_rank(quantized(4096, 4096), (4096, 4096), 64).to(device)
    x = activations(m, 4096).to(device)
    y = low_rank_matmul(x, packed)
    monkeypatch.setattr(module, "PATIENCE", 0)
    for _ in range(100):
        assert torch.equal(low_rank_matmul(x, packed), y)
    assert not counters(1, x.device).any()


def test_the_same_input_gives_the_same_bits(device: torch.device) -> None:
    packed, x = low_rank(quantized(72, 512), (72, 512), 32).to(device), activations(2, 512).to(device)
    assert torch.equal(low_rank_matmul(x, packed), low_rank_matmul(x, packed))


@pytest.mark.parametrize(("base", "name"), [({}, "separate"), (None, "factors")])
def test_more_rows_or_factors_alone_multiply_too(
    device: torch.device, relative_error: Error, base: dict[str, Any] | None, name: str
) -> None:
    packed, x = low_rank(None if base is None else quantized(40, 256, **base), (40, 256), 8), activations(17, 256)
    assert form(packed, 17, x.dtype) == name
    assert relative_error(low_rank_matmul(x.to(device), packed.to(device)).cpu(), exact(x, packed)) <= BOUND


def based(format: str) -> Packed:
    """A weight of 40 x 256 in each format that has a kernel."""
    sparse = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)).half()
    sparse[:, ::2] = 0
    if format == "block_sparse":
        whole, keep = quantized(40, 256), torch.tensor([[True, False], [False, True]])
        return BlockSparse.pack(whole.codes(), whole.scale[:, :40].T, keep, bits=4, group_size=128, block=(32, 128))
    made = {"quantized": lambda: quantized(40, 256), "n_m_sparse": lambda: NMSparse.pack(sparse)}
    return made[format]() if format in made else Unstructured.pack(sparse)


@pytest.mark.parametrize("format", module.BASES)
def test_an_addition_follows_every_format_of_the_table(
    device: torch.device, relative_error: Error, format: str
) -> None:
    packed, x = low_rank(based(format), (40, 256), 8, torch.float32), activations(2, 256)
    assert packed.base is not None
    assert packed.base.format == format
    assert form(packed, 2, x.dtype) == "separate"  # factors in float32 are never fused
    y = low_rank_matmul(x.to(device), packed.to(device))
    # The factors are rounded to 11 bits, as t, the result of the base and y are.
    assert relative_error(y.cpu(), exact(x, packed)) <= BOUND


def test_what_decides_the_form() -> None:
    base = quantized(40, 256)
    assert form(low_rank(base, (40, 256), 8), 16, torch.float16) == "fused"
    assert form(low_rank(base, (40, 256), 8), 17, torch.float16) == "separate"
    assert form(low_rank(base, (40, 256), 8, torch.float32), 1, torch.float16) == "separate"
    assert form(low_rank(base, (40, 256), 2048), 1, torch.float16) == "fused"
    assert form(low_rank(base, (40, 256), 2049), 1, torch.float16) == "separate"


def test_a_base_without_a_kernel_is_refused(device: torch.device) -> None:
    packed = low_rank(Dense((40, 256), torch.zeros(40, 256)), (40, 256), 8).to(device)
    with pytest.raises(UsageError, match="dense weights have no Triton kernel"):
        low_rank_matmul(activations(1, 256).to(device), packed)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [16, 64, 256])
@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_weights_on_a_gpu(
    device: torch.device, relative_error: Error, rank: int, m: int, dtype: torch.dtype
) -> None:
    packed, x = low_rank(quantized(4096, 4096), (4096, 4096), rank, dtype), activations(m, 4096, dtype)
    y = low_rank_matmul(x.to(device), packed.to(device))
    # bfloat16 rounds the result to 8 bits, and t as well in two launches.
    assert relative_error(y.cpu(), exact(x, packed)) <= (BOUND if dtype == torch.float16 else 2**-7)
    for _ in range(100):  # no program is ever left behind by the counters
        assert torch.equal(low_rank_matmul(x.to(device), packed.to(device)), y)
