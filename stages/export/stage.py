"""`export`: a Hugging Face folder that other tools load.

Dense weights for now: every unit holds its decoded values in the checkpoint's dtype, so the folder loads anywhere and
gives the quality of the compressed model at the size of the dense one. A model with dropped parts is refused: a dense
folder cannot say that. Of each file one weight is held decoded at a time beside the file's own.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field

from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import Context, ModelSource, Params, Port, Stage
from layerwise.stages.models.compressed import CompressedModel, source_of


class ExportParams(Params):
    """The format."""

    format: Literal["dense"] = Field("dense", description="decoded weights in the checkpoint's own dtype and files")


def export(context: Context, params: ExportParams) -> None:
    """Write the model folder: weights, config, tokenizer, and `layerwise.json` with where it came from.

    Raises:
        UnsupportedModel: parts of the model are dropped, which a dense file cannot say.
    """
    from layerwise.stages.models.checkpoint import Checkpoint

    model = context.input("model")
    document = CompressedModel(model).document
    dropped = [entry.unit.name for entry in document.units if entry.unit.is_parent]
    if dropped:
        raise UnsupportedModel(
            f"a dense folder has every block whole, but {len(dropped)} parts of this model are dropped, the first is "
            f"{dropped[0]}",
            hint="export an allocation without dropped parts, or load the `model` artifact with layerwise",
        )
    source = source_of(model, context.model)
    checkpoint = Checkpoint(source.path)
    for file in checkpoint.beside:
        shutil.copyfile(file, context.out / file.name)
    write = partial(_write_file, source=source, out=context.out)
    context.executor.map(write, [file.name for file in checkpoint.files], note="weight files")
    (context.out / "layerwise.json").write_text(json.dumps(dict(document.about), indent=1) + "\n", encoding="utf-8")


def _write_file(name: str, *, source: ModelSource, out: Path) -> None:
    """One weight file with the same tensors, the units' replaced."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from layerwise.stages.models.checkpoint import Checkpoint

    checkpoint = Checkpoint(source.path)
    with safe_open(source.path / name, framework="pt") as file:
        tensors = {tensor: file.get_tensor(tensor) for tensor in sorted(file.keys())}
        metadata = file.metadata()
    if source.compressed is not None:
        model = CompressedModel(source.compressed)
        for entry in model.document.units:
            stored = entry.stored
            if stored is None or not any(view.tensor in tensors for view in stored.places):
                continue
            for view, piece in stored.pieces(model.level(entry.unit.name).decode(), checkpoint):
                if view.tensor in tensors:
                    view.write(tensors[view.tensor], piece)
    save_file({tensor: value.contiguous() for tensor, value in tensors.items()}, out / name, metadata=metadata)


STAGE = Stage("export", ExportParams, export, gives="checkpoint", takes={"model": Port("model")})
