"""Our Triton kernels as backends. Importing this needs Triton, which is installed on Linux only."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from layerwise.kernels import block_sparse_matmul, low_rank_matmul, n_m_matmul, unstructured_matvec
from layerwise.kernels.activations import ALIGNMENT, DTYPES, ready
from layerwise.kernels.backends import Backend, Matmul, Work
from layerwise.kernels.block_sparse import BlockSparse
from layerwise.kernels.low_rank import LowRank
from layerwise.kernels.n_m_sparse import NMSparse
from layerwise.kernels.packed import Packed
from layerwise.kernels.quantized import Quantized
from layerwise.kernels.quantized_matmul import Launch, launch
from layerwise.kernels.quantized_matmul import refuses as refuses_groups
from layerwise.kernels.unstructured import Unstructured

LEAST_CAPABILITY = (8, 0)

MAX_LAUNCHES = 64
"""Numbers of rows for which a weight keeps its launch; one more pushes out the oldest."""


def _refuses_device(work: Work) -> str | None:
    """What no Triton kernel can do."""
    if work.device.type != "cuda":
        return f"the Triton kernels need a CUDA device, not {work.device}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.cuda.get_device_capability(work.device) < LEAST_CAPABILITY:
        return "the Triton kernels need compute capability 8.0, for bfloat16 and loads into shared memory"
    if work.dtype not in DTYPES:
        return f"the Triton kernels take float16 and bfloat16, not {str(work.dtype).removeprefix('torch.')}"
    return None


def _refuses_quantized(packed: Packed, work: Work) -> str | None:
    if not isinstance(packed, Quantized):
        return f"it takes quantized weights, not {packed.format}"
    return _refuses_device(work) or refuses_groups(packed)


def _prepare_quantized(packed: Packed, work: Work) -> Matmul:
    assert isinstance(packed, Quantized)
    launches: dict[int, Launch] = {}
    k, device = packed.shape[1], packed.words.device

    def multiply(x: Tensor) -> Tensor:
        known = launches.get(len(x))
        # One test for what all calls but the first have in common; `ready` says what is wrong, in 13 µs.
        if (
            known is not None
            and x.shape == (len(x), k)
            and x.dtype in DTYPES
            and x.device == device
            and x.is_contiguous()
            and x.data_ptr() % ALIGNMENT == 0
        ):
            return known(x)
        x = ready(x, packed)
        if known is None:
            if len(launches) >= MAX_LAUNCHES:
                del launches[next(iter(launches))]
            known = launches[len(x)] = launch(packed, len(x))
        return known(x)

    return multiply


QUANTIZED = Backend("triton_quantized", "cuda", _refuses_quantized, _prepare_quantized)
"""2, 3, 4 and 8 bits, any number of rows (`quantized_matmul.py`)."""


def _refuses_block_sparse(packed: Packed, work: Work) -> str | None:
    if not isinstance(packed, BlockSparse):
        return f"it takes block-sparse weights, not {packed.format}"
    return _refuses_device(work) or block_sparse_matmul.refuses(packed, work.m)


def _prepare_block_sparse(packed: Packed, work: Work) -> Matmul:
    assert isinstance(packed, BlockSparse)
    return lambda x: block_sparse_matmul.block_sparse_matmul(x, packed)


BLOCK_SPARSE = Backend("triton_block_sparse", "cuda", _refuses_block_sparse, _prepare_block_sparse)
"""Kept blocks of 2, 3, 4 and 8 bits, up to 64 rows (`block_sparse_matmul.py`)."""


def _refuses_low_rank(packed: Packed, work: Work) -> str | None:
    if not isinstance(packed, LowRank):
        return f"it takes low-rank weights, not {packed.format}"
    return _refuses_device(work) or low_rank_matmul.refuses(packed, work.m, work.dtype)


def _prepare_low_rank(packed: Packed, work: Work) -> Matmul:
    assert isinstance(packed, LowRank)
    fitting = replace(packed, A=packed.A.to(work.dtype), B=packed.B.to(work.dtype))
    return lambda x: low_rank_matmul.low_rank_matmul(x, fitting)


LOW_RANK = Backend("triton_low_rank", "cuda", _refuses_low_rank, _prepare_low_rank)
"""A weight with a kernel and a low-rank addition, in one launch where that is possible (`low_rank_matmul.py`)."""


def _refuses_n_m(packed: Packed, work: Work) -> str | None:
    if not isinstance(packed, NMSparse):
        return f"it takes N:M sparse weights, not {packed.format}"
    return _refuses_device(work) or n_m_matmul.refuses(packed, work.m, work.dtype)


def _prepare_n_m(packed: Packed, work: Work) -> Matmul:
    assert isinstance(packed, NMSparse)
    return lambda x: n_m_matmul.n_m_matmul(x, packed)


N_M = Backend("triton_n_m", "cuda", _refuses_n_m, _prepare_n_m)
"""2:4, up to 64 rows (`n_m_matmul.py`)."""


def _refuses_unstructured(packed: Packed, work: Work) -> str | None:
    if not isinstance(packed, Unstructured):
        return f"it takes unstructured sparse weights, not {packed.format}"
    return _refuses_device(work) or unstructured_matvec.refuses(packed, work.m)


def _prepare_unstructured(packed: Packed, work: Work) -> Matmul:
    assert isinstance(packed, Unstructured)
    return lambda x: unstructured_matvec.unstructured_matvec(x, packed)


UNSTRUCTURED = Backend("triton_unstructured", "cuda", _refuses_unstructured, _prepare_unstructured)
"""Any zeros, up to 4 rows (`unstructured_matvec.py`)."""
