"""What every launcher of our kernels asks of the activations and of their device, in one place."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

import torch
import triton
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels.packed import Packed

ALIGNMENT = 16
"""Bytes; kernels are compiled for pointers that are multiples of it, which what torch allocates always is."""

DTYPES = (torch.float16, torch.bfloat16)

Others = ParamSpec("Others")
"""What a launcher takes beside the activations."""


def ready(x: Tensor, packed: Packed) -> Tensor:
    """The activations as a kernel takes them: contiguous and aligned, copied only if they are not.

    Args:
        x: (m, k).
        packed: the weight that they meet.
    Raises:
        UsageError: another shape, dtype or device than the kernel takes.
    """
    n, k = packed.shape
    if x.ndim != 2 or x.shape[1] != k:
        found = " x ".join(map(str, x.shape)) or "a single number"
        raise UsageError(
            f"activations for a {n} x {k} weight must be m x {k}, not {found}",
            hint="flatten the leading dimensions first",
        )
    if x.dtype not in DTYPES:
        raise UsageError(
            f"the kernels take float16 and bfloat16 activations, not {str(x.dtype).removeprefix('torch.')}"
        )
    devices = {tensor.device for tensor in packed.tensors.values()}
    if devices != {x.device}:
        raise UsageError(
            f"activations are on {x.device}, the weight is on {', '.join(sorted(map(str, devices)))}",
            hint="move one of them with .to(device)",
        )
    if x.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise UsageError(
            f"{packed.label} on {x.device}: the Triton kernels need a CUDA device",
            hint="use a CPU backend; only tests run these kernels in Triton's interpreter (TRITON_INTERPRET=1)",
        )
    for name, tensor in packed.tensors.items():
        if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
            raise UsageError(
                f"{packed.label}: its {name} is not contiguous, or not aligned to {ALIGNMENT} bytes",
                hint="pack the weight anew, or copy that tensor with .clone(memory_format=torch.contiguous_format)",
            )
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def uses_asm(device: torch.device) -> bool:
    """Whether kernels may hold PTX, which only NVIDIA's compiler takes.

    A build of torch for AMD calls its devices `cuda` too, so the kind of device alone does not tell. Without PTX, as in
    the interpreter, kernels say the same in Triton's own words.
    """
    return device.type == "cuda" and torch.version.hip is None


def on_its_device(
    launcher: Callable[Concatenate[Tensor, Others], Tensor],
) -> Callable[Concatenate[Tensor, Others], Tensor]:
    """Make a launcher run with the device of x, its first argument, as the current one, where Triton launches.

    Decoding calls it for every token, so a device that is current already is not entered again.
    """

    @wraps(launcher)
    def launch(x: Tensor, /, *args: Others.args, **kwargs: Others.kwargs) -> Tensor:
        if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
            return launcher(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return launcher(x, *args, **kwargs)

    return launch
