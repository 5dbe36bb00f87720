"""`export`: a Hugging Face folder that other tools load.

Dense weights for now: every unit holds its decoded values in the checkpoint's dtype, so the folder loads anywhere and
gives the quality of the compressed model at the size of the dense one.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field

from layerwise.stages.apply.model import AppliedModel
from layerwise.stages.contract import Context, ModelSource, Params, Port, Stage


class ExportParams(Params):
    """The format."""

    format: Literal["dense"] = Field("dense", description="decoded weights in the checkpoint's own dtype and files")


def export(context: Context, params: ExportParams) -> None:
    """Write the model folder: weights, config, tokenizer, and `layerwise.json` with the allocation."""
    from layerwise.stages.models.checkpoint import Checkpoint

    applied = AppliedModel(context.input("model"))
    checkpoint = Checkpoint(context.model.path)
    for file in sorted(context.model.path.iterdir()):
        if file.is_file() and file not in checkpoint.files and file.suffix in (".json", ".txt", ".model", ".jinja"):
            shutil.copyfile(file, context.out / file.name)
    write = partial(_write_file, model=context.model, applied=applied, out=context.out)
    context.executor.map(write, [file.name for file in checkpoint.files], note="weight files")
    (context.out / "layerwise.json").write_text(json.dumps(applied.allocation, indent=1) + "\n", encoding="utf-8")


def _write_file(name: str, *, model: ModelSource, applied: AppliedModel, out: Path) -> None:
    """One weight file with the same tensors, the units' replaced."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    replaced = set(applied.tensors.values())
    with safe_open(model.path / name, framework="pt") as source:
        tensors = {
            tensor: applied.read(tensor) if tensor in replaced else source.get_tensor(tensor)
            for tensor in sorted(source.keys())
        }
        save_file(tensors, out / name, metadata=source.metadata())


STAGE = Stage("export", ExportParams, export, gives="checkpoint", takes={"model": Port("model")})
