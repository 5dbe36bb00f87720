"""Where the weights of a network stand in its checkpoint.

As a rule a parameter is stored under its own name, with the base model's prefix or without. Where transformers keeps
weights in another form than its files do (Mixtral's experts are stacked when they are loaded, a router is renamed),
names do not help; then a matrix is found by its contents: the stored tensor whose first row it begins with, and where
that ends, the next one, until every row is accounted for. That holds for any family and any renaming, and reads each
tensor in question once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from layerwise.errors import UnsupportedModel
from layerwise.stages.models.checkpoint import Checkpoint
from layerwise.stages.models.network import Unit, View

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from layerwise.stages.models.in_blocks import InBlocks


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

    Contents can be equal (experts that are all zero). Then the tensor wins whose name has the same numbers, of block
    and expert, and of those the one that is called as its like in other experts; none is taken twice.

    Args:
        network: the network.
        checkpoint: its files.
    """

    def __init__(self, network: InBlocks, checkpoint: Checkpoint) -> None:
        self.network, self.checkpoint = network, checkpoint
        self._prefix = str(getattr(network.model, "base_model_prefix", ""))
        self._renamings: dict[str, str | None] = {}
        self._by_view: dict[View, tuple[str, ...] | None] = {}
        self._taken: set[str] = set()
        self._known_patterns: dict[str, tuple[str, ...]] = {}
        self._rows_by_dtype: dict[torch.dtype, dict[bytes, list[str]]] = {}

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
        parts = self._by_contents(view)
        if parts is None or (view.transposed and len(parts) > 1):
            raise UnsupportedModel(
                f"{self.checkpoint.folder}: no tensor {view.tensor} of shape {tuple(parameter.shape)}",
                hint="load the model with transformers and save it again with `save_pretrained`",
            )
        return Stored(tuple(View(name, transposed=view.transposed) for name in parts))

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
        if name not in self._renamings:
            parameter = self.network.parameter(name).data
            same = [
                stored
                for stored in self._beginning_alike(parameter[0].flatten())
                if self.checkpoint.headers[stored][2] == tuple(parameter.shape)
                and _same(self.checkpoint.read(stored).to(parameter.dtype), parameter)
            ]
            self._renamings[name] = self._take(same, _numbers(name)) if same else None
        return self._renamings[name]

    def _by_contents(self, view: View) -> tuple[str, ...] | None:
        """The stored tensors that a part of a parameter is, one below the other."""
        if view not in self._by_view:
            rows = self._rows(view)
            parts: list[str] = []
            at = 0
            while at < len(rows):
                same = self._with_contents(rows[at:])
                if not same:
                    break
                pattern = self._pattern(view, len(parts)) if len(same) > 1 else None
                parts.append(self._take(same, [*_numbers(view.tensor), *map(str, view.index)], pattern))
                at += self.checkpoint.headers[parts[-1]][2][0]
            self._by_view[view] = tuple(parts) if at >= len(rows) else None
        return self._by_view[view]

    def _take(self, same: Sequence[str], numbers: Sequence[str], pattern: str | None = None) -> str:
        """One of several stored tensors with the same contents."""
        best = min(same, key=lambda name: (_numbers(name) != numbers, pattern not in (None, _without_numbers(name))))
        self._taken.add(best)
        return best

    def _pattern(self, view: View, number: int) -> str | None:
        """The name, less its numbers, of a certain part of a matrix like this one, learned from one whose contents
        leave no choice."""
        like = _without_numbers(view.tensor)
        if like not in self._known_patterns:
            self._known_patterns[like] = ()
            for unit in self.network.units:
                if unit.view is not None and unit.view.index and _without_numbers(unit.view.tensor) == like:
                    parts = self._certain(unit.view)
                    if parts:
                        self._known_patterns[like] = tuple(map(_without_numbers, parts))
                        break
        known = self._known_patterns[like]
        return known[number] if number < len(known) else None

    def _certain(self, view: View) -> list[str]:
        """The stored tensors of a part of a parameter; none if there is a choice."""
        rows = self._rows(view)
        parts: list[str] = []
        while len(rows):
            same = self._with_contents(rows, free=False)
            if len(same) != 1:
                return []
            parts += same
            rows = rows[self.checkpoint.headers[same[0]][2][0] :]
        return parts

    def _rows(self, view: View) -> Tensor:
        return view.part(self.network.parameter(view.tensor).data).flatten(1)

    def _with_contents(self, rows: Tensor, *, free: bool = True) -> list[str]:
        """The stored tensors that these rows begin with; only those that belong to nothing yet, or all."""
        found = []
        for name in self._beginning_alike(rows[0], free=free):
            height = self.checkpoint.headers[name][2][0]
            if height <= len(rows):
                stored = self.checkpoint.read(name).flatten(1).to(rows.dtype)
                if _same(stored, rows[:height]):
                    found.append(name)
        return found

    def _beginning_alike(self, row: Tensor, *, free: bool = True) -> list[str]:
        """Stored matrices that no parameter has the name of, with this first row."""
        if row.dtype not in self._rows_by_dtype:
            found: dict[bytes, list[str]] = {}
            for name in self._without_namesake:
                first = self.checkpoint.first_row(name).flatten().to(row.dtype)
                found.setdefault(_fingerprint(first), []).append(name)
            self._rows_by_dtype[row.dtype] = found
        names = self._rows_by_dtype[row.dtype].get(_fingerprint(row), [])
        return [name for name in names if not (free and name in self._taken)]

    @cached_property
    def _without_namesake(self) -> list[str]:
        direct = {stored for name in self.network.parameters if (stored := self.named(name))}
        headers = self.checkpoint.headers
        return [name for name in sorted(headers) if len(headers[name][2]) >= 2 and name not in direct]


def _numbers(name: str) -> list[str]:
    """Of block and expert, in the name of a tensor."""
    return [part for part in name.split(".") if part.isdigit()]


def _without_numbers(name: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, so that what is not a number is the same, too."""
    return a.shape == b.shape and _fingerprint(a) == _fingerprint(b)


def _fingerprint(tensor: Tensor) -> bytes:
    import torch

    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
