"""Every product on a processor against the same in float64, and what each of them says it cannot take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels import cpu_backends
from layerwise.kernels.backends import Work, find_backend, prepare
from layerwise.kernels.dense import Dense
from layerwise.kernels.device import processor
from layerwise.kernels.low_rank import LowRank
from layerwise.kernels.packed import Packed
from layerwise.kernels.quantized import Quantized
from layerwise.kernels.unstructured import Unstructured

CPU = torch.device("cpu")
DENSE = ("linear", "matmul", "mkl", "onednn")
ROWS = (1, 3, 16)
FLOAT32 = 2e-6
"""A sum of a few hundred products in float32, relative to the norm of the result."""

BFLOAT16 = 6e-3
"""Activations, scales and results each rounded to 8 bits of mantissa (2**-9 relative, uniformly spread)."""

FLOAT16 = 8e-4
INT8 = 2e-2
"""Activations rounded to a grid of 255 steps over their range, some six standard deviations wide."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quantized(n: int, k: int, bits: int, group_size: int, *, sym: bool = True, ordered: bool = False) -> Quantized:
    groups = 1 if group_size == -1 else -(-k // group_size)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator(1), dtype=torch.uint8)
    scale = (0.5 + torch.rand(n, groups, generator=generator(2))).half() / 2**bits
    zero = None if sym else torch.randint(0, 2**bits, (n, groups), generator=generator(3), dtype=torch.uint8)
    order = torch.randperm(k, generator=generator(4)) if ordered else None
    return Quantized.pack(codes, scale, zero, bits=bits, group_size=group_size, order=order)


def dense(n: int, k: int) -> Dense:
    return Dense((n, k), torch.randn(n, k, generator=generator(0)))


def sparse(n: int, k: int, share: float) -> Unstructured:
    weight = torch.randn(n, k, generator=generator(0))
    return Unstructured.pack(weight * (torch.rand(n, k, generator=generator(1)) >= share))


def low_rank(n: int, k: int, rank: int, base: Packed | None = None) -> LowRank:
    A, B = torch.randn(rank, k, generator=generator(5)), torch.randn(n, rank, generator=generator(6))
    return LowRank((n, k), A.half(), B.half(), base)


def activations(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, k, generator=generator(7)).to(dtype)


def error(name: str, packed: Packed, m: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of a backend in the Frobenius norm, against float64."""
    x = activations(m, packed.shape[1], dtype)
    y = prepare(name, packed, Work(m, dtype, CPU))(x)
    assert y.shape == (m, packed.shape[0])
    assert y.dtype == dtype
    assert y.is_contiguous()
    expected = x.double() @ packed.dense().double().T
    return float((y.double() - expected).norm() / expected.norm())


def refusal(name: str, packed: Packed, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(UsageError) as raised:
        prepare(name, packed, Work(2, dtype, CPU))
    return raised.value.message


# --- the dense weight ---


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("name", DENSE)
def test_dense_products_are_exact_to_the_rounding_of_float32(name: str, m: int) -> None:
    assert error(name, dense(70, 130), m) < FLOAT32


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(
    "packed", [quantized(72, 130, 3, 64, sym=False), sparse(70, 130, 0.5), low_rank(70, 130, 8)], ids=lambda p: p.label
)
def test_dense_products_take_every_format(name: str, packed: Packed) -> None:
    assert error(name, packed, 3) < FLOAT32


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, BFLOAT16), (torch.float16, FLOAT16)])
@pytest.mark.parametrize("name", ["linear", "matmul", "onednn"])
def test_dense_products_take_half_precision(name: str, dtype: torch.dtype, bound: float) -> None:
    weight = Dense((72, 96), torch.randn(72, 96, generator=generator(0)).to(dtype))
    if find_backend(name).refuses(weight, Work(3, dtype, CPU)):
        pytest.skip(f"this processor has no {dtype} in {name}")
    assert error(name, weight, 3, dtype) < bound


def test_mkl_takes_only_float32() -> None:
    assert "MKL packs float32 weights, not torch.bfloat16" in refusal("mkl", dense(8, 8), torch.bfloat16)


@pytest.mark.parametrize("name", ["linear", "matmul", "onednn", "int4pack", "int8_dynamic"])
def test_activations_that_are_no_floats_are_refused(name: str) -> None:
    weight = quantized(32, 64, 8 if name == "int8_dynamic" else 4, -1)
    assert "not a float" in refusal(name, weight, torch.int32)


@pytest.mark.parametrize("name", [*DENSE, "int8_dynamic", "int4pack", "csr", "factors", "factors_on_base"])
def test_a_function_prepared_for_some_rows_takes_any_rows_and_strides(name: str) -> None:
    weights: dict[str, Packed] = {
        "int8_dynamic": quantized(48, 64, 8, -1),
        "int4pack": quantized(48, 64, 4, 32),
        "csr": sparse(48, 64, 0.8),
        "factors": low_rank(48, 64, 4),
        "factors_on_base": low_rank(48, 64, 4, quantized(48, 64, 4, 32)),
    }
    packed = weights.get(name, dense(48, 64))
    matmul = prepare(name, packed, Work(4, torch.float32, CPU))
    bound = FLOAT32 if find_backend(name).exact else INT8
    for x in (activations(1, 64), activations(7, 64), activations(64, 5).T, activations(10, 128)[::2, ::2]):
        expected = x.double() @ packed.dense().double().T
        assert (matmul(x).double() - expected).norm() / expected.norm() < bound


# --- quantized weights ---


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("shape", [(64, 128), (70, 130), (1, 7)])
def test_dynamic_int8_rounds_only_activations(shape: tuple[int, int], m: int) -> None:
    assert error("int8_dynamic", quantized(*shape, 8, -1), m) < INT8


@pytest.mark.parametrize(("features", "levels"), [(("avx512_vnni",), 256), (("avx2",), 128)])
def test_dynamic_int8_is_exact_where_activations_lie_on_its_grid(
    monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...], levels: int
) -> None:
    if "avx512_vnni" in features and not any("vnni" in feature for feature in processor()[1]):
        pytest.skip("without VNNI sums of 8 bits saturate")
    monkeypatch.setattr(cpu_backends, "processor", lambda: ("some", features))
    packed = quantized(40, 32, 8, -1)
    x = torch.randint(-50, 50, (3, 32), generator=generator(0)).float()
    x[:, 0], x[:, 1] = -levels / 2, levels / 2 - 1  # the range that sets the grid to whole numbers
    y = prepare("int8_dynamic", packed, Work(3, torch.float32, CPU))(x)
    expected = x.double() @ packed.dense().double().T
    assert (y.double() - expected).norm() / expected.norm() < 1e-6


def test_without_vnni_activations_keep_seven_bits_so_that_sums_do_not_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backends, "processor", lambda: ("old", ("avx2", "avx512f")))
    assert FLOAT32 < error("int8_dynamic", quantized(64, 128, 8, -1), 3) < 2 * INT8


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (quantized(32, 64, 4, -1), "int4-channel-sym is not a weight of 8 bits"),
        (quantized(32, 64, 8, -1, sym=False), "has zero points"),
        (quantized(32, 64, 8, 32), "32 columns to a scale, and this product takes one scale per row"),
    ],
)
def test_dynamic_int8_says_what_it_cannot_take(packed: Packed, said: str) -> None:
    assert said in refusal("int8_dynamic", packed)


def test_groups_as_wide_as_the_row_are_one_scale_per_row() -> None:
    assert error("int8_dynamic", quantized(32, 64, 8, 64), 2) < INT8


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 512, -1])
@pytest.mark.parametrize("shape", [(64, 512), (72, 544), (8, 300)])
def test_int4_rounds_only_to_bfloat16(shape: tuple[int, int], group_size: int, sym: bool) -> None:
    # A zero point of its own costs accuracy: (8 - zero) · scale is rounded before it is added to (code - 8) · scale.
    assert error("int4pack", quantized(*shape, 4, group_size, sym=sym), 3) < (BFLOAT16 if sym else 3 * BFLOAT16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int4_gives_the_dtype_of_the_activations(dtype: torch.dtype) -> None:
    assert error("int4pack", quantized(64, 128, 4, 32), 16, dtype) < BFLOAT16


def test_int4_gathers_activations_where_columns_are_packed_in_another_order() -> None:
    assert error("int4pack", quantized(64, 128, 4, 32, ordered=True), 3) < BFLOAT16
    assert error("int8_dynamic", quantized(64, 128, 8, -1, ordered=True), 3) < INT8


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (quantized(32, 64, 3, 32), "int3-g32-sym is not a weight of 4 bits"),
        (quantized(32, 64, 4, 16), "groups must be a multiple of 32 columns"),
        (dense(32, 64), "dense is not a weight of 4 bits"),
    ],
)
def test_int4_says_what_it_cannot_take(packed: Packed, said: str) -> None:
    assert said in refusal("int4pack", packed)


# --- sparse weights and factors ---


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_compressed_rows_are_exact(share: float, m: int) -> None:
    packed = sparse(70, 130, share)
    if share < 1:
        assert error("csr", packed, m) < FLOAT32
    else:
        assert not prepare("csr", packed, Work(m, torch.float32, CPU))(activations(m, 130)).any()


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kept", ["all", "none", "some, of the first and last row none"])
def test_compressed_rows_take_whatever_a_mask_keeps(kept: str, dtype: torch.dtype, m: int) -> None:
    mask = torch.full((37, 130), kept == "all")
    if kept.startswith("some"):
        mask[1:-1] = torch.rand(35, 130, generator=generator(1)) < 0.3
    values = torch.randn(int(mask.sum()), generator=generator(2)).to(dtype)
    values[::7] = 0.0
    packed, x = Unstructured.from_mask(mask, values), activations(m, 130)
    expected = x.double() @ packed.dense().double().T
    y = prepare("csr", packed, Work(m, torch.float32, CPU))(x)
    assert (y.double() - expected).norm() <= FLOAT32 * expected.norm()  # of nothing kept, exactly zero


def test_compressed_rows_say_what_they_cannot_take() -> None:
    assert "does not say which of its weights are zero" in refusal("csr", dense(8, 8))
    assert "multiplied in float32" in refusal("csr", sparse(8, 8, 0.5), torch.bfloat16)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_factors_are_exact(rank: int, m: int) -> None:
    assert error("factors", low_rank(70, 130, rank), m) < 2 * FLOAT32


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("base", [quantized(64, 128, 4, 32), quantized(64, 128, 8, -1)], ids=lambda p: p.label)
def test_factors_add_to_what_their_base_gives(base: Packed, m: int) -> None:
    assert error("factors_on_base", low_rank(64, 128, 8, base), m) < INT8


def test_factors_say_what_they_cannot_take() -> None:
    assert "has no factors" in refusal("factors", dense(8, 8))
    assert "that is factors_on_base" in refusal("factors", low_rank(32, 64, 2, quantized(32, 64, 4, 32)))
    assert "but no base" in refusal("factors_on_base", low_rank(32, 64, 2))
    base = quantized(32, 64, 3, 32)
    assert "nothing but the dense product takes its base int3-g32-sym" in refusal(
        "factors_on_base", low_rank(32, 64, 2, base)
    )


# --- a torch that lacks something ---


@pytest.mark.parametrize(
    ("name", "packed", "said"),
    [
        ("mkl", dense(8, 8), "no MKL that packs weights"),
        ("onednn", dense(8, 8), "no oneDNN that packs weights"),
        ("int8_dynamic", quantized(32, 64, 8, -1), "no dynamic int8 product"),
        ("int4pack", quantized(32, 64, 4, 32), "no int4 product"),
    ],
)
def test_a_primitive_that_this_torch_lacks_is_refused_in_words(
    name: str, packed: Packed, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_backends, "_has", lambda namespace, operator: False)
    assert said in refusal(name, packed)
