"""Products on a processor, all by primitives of torch: four with the dense weight, five with others.

Which dense product is best depends on the shape, the number of rows and the processor, by a factor of more than two, so
`best dense` is always the least of the four: `F.linear`, the product the other way round, and the weights prepacked by
MKL and by oneDNN. They take every format, by its dense weight.

Beside them: eight-bit weights with activations that are rounded to eight bits on the fly, four-bit weights with
activations in bfloat16, compressed sparse rows, and the two factors of a low rank. A primitive that this build of torch
lacks is refused in words, never replaced by another one.

Left out: `_weight_int8pack_mm`, `_int_mm` and block-sparse rows, which lost to one of these or to the dense product
wherever they were timed, and anything for 2 and 3 bits, for which torch has no product on a processor.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from layerwise.kernels import planar
from layerwise.kernels.backends import Matmul, Product, Work
from layerwise.kernels.device import processor
from layerwise.kernels.packed import Packed

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INT4_GROUPS = (256, 128, 64, 32)
"""Group sizes that `_weight_int4pack_mm_for_cpu` knows; a multiple of one of them runs as that one."""

INT4_ROWS = 16
"""It takes rows of the weight sixteen at a time."""

CSR_BYTES = 8
"""Of a nonzero in compressed rows: a float32 and an index."""


def _has(namespace: str, name: str) -> bool:
    """Whether this build of torch has an operator."""
    return hasattr(getattr(torch.ops, namespace), name)


def _float_only(packed: Packed, work: Work) -> str | None:
    return None if work.dtype in FLOATS else f"activations in {work.dtype}, not a float of 16 or 32 bits"


def _weight(packed: Packed, work: Work) -> Tensor:
    return packed.dense().to(work.dtype)


# --- the dense weight ---


def _linear(packed: Packed, work: Work) -> Matmul:
    W = _weight(packed, work)
    return lambda x: linear(x, W)


def _matmul(packed: Packed, work: Work) -> Matmul:
    W = _weight(packed, work)
    return lambda x: (W @ x.T).T.contiguous()


def _mkl_refuses(packed: Packed, work: Work) -> str | None:
    if not (torch.backends.mkl.is_available() and _has("mkl", "_mkl_reorder_linear_weight")):
        return "this torch has no MKL that packs weights"
    return None if work.dtype == torch.float32 else f"MKL packs float32 weights, not {work.dtype}"


def _mkl(packed: Packed, work: Work) -> Matmul:
    """Packed for `work.m` rows; for another number of rows torch itself falls back to the weight as it was."""
    W, product = _weight(packed, work), torch.ops.mkl._mkl_linear
    prepacked, m = torch.ops.mkl._mkl_reorder_linear_weight(W, work.m), work.m
    return lambda x: product(x.contiguous(), prepacked, W, None, m)


def _onednn_refuses(packed: Packed, work: Work) -> str | None:
    if not (torch.backends.mkldnn.is_available() and _has("mkldnn", "_reorder_linear_weight")):
        return "this torch has no oneDNN that packs weights"
    if work.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this processor"
    if work.dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "oneDNN has no float16 on this processor"
    return _float_only(packed, work)


def _onednn(packed: Packed, work: Work) -> Matmul:
    product = torch.ops.mkldnn._linear_pointwise
    prepacked = torch.ops.mkldnn._reorder_linear_weight(_weight(packed, work), work.m)
    return lambda x: product(x, prepacked, None, "none", [], "")


LINEAR = Product(_float_only, _linear)
MATMUL = Product(_float_only, _matmul)
MKL = Product(_mkl_refuses, _mkl)
ONEDNN = Product(_onednn_refuses, _onednn)


# --- quantized weights ---


def _gathered(matmul: Matmul, order: Tensor | None) -> Matmul:
    """The product of a weight whose columns are packed in another order."""
    if order is None:
        return matmul
    columns = order.long()
    return lambda x: matmul(x.index_select(1, columns))


def _in_dtype(dtype: torch.dtype, matmul: Matmul) -> Matmul:
    """A product that works in one dtype, for activations in any."""
    return lambda x: matmul(x.to(dtype)).to(x.dtype)


def _int8_refuses(packed: Packed, work: Work) -> str | None:
    from layerwise.kernels.quantized import Quantized

    has_all = _has("quantized", "linear_dynamic") and hasattr(torch, "_make_per_channel_quantized_tensor")
    if not has_all or "x86" not in torch.backends.quantized.supported_engines:
        return "this torch has no dynamic int8 product for x86"
    if not isinstance(packed, Quantized) or packed.bits != 8:
        return f"{packed.label} is not a weight of 8 bits"
    if not packed.sym:
        return f"{packed.label} has zero points, and this product takes symmetric weights"
    if packed.group_size not in (-1, packed.shape[1]):
        return f"{packed.label} has {packed.group_size} columns to a scale, and this product takes one scale per row"
    return _float_only(packed, work)


def _int8(packed: Packed, work: Work) -> Matmul:
    """Activations are rounded to 8 bits, one scale and zero point for all of them, at each call.

    Without VNNI instructions the sums of two products saturate at 16 bits, so activations are then rounded to 7 bits.
    """
    from layerwise.kernels.quantized import Quantized

    assert isinstance(packed, Quantized)
    n = packed.shape[0]
    codes = (packed.codes().short() - 128).to(torch.int8)
    scale = packed.scale[0, :n].double()
    with warnings.catch_warnings():  # torch means to drop its quantized dtypes; what it then lacks is refused above
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
        W = torch._make_per_channel_quantized_tensor(codes, scale, torch.zeros(n, dtype=torch.int64), 0)
    prepacked = torch.ops.quantized.linear_prepack(W, None)
    saturates = not any("vnni" in feature for feature in processor()[1])
    product = torch.ops.quantized.linear_dynamic
    return _in_dtype(torch.float32, lambda x: product(x.contiguous(), prepacked, saturates))


def _int4_group(group_size: int) -> int | None:
    """The group size that it runs as: the greatest that divides its own; a whole row takes any."""
    return next((size for size in INT4_GROUPS if group_size == -1 or group_size % size == 0), None)


def _int4_refuses(packed: Packed, work: Work) -> str | None:
    from layerwise.kernels.quantized import Quantized

    if not _has("aten", "_weight_int4pack_mm_for_cpu"):
        return "this torch has no int4 product for processors"
    if not isinstance(packed, Quantized) or packed.bits != 4:
        return f"{packed.label} is not a weight of 4 bits"
    if _int4_group(packed.group_size) is None:
        return f"{packed.label}: groups must be a multiple of 32 columns, or the whole row"
    return _float_only(packed, work)


def _int4(packed: Packed, work: Work) -> Matmul:
    """ŵ = (code - 8) · s + z in bfloat16, so z = (8 - zero) · s. Rows and columns are padded to what it takes."""
    from layerwise.kernels.quantized import Quantized

    assert isinstance(packed, Quantized)
    n, k = packed.shape
    group = _int4_group(packed.group_size)
    assert group is not None
    codes = planar.unpack(packed.words, packed.high, 4, packed.group_size, packed.shape)
    codes = pad(codes, (0, -k % group, 0, -n % INT4_ROWS))
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    scale_and_zero = _int4_scales(packed, codes.shape[1] // group, group)[:, : codes.shape[0]].contiguous()
    product, missing = torch.ops.aten._weight_int4pack_mm_for_cpu, -k % group

    def matmul(x: Tensor) -> Tensor:
        padded = pad(x, (0, missing)) if missing else x.contiguous()
        y: Tensor = product(padded, words, group, scale_and_zero)
        return y if y.shape[1] == n else y[:, :n]

    return _gathered(_in_dtype(torch.bfloat16, matmul), packed.order)


def _int4_scales(packed: Packed, groups: int, group: int) -> Tensor:
    """(groups, n_padded, 2) bfloat16: scale and z of each group as it runs."""
    from layerwise.kernels.quantized import Quantized

    assert isinstance(packed, Quantized)
    scale = packed.scale.float()
    zero = torch.full_like(scale, 8) if packed.zero is None else packed.zero.float()
    both = torch.stack([scale, (8 - zero) * scale], dim=-1)
    own = torch.arange(groups) * group // (groups * group if packed.group_size == -1 else packed.group_size)
    return both.index_select(0, own).bfloat16()


INT8_DYNAMIC = Product(_int8_refuses, _int8)
INT4PACK = Product(_int4_refuses, _int4)


# --- sparse weights and factors ---


def _csr_refuses(packed: Packed, work: Work) -> str | None:
    if packed.format != "unstructured":
        return f"{packed.label} does not say which of its weights are zero"
    if work.dtype != torch.float32:
        return f"compressed rows are multiplied in float32, not {work.dtype}"
    return None


def _csr(packed: Packed, work: Work) -> Matmul:
    """Indices of 32 bits. It wins from somewhere near 80 % zeros on; where, is for the table to say."""
    with warnings.catch_warnings():  # torch calls every compressed tensor a beta
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        W = packed.dense().to_sparse_csr()
    rows, columns = W.crow_indices().int(), W.col_indices().int()
    small = torch.sparse_csr_tensor(rows, columns, W.values(), W.shape, check_invariants=False)

    def matmul(x: Tensor) -> Tensor:
        return (small @ x[0])[None] if x.shape[0] == 1 else (small @ x.T).T.contiguous()

    return matmul


def _factors_refuse(packed: Packed, work: Work) -> str | None:
    if packed.format != "low_rank":
        return f"{packed.label} has no factors"
    from layerwise.kernels.low_rank import LowRank

    assert isinstance(packed, LowRank)
    return None if packed.base is None else f"{packed.label} stands on a base; that is factors_on_base"


def _factors(packed: Packed, work: Work) -> Matmul:
    """y = B (A x), each product by the weight as MKL packs it where there is MKL."""
    from layerwise.kernels.low_rank import LowRank

    assert isinstance(packed, LowRank)
    down, up = _product_of(packed.A, work), _product_of(packed.B, work)
    return lambda x: up(down(x))


def _product_of(W: Tensor, work: Work) -> Matmul:
    from layerwise.kernels.dense import Dense

    n, k = W.shape
    dense, best = Dense((n, k), W), MKL if work.m > 1 and work.dtype == torch.float32 else LINEAR
    return (LINEAR if best.refuses(dense, work) else best).prepare(dense, work)


def _base(packed: Packed, work: Work) -> Product | None:
    """What runs the base of a low rank: a product that is not dense, because otherwise the dense sum is less work."""
    return next((backend for backend in (INT4PACK, INT8_DYNAMIC) if backend.refuses(packed, work) is None), None)


def _factors_on_base_refuse(packed: Packed, work: Work) -> str | None:
    if packed.format != "low_rank":
        return f"{packed.label} has no factors"
    from layerwise.kernels.low_rank import LowRank

    assert isinstance(packed, LowRank)
    if packed.base is None:
        return f"{packed.label} has factors, but no base"
    if _base(packed.base, work) is None:
        return f"{packed.label}: nothing but the dense product takes its base {packed.base.label}"
    return _float_only(packed, work)


def _factors_on_base(packed: Packed, work: Work) -> Matmul:
    from layerwise.kernels.low_rank import LowRank

    assert isinstance(packed, LowRank) and packed.base is not None
    backend = _base(packed.base, work)
    assert backend is not None
    base = backend.prepare(packed.base, work)
    down, up = _product_of(packed.A, work), _product_of(packed.B, work)
    return lambda x: base(x) + up(down(x))


def _csr_bytes(packed: Packed) -> int:
    return CSR_BYTES * packed.tensors["values"].numel()


CSR = Product(_csr_refuses, _csr, _csr_bytes)
FACTORS = Product(_factors_refuse, _factors)
FACTORS_ON_BASE = Product(_factors_on_base_refuse, _factors_on_base)
