"""What an export format stores for each level, in bytes of the weight files: for a budget that is counted in them.

A packed layer is charged the tensors that it becomes and their lines in a header, everything else what the checkpoint
has for it; so what `export` writes takes the predicted bytes exactly. A tensor that several units share (stacked
experts) has its line in the rest of the model. Left out: models with weights that were compressed before and get no
levels now.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import ModelSource
from layerwise.stages.export import find_held
from layerwise.stages.export.held import PACKED
from layerwise.stages.export.packed_folder import module_of, named_layout
from layerwise.stages.export.shards import FILE_BYTES, charged_bytes, data_bytes, header
from layerwise.stages.models.checkpoint import Checkpoint, read_metadata

if TYPE_CHECKING:
    from layerwise.stages.levels.database import DatabaseIndex, LevelEntry, UnitEntry


@dataclass(frozen=True)
class Charge:
    """What a level takes in the weight files.

    Args:
        size_bytes: with its lines in headers.
        values_bytes: of its tensors alone.
    """

    size_bytes: int
    values_bytes: int


class Charges:
    """The charges of a database's levels in a format.

    Args:
        name: of the format.
        settings: of it, as `export` takes them.
        index: the database.
        source: the model whose levels these are.
    Raises:
        UsageError: nobody offers the format, or it does not say what it stores.
        UnsupportedModel: weights without levels were compressed before.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], index: DatabaseIndex, source: ModelSource) -> None:
        if index.carried:
            raise UnsupportedModel(
                f"format: {name}: {len(index.carried)} weights were compressed before and get no levels now, the first "
                f"is {min(index.carried)}, so their bytes in that format are not known",
                hint="give `compress` the same `targets` as before, or leave `format` out",
            )
        self.form, self._index, self._checkpoint = find_held(name, settings), index, Checkpoint(source.path)

    @cached_property
    def rest(self) -> int:
        """Bytes of the weight files that are no level's."""
        in_levels: defaultdict[str, int] = defaultdict(int)
        whole: set[str] = set()
        for unit in self._index.units:
            for view in unit.stored.places if unit.stored else ():
                if view.whole:
                    whole.add(view.tensor)
                else:
                    width = self._checkpoint.tensor_bytes(view.tensor) // self._checkpoint.elements(view.tensor)
                    in_levels[view.tensor] += unit.n_weights * width
        left = [self._charged(name) - in_levels[name] for name in self._checkpoint.headers if name not in whole]
        return self._beginnings + sum(left)

    def why_not(self, unit: UnitEntry, level: LevelEntry) -> str | None:
        """Why the format cannot hold a level that could be made; None if it can."""
        assert level.recipe is not None
        return self.form.why_not(unit.unit, level.recipe)

    def charge(self, unit: UnitEntry, level: LevelEntry) -> Charge:
        """Of a level that the format can hold."""
        assert level.recipe is not None
        if unit.stored is None:
            return Charge(0, 0)
        if self.form.layout is not None and level.recipe["encoding"] in PACKED:
            layout = named_layout(module_of(unit.stored), self.form.layout(unit.unit, level.recipe))
            return Charge(charged_bytes(layout), data_bytes(layout))
        values = unit.stored.size_bytes(self._checkpoint)
        lines = sum(
            self._charged(view.tensor) - self._checkpoint.tensor_bytes(view.tensor)
            for view in unit.stored.places
            if view.whole
        )
        return Charge(values + lines, values)

    def _charged(self, tensor: str) -> int:
        """Of a tensor as it stands in the checkpoint."""
        layout = {tensor: self._checkpoint.headers[tensor][1:]}
        return data_bytes(layout) if self.form.layout is None else charged_bytes(layout)

    @property
    def _beginnings(self) -> int:
        """Of files, before what their tensors are charged."""
        if self.form.layout is not None:
            return FILE_BYTES
        headers = self._checkpoint.headers
        files = {
            file: {name: entry[1:] for name, entry in headers.items() if entry[0] == file}
            for file in self._checkpoint.files
        }
        return sum(len(header(layout, read_metadata(file))) for file, layout in files.items())
