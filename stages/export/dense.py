"""`dense`: decoded weights in the checkpoint's own names, dtypes and files.

Loads anywhere and gives the quality of the compressed model at the size of the dense one. A model with dropped blocks
becomes a smaller one (`shorter.py`), and so does one with fewer heads or channels (`narrower.py`); dropped half-blocks
are refused. Of each file one weight is held decoded at a time
beside the file's own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from layerwise.stages.contract import ModelSource
from layerwise.stages.export import copy_beside
from layerwise.stages.export.held import Held, Recipe
from layerwise.stages.export.narrower import Narrower, check_same, narrower
from layerwise.stages.export.shards import write_file
from layerwise.stages.export.shorter import Shorter, shorter, write_config
from layerwise.stages.models.checkpoint import Checkpoint
from layerwise.stages.models.compressed import CompressedModel
from layerwise.stages.models.folder import INDEX
from layerwise.stages.models.network import Unit


def dense(source: ModelSource, out: Path, *, pad: bool = False) -> None:
    """Write the folder.

    Args:
        pad: fill half-blocks that are narrower than others up with zeros, where a configuration has one width for all.
    Raises:
        UnsupportedModel: half-blocks are dropped, or the configuration cannot say which blocks are, or how wide.
    """
    model = None if source.compressed is None else CompressedModel(source.compressed)
    left = shorter([] if model is None else [entry.unit for entry in model.document.units if entry.unit.is_parent])
    checkpoint = Checkpoint(source.path, source.trust)
    narrow = Narrower() if model is None else narrower(source, model, checkpoint, left, pad=pad)
    copy_beside(checkpoint, out)
    if left.gone or narrow.cut:
        shapes = {name: header[2] for name, header in checkpoint.headers.items()}
        shapes |= {name: cut.shape for name, cut in narrow.cut.items()}
        stored = {new: shapes[name] for name in shapes if (new := left.name(name))}
        write_config(source, out, left, stored, narrow.settings)
        _write_index(checkpoint, out, left, shapes)
    elif checkpoint.contents.index is not None:
        shutil.copyfile(checkpoint.contents.index, out / INDEX)
    for file in checkpoint.files:
        _write_file(file, checkpoint, model, out, left, narrow)
    if narrow.cut:
        check_same(source, out)


def _write_index(checkpoint: Checkpoint, out: Path, left: Shorter, shapes: Mapping[str, Sequence[int]]) -> None:
    """The index of the weight files, where the model has one, by the new names."""
    if checkpoint.contents.index is None:
        return
    kept = {name: new for name in checkpoint.headers if (new := left.name(name))}
    places = {new: checkpoint.place_of(checkpoint.headers[name][0]).as_posix() for name, new in kept.items()}
    size = sum(checkpoint.tensor_bytes(name) * prod(shapes[name]) // max(1, checkpoint.elements(name)) for name in kept)
    document = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (out / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def held() -> Held:
    """What a dense folder can hold."""
    return Held("dense", why_not, None)


def why_not(unit: Unit, recipe: Recipe) -> str | None:
    """Why a budget in dense files has no place for a level; None if it has."""
    return "the files of a smaller model are not counted" if recipe["encoding"] in ("drop", "narrow") else None


def _write_file(
    file: Path, checkpoint: Checkpoint, model: CompressedModel | None, out: Path, left: Shorter, narrow: Narrower
) -> None:
    """One weight file with the same tensors, the units' replaced; none if nothing of it is left."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored_file:
        tensors = {tensor: stored_file.get_tensor(tensor) for tensor in sorted(stored_file.keys())}
        metadata = stored_file.metadata()
    for entry in () if model is None else model.document.units:
        stored = entry.stored
        places = () if stored is None else [view.tensor for view in stored.places]
        if model is None or stored is None or not any(name in tensors and name not in narrow.cut for name in places):
            continue
        for view, piece in stored.pieces(model.level(entry.unit.name).decode(), checkpoint):
            if view.tensor in tensors:
                view.write(tensors[view.tensor], piece)
    for name in tensors.keys() & narrow.cut.keys():
        assert model is not None
        tensors[name] = narrow.cut[name].of(tensors[name], model)
    renamed = {new: tensor for name, tensor in tensors.items() if (new := left.name(name))}
    if not renamed:
        return
    target = out / checkpoint.place_of(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(renamed, target, metadata)
