"""The ways to multiply by a packed weight, ours and those of libraries, behind one interface.

A backend is prepared once for a weight (it may lay it out anew) and is then a plain function of the activations. It
says beforehand, in words, what it cannot take. What tables and layers ask of one stands in `BACKENDS` and imports
nothing, so times of a GPU can be read where there is none, and no Triton; what it computes by is imported when it is
asked to. Which of several to use is not decided here but by what was measured (`dispatch.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels.packed import Packed

Matmul = Callable[[Tensor], Tensor]
"""Activations (m, k) to (m, n), of one dtype; W is inside."""


@dataclass(frozen=True)
class Work:
    """What a backend is asked to do with a weight.

    Args:
        m: rows of the activations: tokens that are computed at a time.
        dtype: of the activations and the result.
        device: where.
    """

    m: int
    dtype: torch.dtype
    device: torch.device


def _as_packed(packed: Packed) -> int:
    return packed.size_bytes


@dataclass(frozen=True)
class Product:
    """What a backend computes by: the part of it that stands in a module of its own.

    Args:
        refuses: why it cannot do this, None if it can. It sees only format, settings, shapes and dtypes.
        prepare: the function of the activations, for a weight that it does not refuse and that is on the device.
        bytes_read: bytes of the weight that one product reads; as it is packed, unless it is laid out anew.
    """

    refuses: Callable[[Packed, Work], str | None]
    prepare: Callable[[Packed, Work], Matmul]
    bytes_read: Callable[[Packed], int] = _as_packed


@dataclass(frozen=True)
class Backend:
    """One way to multiply by a packed weight: what is known of it before its module is imported, and where that is.

    Args:
        name: its name in BACKENDS.
        device: `cpu` or `cuda`.
        place: its `Product`, as `module:attribute`.
        exact: it computes x · denseᵀ up to the rounding of its dtype; False if it also rounds activations or scales.
        for_rows: it is as fast as was measured only with the number of rows that it was prepared for.
        dense: it multiplies by the dense weight, so it takes every format and is in every race.
        ours: a kernel of this package, not a library's.
        boundaries: numbers of rows after which it works in another way; times are not joined across them.
    """

    name: str
    device: str
    place: str
    exact: bool = True
    for_rows: bool = False
    dense: bool = False
    ours: bool = False
    boundaries: tuple[int, ...] = ()

    @property
    def product(self) -> Product:
        """What it computes by.

        Raises:
            UsageError: it needs Triton, which is not installed.
        """
        module, _, attribute = self.place.partition(":")
        try:
            product: Product = getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            message = f"backend {self.name} needs Triton, which is not installed"
            raise UsageError(message, hint="pip install triton") from error
        return product

    def refuses(self, packed: Packed, work: Work) -> str | None:
        """Why it cannot do this, None if it can."""
        return self.product.refuses(packed, work)

    def prepare(self, packed: Packed, work: Work) -> Matmul:
        """The function of the activations, for a weight that it does not refuse and that is on the device."""
        return self.product.prepare(packed, work)

    def bytes_read(self, packed: Packed) -> int:
        """Bytes of the weight that one product reads."""
        return self.product.bytes_read(packed)


ROW_BOUNDARIES = (16, 64)
"""Rows up to which our kernels work in one way: decoding, then small tiles, then large ones."""

_CPU = "layerwise.kernels.cpu_backends"
_CUDA = "layerwise.kernels.cuda_backends"
_TRITON = "layerwise.kernels.triton_backends"

BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("linear", "cpu", f"{_CPU}:LINEAR", dense=True),
        Backend("matmul", "cpu", f"{_CPU}:MATMUL", dense=True),
        Backend("mkl", "cpu", f"{_CPU}:MKL", dense=True, for_rows=True),
        Backend("onednn", "cpu", f"{_CPU}:ONEDNN", dense=True, for_rows=True),
        Backend("int8_dynamic", "cpu", f"{_CPU}:INT8_DYNAMIC", exact=False),
        Backend("int4pack", "cpu", f"{_CPU}:INT4PACK", exact=False),
        Backend("csr", "cpu", f"{_CPU}:CSR"),
        Backend("factors", "cpu", f"{_CPU}:FACTORS", for_rows=True),
        Backend("factors_on_base", "cpu", f"{_CPU}:FACTORS_ON_BASE", exact=False, for_rows=True),
        Backend("cublas", "cuda", f"{_CUDA}:CUBLAS", dense=True),
        Backend("fp8", "cuda", f"{_CUDA}:FP8", exact=False),
        Backend("tinygemm", "cuda", f"{_CUDA}:TINYGEMM", exact=False),
        Backend("cusparselt", "cuda", f"{_CUDA}:CUSPARSELT"),
        Backend("triton_quantized", "cuda", f"{_TRITON}:QUANTIZED", ours=True, boundaries=ROW_BOUNDARIES),
        Backend("triton_block_sparse", "cuda", f"{_TRITON}:BLOCK_SPARSE", ours=True, boundaries=ROW_BOUNDARIES),
        Backend("triton_low_rank", "cuda", f"{_TRITON}:LOW_RANK", ours=True, boundaries=ROW_BOUNDARIES),
        Backend("triton_n_m", "cuda", f"{_TRITON}:N_M", ours=True, boundaries=ROW_BOUNDARIES),
        Backend("triton_unstructured", "cuda", f"{_TRITON}:UNSTRUCTURED", ours=True, boundaries=ROW_BOUNDARIES),
    )
}
"""Every backend by its name. Of the dense ones of a device the first takes activations of every dtype."""


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend '{name}' (known: {', '.join(BACKENDS)})")
    return BACKENDS[name]


def dense_backends(device: str) -> list[str]:
    """The names of those that multiply by the dense weight, in the order of the table.

    Args:
        device: `cpu` or `cuda`.
    Raises:
        UsageError: nothing runs on such a device.
    """
    found = [backend.name for backend in BACKENDS.values() if backend.dense and backend.device == device]
    if not found:
        raise UsageError(f"no backend runs on a device '{device}'", hint="use the device cpu or cuda")
    return found


def prepare(name: str, packed: Packed, work: Work) -> Matmul:
    """A backend's function for a weight.

    Raises:
        UsageError: it cannot take the weight, and why; or there is no such backend, or it needs Triton.
    """
    backend = find_backend(name)
    reason = backend.refuses(packed, work)
    if reason is not None:
        raise UsageError(
            f"backend {name} cannot take {packed.label} of {packed.shape[0]} x {packed.shape[1]}: {reason}"
        )
    return backend.prepare(packed, work)


def able(packed: Packed, work: Work) -> dict[str, Backend]:
    """The backends that can do it, by name. On a processor those of GPUs are not even imported.

    Raises:
        UsageError: on a GPU, without Triton.
    """
    on_device = (backend for backend in BACKENDS.values() if backend.device == work.device.type)
    return {backend.name: backend for backend in on_device if backend.refuses(packed, work) is None}
