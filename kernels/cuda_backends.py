"""Products on a GPU by libraries: cuBLAS, and what torch brings for 8-bit floats, 4-bit codes and 2:4 sparsity.

cuBLAS takes every format, by its dense weight, and is what all others are compared with. The others each take the few
weights that they can hold without changing them; a weight that one of them would have to round is refused, because a
level means what `dense` says. So fp8 is for codes of up to 4 bits with one scale per row, whose differences from the
zero point are whole numbers up to 15 and exact in it, not for weights in general.

Nothing here touches a GPU before `prepare`, so what a backend refuses can be asked anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from layerwise.kernels import planar
from layerwise.kernels.backends import Matmul, Product, Work
from layerwise.kernels.packed import Packed

HALVES = (torch.float16, torch.bfloat16)
FP8_LARGEST = 448.0
"""The largest number of `float8_e4m3fn`."""

FP8_SCALE_BYTES = 4
"""Of the one scale of a row; each of its weights is a byte."""

FP8_MULTIPLE = 16
"""`_scaled_mm` takes n and k in multiples of this."""

TINYGEMM_GROUPS = (32, 64, 128, 256)
TINYGEMM_COLUMNS = 128
"""Columns that one step of tinygemm reads with 8 inner tiles: k must be a multiple."""

TINYGEMM_ROWS = 8
SPARSE_MULTIPLE = 16
"""`to_sparse_semi_structured` takes n and k of 16-bit floats in multiples of this."""


def _capability(work: Work) -> tuple[int, int]:
    """The compute capability; (0, 0) where there is no GPU to ask."""
    return torch.cuda.get_device_capability(work.device) if torch.cuda.is_available() else (0, 0)


# --- cuBLAS ---


def _cublas_refuses(packed: Packed, work: Work) -> str | None:
    if work.dtype not in (*HALVES, torch.float32):
        return f"activations in {work.dtype}, not a float of 16 or 32 bits"
    return None


def _cublas(packed: Packed, work: Work) -> Matmul:
    W = packed.dense().to(device=work.device, dtype=work.dtype)
    return lambda x: linear(x, W)


CUBLAS = Product(_cublas_refuses, _cublas)


# --- 8-bit floats ---


def _fp8_refuses(packed: Packed, work: Work) -> str | None:
    from layerwise.kernels.quantized import Quantized

    if not hasattr(torch, "_scaled_mm"):
        return "this torch has no product of 8-bit floats"
    if _capability(work) < (8, 9):
        return "8-bit floats need a GPU of compute capability 8.9 or later"
    if not isinstance(packed, Quantized) or packed.bits > 4:
        return f"{packed.label} is not exact in 8-bit floats; codes of up to 4 bits are"
    if packed.group_size not in (-1, packed.shape[1]):
        return f"{packed.label} has {packed.group_size} columns to a scale, and this product takes one scale per row"
    if any(size % FP8_MULTIPLE for size in packed.shape):
        return f"{packed.shape[0]} x {packed.shape[1]} is not in multiples of {FP8_MULTIPLE}"
    return None if work.dtype == torch.bfloat16 else f"scaled by rows it gives bfloat16, not {work.dtype}"


def _fp8(packed: Packed, work: Work) -> Matmul:
    """Activations are rounded to 8-bit floats, one scale per row, at each call."""
    from layerwise.kernels.quantized import Quantized

    assert isinstance(packed, Quantized)
    n = packed.shape[0]
    W = (packed.codes().float() - packed.zeros().float()).to(torch.float8_e4m3fn)
    row_scale = packed.scale[0, :n].float()[None].contiguous()

    def matmul(x: Tensor) -> Tensor:
        scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / FP8_LARGEST
        rounded = (x.float() / scale).to(torch.float8_e4m3fn)
        return torch._scaled_mm(rounded, W.T, scale_a=scale, scale_b=row_scale, out_dtype=torch.bfloat16)

    return matmul


def _fp8_bytes(packed: Packed) -> int:
    return packed.shape[0] * (packed.shape[1] + FP8_SCALE_BYTES)


FP8 = Product(_fp8_refuses, _fp8, _fp8_bytes)


# --- 4-bit codes ---


def _tinygemm_refuses(packed: Packed, work: Work) -> str | None:
    from layerwise.kernels.quantized import Quantized

    if not hasattr(torch.ops.aten, "_weight_int4pack_mm"):
        return "this torch has no tinygemm"
    if _capability(work) < (8, 0):
        return "tinygemm needs a GPU of compute capability 8.0 or later"
    if not isinstance(packed, Quantized) or packed.bits != 4:
        return f"{packed.label} is not a weight of 4 bits"
    if packed.group_size not in TINYGEMM_GROUPS:
        return f"{packed.label}: groups must be one of {', '.join(map(str, TINYGEMM_GROUPS))} columns"
    if packed.shape[1] % max(packed.group_size, TINYGEMM_COLUMNS) or packed.shape[0] % TINYGEMM_ROWS:
        return f"{packed.shape[0]} x {packed.shape[1]} is not in multiples of {TINYGEMM_ROWS} x {TINYGEMM_COLUMNS}"
    return None if work.dtype == torch.bfloat16 else f"tinygemm works in bfloat16, not {work.dtype}"


def _tinygemm(packed: Packed, work: Work) -> Matmul:
    """ŵ = (code - 8) · s + z in bfloat16, so z = (8 - zero) · s. Of two codes in a byte the first stands above."""
    from layerwise.kernels.quantized import Quantized

    assert isinstance(packed, Quantized)
    n, k = packed.shape
    groups, size = k // packed.group_size, packed.group_size
    codes = planar.unpack(packed.words, packed.high, 4, size, packed.shape)
    words = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], 8)
    scale = packed.scale[:groups, :n].float()
    zero = torch.full_like(scale, 8) if packed.zero is None else packed.zero[:groups, :n].float()
    scale_and_zero = torch.stack([scale, (8 - zero) * scale], dim=-1).bfloat16().contiguous()
    product, order = torch.ops.aten._weight_int4pack_mm, None if packed.order is None else packed.order.long()

    def matmul(x: Tensor) -> Tensor:
        rows = x if order is None else x.index_select(1, order)
        y: Tensor = product(rows.contiguous(), words, size, scale_and_zero)
        return y

    return matmul


TINYGEMM = Product(_tinygemm_refuses, _tinygemm)


# --- 2:4 sparsity ---


def _cusparselt_refuses(packed: Packed, work: Work) -> str | None:
    if packed.format != "n_m_sparse" or not packed.label.startswith("2:4"):
        return f"{packed.label} is not 2:4 sparse"
    if not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt, or finds no GPU for it"
    if work.dtype not in HALVES:
        return f"activations in {work.dtype}, not a float of 16 bits"
    if any(size % SPARSE_MULTIPLE for size in packed.shape):
        return f"{packed.shape[0]} x {packed.shape[1]} is not in multiples of {SPARSE_MULTIPLE}"
    return None


def _cusparselt(packed: Packed, work: Work) -> Matmul:
    from torch.sparse.semi_structured import SparseSemiStructuredTensorCUSPARSELT as Sparse

    W = Sparse.from_dense(packed.dense().to(device=work.device, dtype=work.dtype).contiguous())
    return lambda x: linear(x, W)


CUSPARSELT = Product(_cusparselt_refuses, _cusparselt)
