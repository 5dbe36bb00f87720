"""The hidden states of a shard before one block, by batches: in memory, or on disk where they do not fit.

On disk they outlive the process, with what was gathered so far, so an interrupted shard goes on at the block where it
was: `hidden-<position>.bin` holds the batches one after the other, `progress.json` says which position is the newest
that is whole. The file of a position is removed when that of the next one is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from layerwise.results.durable import name_file
from layerwise.results.links import unfinished
from layerwise.stages.models.network import BEGIN

if TYPE_CHECKING:
    from layerwise.stages.calibrate.collect import Gathered

SPILL_BYTES = 256 << 20
"""Hidden states of a shard that are kept in memory; more are kept on disk."""

PROGRESS = "progress.json"


class Hidden(Protocol):
    """Batches of hidden states before the position that the network has come to; at first there are none."""

    position: int

    def batches(self) -> Iterator[Tensor]:
        """Those before the position, in order, on the CPU."""
        ...

    def advance(self, batches: Iterable[Tensor], done: Callable[[], Gathered]) -> None:
        """Replace them by those before the next position; `done` is called once all are made, and writes what was
        found on the way."""
        ...


class InMemory:
    """For as long as the process lives."""

    def __init__(self) -> None:
        self.position = BEGIN
        self._batches: list[Tensor] = []

    def batches(self) -> Iterator[Tensor]:
        """As of `Hidden`."""
        return iter(self._batches)

    def advance(self, batches: Iterable[Tensor], done: Callable[[], Gathered]) -> None:
        """As of `Hidden`; each batch takes the place of the one that it was made from."""
        for number, batch in enumerate(batches):
            self._batches[number : number + 1] = [batch]
        done()
        self.position += 1


class OnDisk:
    """In a folder, where an interrupted shard finds them again.

    Args:
        folder: for this shard alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.position = folder, BEGIN
        self._shapes: list[tuple[int, ...]] = []
        self._dtype = torch.float32
        folder.mkdir(parents=True, exist_ok=True)

    def found(self) -> dict[str, Any] | None:
        """What had been gathered when the shard was interrupted, as JSON; None if it begins. It goes on there."""
        try:
            progress: dict[str, Any] = json.loads((self.folder / PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        self._shapes = [tuple(shape) for shape in progress["shapes"]]
        self._dtype = getattr(torch, progress["dtype"])
        file = self._file(progress["position"])
        if not file.is_file() or file.stat().st_size != sum(map(self._size, self._shapes)):
            return None
        self.position = progress["position"]
        gathered: dict[str, Any] = progress["gathered"]
        return gathered

    def batches(self) -> Iterator[Tensor]:
        """As of `Hidden`."""
        with self._file(self.position).open("rb") as stream:
            for shape in self._shapes:
                content = bytearray(stream.read(self._size(shape)))
                yield torch.frombuffer(content, dtype=self._dtype).reshape(shape)

    def advance(self, batches: Iterable[Tensor], done: Callable[[], Gathered]) -> None:
        """As of `Hidden`."""
        shapes = []
        with unfinished(self._file(self.position + 1)) as partial:
            with partial.open("wb") as stream:
                for batch in batches:
                    shapes.append(tuple(batch.shape))
                    self._dtype = batch.dtype
                    stream.write(batch.contiguous().view(torch.uint8).numpy().tobytes())
            name_file(partial, self._file(self.position + 1))
        gathered = done()
        before, self._shapes = self._file(self.position), shapes
        self.position += 1
        progress = {
            "position": self.position,
            "shapes": shapes,
            "dtype": str(self._dtype).removeprefix("torch."),
            "gathered": asdict(gathered),
        }
        with unfinished(self.folder / PROGRESS) as partial:
            partial.write_text(json.dumps(progress), encoding="utf-8")
            name_file(partial, self.folder / PROGRESS)
        before.unlink(missing_ok=True)

    def _file(self, position: int) -> Path:
        return self.folder / f"hidden-{position}.bin"

    def _size(self, shape: tuple[int, ...]) -> int:
        return prod(shape) * self._dtype.itemsize
