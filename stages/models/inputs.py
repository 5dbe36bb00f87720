"""What multiplies a weight, seen while a part of a network runs.

A linear layer or a convolution is a module, and a hook sees its input. The experts of a mixture are matrices of one
stacked parameter, which some function multiplies by the tokens routed to them; there is no module to hook. `Products`
looks at the products themselves: whenever a watched parameter, or a part of one, is a factor, it tells which part, and
what it was multiplied by. So experts are found by their shape and use, whatever a family calls them.

Left out: products written as `einsum`, and kernels that take all experts at once (the network runs them one by one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layerwise.stages.models.network import Unit, View

if TYPE_CHECKING:
    from layerwise.stages.models.in_blocks import InBlocks

Seen = Callable[[View, tuple[int, int], Tensor], None]
"""Takes a part of a parameter, its shape (out, in) as a matrix, and what it was multiplied by, (rows, in)."""

_PRODUCTS = frozenset({"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm"})


class Products(TorchFunctionMode):
    """Tells of every product of a watched parameter with something else.

    Args:
        watched: parameters by name, each contiguous.
        seen: is called for each product.
    """

    def __init__(self, watched: Mapping[str, Tensor], seen: Seen) -> None:
        super().__init__()
        self._seen = seen
        self._watched = {tensor.untyped_storage().data_ptr(): (name, tensor) for name, tensor in watched.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _PRODUCTS:
            self._look(func.__name__, args, kwargs or {})
        return result

    def _look(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        factors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if name == "addmm":  # (bias, x, M)
            factors = factors[1:]
        if len(factors) < 2:
            return
        first, second = factors[:2]
        if name == "__rmatmul__":
            first, second = second, first
        if self._found(second) is not None:
            self._tell(second, first, transposed=name != "linear")
        elif self._found(first) is not None:  # W @ x, with the tokens in columns
            self._tell(first, second.mT, transposed=False)

    def _found(self, factor: Tensor) -> tuple[str, Tensor] | None:
        # Views and their parameter share a storage; what was computed from it does not.
        return self._watched.get(factor.untyped_storage().data_ptr()) if factor.dim() >= 2 else None

    def _tell(self, factor: Tensor, X: Tensor, *, transposed: bool) -> None:
        found = self._found(factor)
        assert found is not None
        name, parameter = found
        matrix = factor.mT if transposed else factor  # (..., out, in)
        if matrix.dim() == 2:
            self._tell_one(name, parameter, matrix, X)
        elif matrix.dim() == 3 and X.dim() == 3 and len(X) == len(matrix):
            for one, rows in zip(matrix, X, strict=True):
                self._tell_one(name, parameter, one, rows)

    def _tell_one(self, name: str, parameter: Tensor, matrix: Tensor, X: Tensor) -> None:
        view = view_of(name, parameter, matrix)
        if view is not None:
            self._seen(view, (matrix.shape[0], matrix.shape[1]), X.reshape(-1, matrix.shape[1]))


def view_of(name: str, parameter: Tensor, matrix: Tensor) -> View | None:
    """Where in a parameter a matrix (out, in) stands that shares its storage; None if it is no plain part of it."""
    out, into = matrix.shape
    if matrix.stride() == (into, 1):
        transposed, part = False, (out, into)
    elif matrix.stride() == (1, out):
        transposed, part = True, (into, out)
    else:
        return None
    number, beside = divmod(int(matrix.storage_offset()) - int(parameter.storage_offset()), out * into)
    if beside or not parameter.is_contiguous():
        return None
    if tuple(parameter.shape) == part:
        return View(name, transposed=transposed)
    if parameter.dim() == 3 and tuple(parameter.shape[1:]) == part:
        return View(name, index=(number,), transposed=transposed)
    if parameter.dim() == 2 and parameter.shape[1] == part[1]:
        return View(name, rows=(number * part[0], (number + 1) * part[0]), transposed=transposed)
    return None


def alike(view: View, parameter: Tensor) -> list[View]:
    """Every part of a parameter that stands in it as this one does: all experts, when one was seen."""
    if view.whole:
        return [view]
    if view.index:
        return [View(view.tensor, (number,), None, view.transposed) for number in range(len(parameter))]
    assert view.rows is not None
    step = view.rows[1] - view.rows[0]
    starts = range(0, len(parameter) - step + 1, step)
    return [View(view.tensor, (), (start, start + step), view.transposed) for start in starts]


@contextmanager
def observed(network: InBlocks, units: Sequence[Unit], seen: Callable[[Unit, Tensor, Tensor], None]) -> Iterator[None]:
    """Tell of every input of some units while a part of the network runs.

    Args:
        network: whose parts run inside.
        units: whose inputs are of interest; those that nothing multiplies are left out.
        seen: takes the unit, its input as (rows, in), and the tensor that it came in, which is the same object for
            units that read the same input.
    """
    by_view: dict[View, Unit] = {}
    with ExitStack() as stack:
        for unit in units:
            if not unit.multiplied or unit.view is None:
                continue
            module = network.owner(unit)
            if module is None:
                by_view[unit.view] = unit
            else:
                handle = module.register_forward_pre_hook(_hook(network, unit, seen), with_kwargs=True)
                stack.callback(handle.remove)
        if by_view:
            watched = {view.tensor: network.parameter(view.tensor) for view in by_view}

            def tell(view: View, shape: tuple[int, int], X: Tensor) -> None:
                if view in by_view:
                    seen(by_view[view], X, X)

            stack.enter_context(Products(watched, tell))
        yield


def _hook(
    network: InBlocks, unit: Unit, seen: Callable[[Unit, Tensor, Tensor], None]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if network.bypasses(module):
            return
        X: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        seen(unit, _rows(module, X), X)

    return observe


def _rows(module: nn.Module, X: Tensor) -> Tensor:
    """A layer's input as rows of what one output is made from: (rows, in); of a convolution, its patches, (rows,
    channels · kernel), channels first, so those of a group stand together."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return X.reshape(-1, X.shape[-1])

    # `nn` keeps every setting as a tuple, one entry for each dimension, and pads the last dimension first.
    settings = zip(module.kernel_size, module.dilation, _padding(module), module.stride, strict=True)
    kernel, dilation, padding, stride = (tuple(values) for values in zip(*settings, strict=True))
    images = X if X.dim() > len(kernel) + 1 else X.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    images = torch.nn.functional.pad(images, [side for pair in reversed(padding) for side in pair], mode=mode)
    if len(kernel) == 1:  # a sequence is an image of one row
        images = images.unsqueeze(-2)
        kernel, dilation, stride = ((1, *values) for values in (kernel, dilation, stride))
    patches = torch.nn.functional.unfold(images, kernel, dilation=dilation, stride=stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _padding(module: nn.Conv1d | nn.Conv2d) -> list[tuple[int, int]]:
    """Before and after each dimension; of an odd `same`, the greater half comes after."""
    if module.padding == "same":
        totals = [step * (size - 1) for size, step in zip(module.kernel_size, module.dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    return [(int(size), int(size)) for size in module.padding]


def reading(module: nn.Module | None) -> tuple[Any, ...]:
    """How a layer makes rows of its input: two that read the same tensor have the same rows where this is equal."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return ()
    sizes = (module.kernel_size, module.stride, tuple(_padding(module)), module.dilation)
    return (*sizes, module.padding_mode, module.groups)
