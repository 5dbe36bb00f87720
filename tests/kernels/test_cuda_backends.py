"""Library products of a GPU: what they refuse, which can be asked anywhere; what they compute, on a GPU alone."""

from __future__ import annotations

import pytest
import torch

from layerwise.errors import UsageError
from layerwise.kernels import cuda_backends
from layerwise.kernels.backends import Work, find_backend, prepare
from layerwise.kernels.dense import Dense
from layerwise.kernels.n_m_sparse import NMSparse
from layerwise.kernels.packed import Packed
from layerwise.kernels.quantized import Quantized

CUDA = torch.device("cuda")


def quantized(n: int, k: int, bits: int, group_size: int, *, sym: bool = True, ordered: bool = False) -> Quantized:
    generator = torch.Generator().manual_seed(0)
    groups = 1 if group_size == -1 else -(-k // group_size)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = (0.5 + torch.rand(n, groups, generator=generator)).half() / 2**bits
    zero = None if sym else torch.randint(0, 2**bits, (n, groups), generator=generator, dtype=torch.uint8)
    order = torch.randperm(k, generator=generator) if ordered else None
    return Quantized.pack(codes, scale, zero, bits=bits, group_size=group_size, order=order)


def dense(n: int, k: int) -> Dense:
    return Dense((n, k), torch.randn(n, k, generator=torch.Generator().manual_seed(0)))


def two_of_four(n: int, k: int) -> NMSparse:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).view(n, -1, 4)
    weight.scatter_(2, weight.abs().argsort(dim=2)[..., :2], 0.0)
    return NMSparse.pack(weight.view(n, k))


def refusal(name: str, packed: Packed, dtype: torch.dtype = torch.bfloat16) -> str:
    with pytest.raises(UsageError) as raised:
        prepare(name, packed, Work(4, dtype, CUDA))
    return raised.value.message


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backends believe in a GPU, for what they refuse apart from its absence."""
    monkeypatch.setattr(cuda_backends, "_capability", lambda work: (9, 0))
    monkeypatch.setattr("torch.backends.cusparselt.is_available", lambda: True)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("name", "packed", "dtype", "said"),
    [
        ("cublas", dense(16, 16), torch.int32, "not a float"),
        ("fp8", dense(16, 16), torch.bfloat16, "dense is not exact in 8-bit floats"),
        ("fp8", quantized(16, 32, 8, -1), torch.bfloat16, "int8-channel-sym is not exact in 8-bit floats"),
        ("fp8", quantized(16, 64, 4, 32), torch.bfloat16, "32 columns to a scale"),
        ("fp8", quantized(17, 32, 4, -1), torch.bfloat16, "17 x 32 is not in multiples of 16"),
        ("fp8", quantized(16, 32, 4, -1), torch.float16, "it gives bfloat16, not torch.float16"),
        ("tinygemm", quantized(16, 128, 3, 32), torch.bfloat16, "int3-g32-sym is not a weight of 4 bits"),
        ("tinygemm", quantized(16, 128, 4, -1), torch.bfloat16, "groups must be one of 32, 64, 128, 256"),
        ("tinygemm", quantized(16, 96, 4, 32), torch.bfloat16, "16 x 96 is not in multiples of 8 x 128"),
        ("tinygemm", quantized(12, 128, 4, 32), torch.bfloat16, "12 x 128 is not in multiples of 8 x 128"),
        ("tinygemm", quantized(16, 128, 4, 32), torch.float16, "tinygemm works in bfloat16, not torch.float16"),
        ("cusparselt", dense(16, 16), torch.bfloat16, "dense is not 2:4 sparse"),
        ("cusparselt", two_of_four(16, 32), torch.float32, "not a float of 16 bits"),
        ("cusparselt", two_of_four(24, 32), torch.float16, "24 x 32 is not in multiples of 16"),
    ],
)
def test_what_a_library_cannot_take_is_refused_in_words(
    name: str, packed: Packed, dtype: torch.dtype, said: str
) -> None:
    assert said in refusal(name, packed, dtype)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("cublas", quantized(17, 33, 3, -1)),
        ("fp8", quantized(16, 32, 4, -1, sym=False)),
        ("tinygemm", quantized(16, 256, 4, 256, sym=False)),
        ("cusparselt", two_of_four(16, 32)),
    ],
)
def test_what_a_library_can_take_is_not_refused(name: str, packed: Packed) -> None:
    assert find_backend(name).refuses(packed, Work(4, torch.bfloat16, CUDA)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("name", "packed", "said"),
    [
        ("fp8", quantized(16, 32, 4, -1), "need a GPU of compute capability 8.9"),
        ("tinygemm", quantized(16, 128, 4, 32), "needs a GPU of compute capability 8.0"),
        ("cusparselt", two_of_four(16, 32), "no cuSPARSELt, or finds no GPU"),
    ],
)
def test_without_a_gpu_each_says_what_it_needs(name: str, packed: Packed, said: str) -> None:
    assert said in refusal(name, packed)


def test_differences_of_four_bit_codes_are_exact_in_eight_bit_floats() -> None:
    differences = torch.arange(-15.0, 16.0)
    assert torch.equal(differences.to(torch.float8_e4m3fn).float(), differences)


# --- on a GPU ---

BFLOAT16 = 6e-3
FP8 = 4e-2
"""Activations rounded to 3 bits of mantissa (2**-4 relative at most, uniformly spread)."""


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 200])
@pytest.mark.parametrize(
    ("name", "packed", "dtype", "bound"),
    [
        ("cublas", dense(96, 128), torch.float16, 1e-3),
        ("cublas", quantized(72, 130, 3, 64, sym=False), torch.bfloat16, BFLOAT16),
        ("fp8", quantized(96, 128, 4, -1), torch.bfloat16, FP8),
        ("fp8", quantized(96, 128, 2, -1, sym=False), torch.bfloat16, FP8),
        ("tinygemm", quantized(64, 256, 4, 32), torch.bfloat16, BFLOAT16),
        ("tinygemm", quantized(64, 256, 4, 128, sym=False), torch.bfloat16, 3 * BFLOAT16),
        ("tinygemm", quantized(64, 256, 4, 64, ordered=True), torch.bfloat16, BFLOAT16),
        ("cusparselt", two_of_four(96, 128), torch.float16, 1e-3),
        ("cusparselt", two_of_four(96, 128), torch.bfloat16, BFLOAT16),
    ],
)
def test_a_library_computes_what_the_dense_weight_means(
    name: str, packed: Packed, dtype: torch.dtype, bound: float, m: int
) -> None:
    moved, work = packed.to(CUDA), Work(m, dtype, CUDA)
    reason = find_backend(name).refuses(moved, work)
    if reason is not None:
        pytest.skip(reason)
    x = torch.randn(m, packed.shape[1], generator=torch.Generator().manual_seed(1)).to(device=CUDA, dtype=dtype)
    y = prepare(name, moved, work)(x)
    assert y.dtype == dtype
    expected = x.double() @ moved.dense().double().T
    assert (y.double() - expected).norm() / expected.norm() < bound
