"""`dense`: decoded weights in the checkpoint's own names, dtypes and files.

Loads anywhere and gives the quality of the compressed model at the size of the dense one. A model with dropped parts is
refused: a dense folder cannot say that. Of each file one weight is held decoded at a time beside the file's own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import ModelSource
from layerwise.stages.export import copy_beside
from layerwise.stages.export.held import Held, Recipe
from layerwise.stages.export.shards import write_file
from layerwise.stages.models.checkpoint import Checkpoint
from layerwise.stages.models.compressed import CompressedModel
from layerwise.stages.models.folder import INDEX
from layerwise.stages.models.network import Unit


def dense(source: ModelSource, out: Path) -> None:
    """Write the folder.

    Raises:
        UnsupportedModel: parts of the model are dropped.
    """
    model = None if source.compressed is None else CompressedModel(source.compressed)
    dropped = [] if model is None else [entry.unit.name for entry in model.document.units if entry.unit.is_parent]
    if dropped:
        raise UnsupportedModel(
            f"a dense folder has every block whole, but {len(dropped)} parts of this model are dropped, the first is "
            f"{dropped[0]}",
            hint="export it with `format: native`, or an allocation without dropped parts",
        )
    checkpoint = Checkpoint(source.path, source.trust)
    copy_beside(checkpoint, out)
    if checkpoint.contents.index is not None:
        shutil.copyfile(checkpoint.contents.index, out / INDEX)
    for file in checkpoint.files:
        _write_file(file, checkpoint, model, out)


def held() -> Held:
    """What a dense folder can hold."""
    return Held("dense", why_not, None)


def why_not(unit: Unit, recipe: Recipe) -> str | None:
    """Why a dense folder cannot hold a level; None if it can."""
    return "a dense folder has every block whole" if recipe["encoding"] == "drop" else None


def _write_file(file: Path, checkpoint: Checkpoint, model: CompressedModel | None, out: Path) -> None:
    """One weight file with the same tensors, the units' replaced."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored_file:
        tensors = {tensor: stored_file.get_tensor(tensor) for tensor in sorted(stored_file.keys())}
        metadata = stored_file.metadata()
    for entry in () if model is None else model.document.units:
        stored = entry.stored
        if model is None or stored is None or not any(view.tensor in tensors for view in stored.places):
            continue
        for view, piece in stored.pieces(model.level(entry.unit.name).decode(), checkpoint):
            if view.tensor in tensors:
                view.write(tensors[view.tensor], piece)
    target = out / checkpoint.place_of(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(tensors, target, metadata)
