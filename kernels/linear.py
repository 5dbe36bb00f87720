"""A linear layer that holds a packed weight: what takes the place of `nn.Linear` in a model.

The packed tensors are buffers, so the layer saves, loads and moves as any module does; what a backend makes of them
(a prepacked copy, say) is made when the layer first meets such activations, and belongs to no state dict. Which backend
runs is asked of a function of the weight and the work, as a rule a `Dispatcher` over a measured table. It is asked once
for each number of rows.

A backend's function may hold a copy of the weight, so there is one for each backend, and of a backend that is prepared
for a number of rows one for each of the last few such numbers. Beyond those it is prepared anew: a call takes longer,
but a layer runs what its table measured.

Left out: gradients, for the weights of a kernel are codes; and loading by class name alone, for a packed weight is
rebuilt from its settings, which stand beside the tensors (`layerwise.stages.apply.packed`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from layerwise.errors import UsageError
from layerwise.kernels.backends import Matmul, Work, dense_backends, find_backend, prepare
from layerwise.kernels.packed import Packed, rebuild

Choose = Callable[[Packed, Work], str]
"""The name of the backend that is to do the work."""

MAX_CHOICES = 256
"""Numbers of rows for which the choice of a backend is kept."""

MAX_FOR_ROWS = 2
"""Functions that are kept of backends that are prepared for a number of rows, say that of a prompt and that of the
tokens after it. Each holds the weight, and once more as it was packed."""

_Function = tuple[str, int | None, torch.dtype, torch.device]
"""What tells prepared functions apart: backend, rows if it is prepared for them, and where."""

_PART = "__"
"""Between the name of a part and that of its tensor (`base__words`): a buffer's name may hold no dot."""


class PackedLinear(nn.Module):
    """y = x · denseᵀ + bias, computed from a packed weight.

    Args:
        packed: the weight, (n, k).
        bias: (n,), any float dtype, or None.
        choose: which backend does the work; without it the dense one of the device, exact and no faster.
    """

    bias: nn.Parameter | None
    _packed: Packed | None
    _chosen: dict[tuple[int, torch.dtype, torch.device], _Function]
    _functions: dict[_Function, Matmul]

    def __init__(self, packed: Packed, bias: Tensor | None = None, choose: Choose | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.settings = packed.settings
        self.label = packed.label
        for name, tensor in packed.tensors.items():
            self.register_buffer(name.replace(".", _PART), tensor)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.choose: Choose = choose or _dense_backend
        self._forget()

    @property
    def packed(self) -> Packed:
        """The weight as it stands in the buffers."""
        if self._packed is None:
            tensors = {name.replace(_PART, "."): cast(Tensor, buffer) for name, buffer in self._buffers.items()}
            self._packed = rebuild(self.settings, tensors)
        return self._packed

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) to (..., n), in the dtype of x."""
        rows = x.reshape(-1, self.in_features)
        y = self._matmul(rows)(rows)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _matmul(self, rows: Tensor) -> Matmul:
        asked = rows.shape[0], rows.dtype, rows.device
        key = self._chosen.get(asked)
        if key is None:
            work = Work(*asked)
            backend = self.choose(self.packed, work)
            key = backend, work.m if find_backend(backend).for_rows else None, work.dtype, work.device
            if len(self._chosen) >= MAX_CHOICES:
                del self._chosen[next(iter(self._chosen))]
            self._chosen[asked] = key
        function = self._functions.get(key)
        return self._prepared(key, Work(*asked)) if function is None else function

    def _prepared(self, key: _Function, work: Work) -> Matmul:
        """Prepare a backend, and drop the oldest of those that were prepared for other numbers of rows."""
        if key[1] is not None:
            for_rows = [known for known in self._functions if known[1] is not None]
            for oldest in for_rows[: max(0, len(for_rows) + 1 - MAX_FOR_ROWS)]:
                del self._functions[oldest]
        function = self._functions[key] = prepare(key[0], self.packed, work)
        return function

    def _forget(self) -> None:
        """Drop all that was made from the buffers."""
        self._packed = None
        self._chosen, self._functions = {}, {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move it, but keep the dtypes: `model.half()` is about activations, and a rounded scale is another weight."""
        before = {name: cast(Tensor, buffer) for name, buffer in self._buffers.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(buffer.device)
        self._forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the weight, not what backends made of it."""
        return self.__dict__ | {"_packed": None, "_chosen": {}, "_functions": {}}

    def extra_repr(self) -> str:
        """As torch's own layers print themselves."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.label}"


def replace_linears(model: nn.Module, packed: Mapping[str, Packed], choose: Choose | None = None) -> nn.Module:
    """Put packed layers in the place of linear ones, in place; a layer keeps its bias.

    Args:
        model: any module; its `nn.Linear` and transformers' `Conv1D` (whose weight is (in, out)) can be replaced.
        packed: by full module name, the weight.
        choose: as of `PackedLinear`.
    Returns:
        the model.
    Raises:
        UsageError: there is no such layer, it is not linear, or the weight has another shape. Then nothing was changed.
    """
    found = {name: _linear(model, name, weight) for name, weight in packed.items()}
    for name, linear in found.items():
        parent, _, leaf = name.rpartition(".")
        bias = cast(Tensor | None, linear.bias)
        placed = PackedLinear(packed[name], bias, choose).to(cast(Tensor, linear.weight).device)
        setattr(model.get_submodule(parent), leaf, placed)
    return model


def _linear(model: nn.Module, name: str, packed: Packed) -> nn.Module:
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise UsageError(f"the model has no layer {name}", hint="was it packed for another model?") from error
    transposed = type(layer).__name__ == "Conv1D"  # by name, because kernels know nothing of transformers
    if not (isinstance(layer, nn.Linear) or transposed):
        raise UsageError(
            f"{name} is a {type(layer).__name__}, not a linear layer", hint="only linear layers are packed"
        )
    shape = tuple(cast(Tensor, layer.weight).shape)
    if (shape[::-1] if transposed else shape) != packed.shape:
        raise UsageError(
            f"{name} is {shape[-transposed]} x {shape[not transposed]}, the packed weight {packed.shape[0]} x "
            f"{packed.shape[1]}",
            hint="was it packed for another model?",
        )
    return layer


def _dense_backend(packed: Packed, work: Work) -> str:
    return dense_backends(work.device.type)[0]
