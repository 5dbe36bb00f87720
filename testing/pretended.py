"""A GPU that is none: tensors that say they are on a device of their own and are computed on the CPU.

    with pretended_gpu():
        model.to(GPU)  # and everything after it

What a real GPU refuses is refused: an operation on tensors of both devices (numbers of no dimension aside), `numpy()`,
writing to disk without `cpu()`. So a test without a GPU sees every tensor that was left behind, whatever the program
decides by the values of tensors on its way, and the results must be the CPU's bit for bit.

Left out: what only a GPU has (streams, graphs, kernels), products seen by the address of a parameter (experts).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = "meta"
"""Its name: that of a device which every build of torch knows, and which no stage is ever asked to work on."""
TO_CPU = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
"""Operations that may bring tensors of two devices together."""


class Pretended(Tensor):
    """A tensor on the pretended GPU.

    Args:
        held: what it really is.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made: Pretended = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(GPU),
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.held})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The answer of one operation, on the device where it belongs."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    wanted = kwargs.get("device")
    on_gpu = bool(there) if wanted is None else torch.device(wanted).type == GPU
    stray = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.dim()]
    if there and stray and func not in TO_CPU:
        raise RuntimeError(f"{func}: a tensor {tuple(stray[0].shape)} is on the CPU, and others are on the GPU")
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    inner = tree_map(lambda value: value.held if isinstance(value, Pretended) else value, (args, kwargs))
    answer = func(*inner[0], **inner[1])
    known = {id(tensor.held): tensor for tensor in there}

    def outward(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in known:  # changed in place
            return known[id(value)]
        return Pretended(value) if on_gpu else value

    if func is torch.ops.aten.copy_.default:
        return args[0]
    return tree_map(outward, answer)


class _Dispatch(TorchDispatchMode):
    """Sees to operations that have no tensor of the GPU yet."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Sees to what is no operation: `.data`, `numpy`, `tolist`, `torch.tensor`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__ and isinstance(args[0], Pretended):  # type: ignore[attr-defined]
            args[0].held = args[1].held
        if func is Tensor.numpy and isinstance(args[0], Pretended):
            raise TypeError("can't convert a tensor on the GPU to numpy")
        if func is Tensor.tolist and isinstance(args[0], Pretended):
            return args[0].held.tolist()
        if func is torch.tensor and kwargs and str(kwargs.get("device")) == GPU:
            return func(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        return func(*args, **(kwargs or {}))


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """While it lasts, there is the device `GPU`."""
    with _Functions(), _Dispatch():  # type: ignore[no-untyped-call]
        yield
