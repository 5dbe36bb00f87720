"""Where the weights of a network stand in its checkpoint.

As a rule a parameter is stored under its own name, with the base model's prefix or without. Where transformers keeps
weights in another form than its files do (Mixtral's experts are stacked when they are loaded, a router is renamed),
names do not help; then a matrix is found by its contents: the stored tensor whose first row it begins with, and where
that ends, the next one, until every row is accounted for. That holds for any family and any renaming, and reads each
tensor in question once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from layerwise.errors import UnsupportedModel
from layerwise.stages.models.checkpoint import Checkpoint
from layerwise.stages.models.network import Unit, View

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.models.causal_lm import CausalLM


@dataclass(frozen=True)
class Stored:
    """A unit's weight in the checkpoint.

    Args:
        parts: one below the other they are the weight; as a rule there is one.
        copies: further tensors that hold the same weight whole, of a tied embedding that was saved twice.
    """

    parts: tuple[View, ...]
    copies: tuple[str, ...] = ()

    @property
    def places(self) -> tuple[View, ...]:
        """Every place where (a part of) it stands, copies included."""
        return (*self.parts, *(View(name, transposed=self.parts[0].transposed) for name in self.copies))

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The weight, (out, in), in the checkpoint's dtype."""
        import torch

        parts = [view.read(checkpoint.read(view.tensor)) for view in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def size_bytes(self, checkpoint: Checkpoint) -> int:
        """Bytes that it takes there, copies included."""
        parts = sum(
            checkpoint.tensor_bytes(view.tensor) * _elements(view, checkpoint) // checkpoint.elements(view.tensor)
            for view in self.parts
        )
        return parts + sum(checkpoint.tensor_bytes(name) for name in self.copies)

    def pieces(self, weight: Tensor, checkpoint: Checkpoint) -> list[tuple[View, Tensor]]:
        """A weight (out, in) cut into what belongs into each place, copies included."""
        heights = [_height(view, checkpoint) for view in self.parts]
        copies = self.places[len(self.parts) :]
        return [*zip(self.parts, weight.split(heights), strict=True), *((view, weight) for view in copies)]

    def as_json(self) -> dict[str, Any]:
        """As it stands in an artifact."""
        return {"parts": [view.as_json() for view in self.parts], "copies": list(self.copies)}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Stored:
        """What `as_json` gave."""
        return cls(tuple(map(View.from_json, entry["parts"])), tuple(entry["copies"]))


def _shape(view: View, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Shape of the part of the tensor that a view means, as stored."""
    shape = checkpoint.headers[view.tensor][2][len(view.index) :]
    return shape if view.rows is None else (view.rows[1] - view.rows[0], *shape[1:])


def _elements(view: View, checkpoint: Checkpoint) -> int:
    return prod(_shape(view, checkpoint))


def _height(view: View, checkpoint: Checkpoint) -> int:
    """Rows of the matrix that it stands for."""
    shape = _shape(view, checkpoint)
    return shape[-1] if view.transposed else shape[0]


class Locator:
    """Finds units in the checkpoint that a network was loaded from.

    Args:
        network: the network.
        checkpoint: its files.
    """

    def __init__(self, network: CausalLM, checkpoint: Checkpoint) -> None:
        self.network, self.checkpoint = network, checkpoint
        self._prefix = str(network.model.base_model_prefix)
        self._renamings: dict[str, str | None] = {}

    def find(self, unit: Unit) -> Stored:
        """Where a unit's weight stands.

        Raises:
            UnsupportedModel: nowhere in a form that can be read.
        """
        view = unit.view
        assert view is not None, "a parent has no weight"
        parameter = self.network.parameter(view.tensor)
        names = [name for name, same in self.network.parameters.items() if same is parameter]
        found = [stored for name in names if (stored := self.named(name))]
        if found:
            copies = dict.fromkeys(found)
            return Stored((View(found[0], view.index, view.rows, view.transposed),), tuple(list(copies)[1:]))
        renamed = self._renamed(view.tensor)
        if renamed is not None:
            return Stored((View(renamed, view.index, view.rows, view.transposed),))
        parts = self._by_contents(view, parameter.data)
        if parts is None:
            raise UnsupportedModel(
                f"{self.checkpoint.folder}: no tensor {view.tensor} of shape {tuple(parameter.shape)}",
                hint="load the model with transformers and save it again with `save_pretrained`",
            )
        return Stored(tuple(parts))

    def names_inside(self, module: str, parameters: Iterable[str]) -> list[str]:
        """Stored names of those of some parameters that stand inside a module."""
        inside = [name for name in parameters if name.startswith(f"{module}.")]
        return [stored for name in inside if (stored := self.named(name))]

    def named(self, name: str) -> str | None:
        """The stored tensor that has the name and the shape of a parameter, of one dimension or more; None if there is
        none."""
        return self.checkpoint.find(name, tuple(self.network.parameter(name).shape), self._prefix)

    def _renamed(self, name: str) -> str | None:
        """The stored tensor that holds the whole of a parameter under another name."""
        import torch

        if name not in self._renamings:
            parameter = self.network.parameter(name).data
            self._renamings[name] = None
            for stored in self._first_rows.get(_fingerprint(parameter[0].flatten()), ()):
                if self.checkpoint.headers[stored][2] == tuple(parameter.shape):
                    same = torch.equal(self.checkpoint.read(stored).to(parameter.dtype), parameter)
                    self._renamings[name] = stored if same else self._renamings[name]
        return self._renamings[name]

    def _by_contents(self, view: View, parameter: Tensor) -> list[View] | None:
        part = view.part(parameter)
        rows = part.flatten(1)
        parts: list[View] = []
        at = 0
        while at < len(rows):
            name = self._beginning_with(rows[at:])
            if name is None:
                return None
            parts.append(View(name, transposed=view.transposed))
            at += self.checkpoint.headers[name][2][0]
        return parts if len(parts) == 1 or not view.transposed else None

    def _beginning_with(self, rows: Tensor) -> str | None:
        """The stored tensor that these rows begin with."""
        import torch

        for name in self._first_rows.get(_fingerprint(rows[0]), ()):
            height = self.checkpoint.headers[name][2][0]
            if height <= len(rows):
                stored = self.checkpoint.read(name).flatten(1).to(rows.dtype)
                if stored.shape[1] == rows.shape[1] and torch.equal(stored, rows[:height]):
                    return name
        return None

    @cached_property
    def _first_rows(self) -> Mapping[bytes, Sequence[str]]:
        """Stored matrices that no parameter has the name of, by their first row. Equal ones would be written to
        alike."""
        direct = {stored for name in self.network.parameters if (stored := self.named(name))}
        dtype = next(iter(self.network.parameters.values())).dtype
        found: dict[bytes, list[str]] = {}
        for name, (_, _, shape) in self.checkpoint.headers.items():
            if len(shape) >= 2 and name not in direct:
                row = self.checkpoint.first_row(name).flatten().to(dtype)
                found.setdefault(_fingerprint(row), []).append(name)
        return found


def _fingerprint(row: Tensor) -> bytes:
    import torch

    return row.contiguous().view(torch.uint8).numpy().tobytes()
