"""Our Triton kernels as backends. Importing this needs Triton, which is installed on Linux only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from layerwise.kernels import block_sparse_matmul, low_rank_matmul, n_m_matmul, unstructured_matvec
from layerwise.kernels.activations import ALIGNMENT, DTYPES, ready
from layerwise.kernels.backends import Matmul, Product, Work
from layerwise.kernels.block_sparse import BlockSparse
from layerwise.kernels.low_rank import LowRank
from layerwise.kernels.n_m_sparse import NMSparse
from layerwise.kernels.packed import Packed
from layerwise.kernels.quantized import Quantized
from layerwise.kernels.quantized_matmul import Launch, launch
from layerwise.kernels.quantized_matmul import refuses as refuses_groups
from layerwise.kernels.unstructured import Unstructured

Kind = TypeVar("Kind", bound=Packed)

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


def _prepare_quantized(packed: Quantized, work: Work) -> Matmul:
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


def _product(
    kind: type[Kind],
    what: str,
    refuses: Callable[[Kind, Work], str | None],
    prepare: Callable[[Kind, Work], Matmul],
) -> Product:
    """A product for one format.

    Args:
        kind: the class of the format; `what` it is in words.
        refuses: why the kernel cannot take such a weight.
        prepare: its function of the activations.
    """

    def refuse(packed: Packed, work: Work) -> str | None:
        if not isinstance(packed, kind):
            return f"it takes {what} weights, not {packed.format}"
        return _refuses_device(work) or refuses(packed, work)

    def prepared(packed: Packed, work: Work) -> Matmul:
        assert isinstance(packed, kind)
        return prepare(packed, work)

    return Product(refuse, prepared)


def _prepare_low_rank(packed: LowRank, work: Work) -> Matmul:
    fitting = replace(packed, A=packed.A.to(work.dtype), B=packed.B.to(work.dtype))
    return lambda x: low_rank_matmul.low_rank_matmul(x, fitting)


QUANTIZED = _product(Quantized, "quantized", lambda packed, _: refuses_groups(packed), _prepare_quantized)
"""2, 3, 4 and 8 bits, any number of rows (`quantized_matmul.py`)."""

BLOCK_SPARSE = _product(
    BlockSparse,
    "block-sparse",
    lambda packed, work: block_sparse_matmul.refuses(packed, work.m),
    lambda packed, _: lambda x: block_sparse_matmul.block_sparse_matmul(x, packed),
)
"""Kept blocks of 2, 3, 4 and 8 bits, up to 64 rows (`block_sparse_matmul.py`)."""

LOW_RANK = _product(
    LowRank,
    "low-rank",
    lambda packed, work: low_rank_matmul.refuses(packed, work.m, work.dtype),
    _prepare_low_rank,
)
"""A weight with a kernel and a low-rank addition, in one launch where that is possible (`low_rank_matmul.py`)."""

N_M = _product(
    NMSparse,
    "N:M sparse",
    lambda packed, work: n_m_matmul.refuses(packed, work.m, work.dtype),
    lambda packed, _: lambda x: n_m_matmul.n_m_matmul(x, packed),
)
"""2:4, up to 64 rows (`n_m_matmul.py`)."""

UNSTRUCTURED = _product(
    Unstructured,
    "unstructured sparse",
    lambda packed, work: unstructured_matvec.refuses(packed, work.m),
    lambda packed, _: lambda x: unstructured_matvec.unstructured_matvec(x, packed),
)
"""Any zeros, up to 4 rows (`unstructured_matvec.py`)."""
