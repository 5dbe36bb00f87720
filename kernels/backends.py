"""The ways to multiply by a packed weight, ours and those of libraries, behind one interface.

A backend is prepared once for a weight (it may lay it out anew) and is then a plain function of the activations. It
says beforehand, in words, what it cannot take. Which of several to use is not decided here but by what was measured
(`dispatch.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels.packed import Packed

BACKENDS = {
    "linear": "layerwise.kernels.cpu_backends:LINEAR",
    "matmul": "layerwise.kernels.cpu_backends:MATMUL",
    "mkl": "layerwise.kernels.cpu_backends:MKL",
    "onednn": "layerwise.kernels.cpu_backends:ONEDNN",
    "int8_dynamic": "layerwise.kernels.cpu_backends:INT8_DYNAMIC",
    "int4pack": "layerwise.kernels.cpu_backends:INT4PACK",
    "csr": "layerwise.kernels.cpu_backends:CSR",
    "factors": "layerwise.kernels.cpu_backends:FACTORS",
    "factors_on_base": "layerwise.kernels.cpu_backends:FACTORS_ON_BASE",
    "cublas": "layerwise.kernels.cuda_backends:CUBLAS",
    "fp8": "layerwise.kernels.cuda_backends:FP8",
    "tinygemm": "layerwise.kernels.cuda_backends:TINYGEMM",
    "cusparselt": "layerwise.kernels.cuda_backends:CUSPARSELT",
    "triton_quantized": "layerwise.kernels.triton_backends:QUANTIZED",
    "triton_block_sparse": "layerwise.kernels.triton_backends:BLOCK_SPARSE",
    "triton_low_rank": "layerwise.kernels.triton_backends:LOW_RANK",
    "triton_n_m": "layerwise.kernels.triton_backends:N_M",
    "triton_unstructured": "layerwise.kernels.triton_backends:UNSTRUCTURED",
}
"""Every backend by its name: where it stands. A name begins with `triton_` if the kernel is ours."""

CPU_BACKENDS = "layerwise.kernels.cpu_backends"
"""The module whose backends run on a processor; all others need a GPU."""

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


@dataclass(frozen=True)
class Backend:
    """One way to multiply by a packed weight.

    Args:
        name: its name in BACKENDS.
        device: `cpu` or `cuda`.
        refuses: why it cannot do this, None if it can. It sees only format, settings, shapes and dtypes.
        prepare: the function of the activations, for a weight that it does not refuse and that is on the device.
        exact: it computes x · denseᵀ up to the rounding of its dtype; False if it also rounds activations or scales.
        for_rows: it is as fast as was measured only with the number of rows that it was prepared for.
    """

    name: str
    device: str
    refuses: Callable[[Packed, Work], str | None]
    prepare: Callable[[Packed, Work], Matmul]
    exact: bool = True
    for_rows: bool = False


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UsageError: there is none, or a package that it needs is not installed.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend '{name}' (known: {', '.join(BACKENDS)})")
    module, _, attribute = BACKENDS[name].partition(":")
    try:
        backend: Backend = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise UsageError(f"backend {name} needs Triton, which is not installed", hint="pip install triton") from error
    return backend


def prepare(name: str, packed: Packed, work: Work) -> Matmul:
    """A backend's function for a weight.

    Raises:
        UsageError: it cannot take the weight; says why.
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
    on_cpu = work.device.type == "cpu"
    names = [name for name, place in BACKENDS.items() if place.startswith(f"{CPU_BACKENDS}:") == on_cpu]
    found = {name: find_backend(name) for name in names}
    return {
        name: backend
        for name, backend in found.items()
        if backend.device == work.device.type and backend.refuses(packed, work) is None
    }
