"""What every weight laid out for a kernel has in common.

A `Packed` is plain tensors and a few settings; `dense` says exactly what it means, so every kernel has something to be
tested against, and a level with no kernel can still run. Kernels take the tensors as they are: whatever a kernel wants
in another order is put into that order when the weight is packed, not when it is used.

Left out: which kernel runs it (`backends.py`), and how a level of a database becomes one
(`layerwise.stages.levels`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from layerwise.errors import UsageError

FORMATS = {
    "dense": "layerwise.kernels.dense:Dense",
    "quantized": "layerwise.kernels.quantized:Quantized",
    "block_sparse": "layerwise.kernels.block_sparse:BlockSparse",
    "n_m_sparse": "layerwise.kernels.n_m_sparse:NMSparse",
    "unstructured": "layerwise.kernels.unstructured:Unstructured",
    "low_rank": "layerwise.kernels.low_rank:LowRank",
}
"""Every format by its name: where its class stands."""


@dataclass(frozen=True, eq=False)
class Packed(ABC):
    """A weight laid out for a kernel. Its fields are tensors, other `Packed`s, None, or JSON values.

    Args:
        shape: (n, k) of the dense weight: out, in.
    """

    format: ClassVar[str]
    """Its name in FORMATS."""

    shape: tuple[int, int]

    @property
    @abstractmethod
    def label(self) -> str:
        """What decides its time beside the shape: `int4-g128-sym`. Two weights of one shape and label cost the same."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight it stands for: (n, k), float32, exact."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is stored, by field; those of a packed part as `part.field`."""
        found: dict[str, Tensor] = {}
        for name, value in self._fields():
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, Packed):
                found |= {f"{name}.{inner}": tensor for inner, tensor in value.tensors.items()}
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """All but the tensors, as JSON; `rebuild` takes both."""
        found: dict[str, Any] = {"format": self.format}
        for name, value in self._fields():
            if isinstance(value, Packed):
                found[name] = value.settings
            elif not isinstance(value, Tensor):
                found[name] = list(value) if isinstance(value, tuple) else value
        return found

    @property
    def size_bytes(self) -> int:
        """Bytes of the stored tensors, to the byte."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in self._fields() if isinstance(value, Tensor | Packed)
        }
        return replace(self, **moved)

    def _fields(self) -> list[tuple[str, Any]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def rebuild(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Packed:
    """Put a weight together again from what it was saved as.

    Args:
        settings: `Packed.settings`.
        tensors: `Packed.tensors`.
    Raises:
        UsageError: an unknown format.
    """
    name = settings["format"]
    if name not in FORMATS:
        raise UsageError(
            f"unknown packed format '{name}' (known: {', '.join(FORMATS)})",
            hint="it was written by another version of layerwise; apply the allocation again",
        )
    module, _, attribute = FORMATS[name].partition(":")
    values: dict[str, Any] = {key: value for key, value in settings.items() if key != "format"}
    values["shape"] = tuple(values["shape"])
    for key, value in values.items():
        if isinstance(value, Mapping) and "format" in value:
            prefix = f"{key}."
            inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            values[key] = rebuild(value, inner)
    values |= {name: tensor for name, tensor in tensors.items() if "." not in name}
    packed: Packed = getattr(import_module(module), attribute)(**values)
    return packed
