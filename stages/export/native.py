"""`native`: the model as small as it was promised: levels encoded, everything else as in the checkpoint, in one file.

    model.safetensors   what no level covers, under its own name; of every encoded unit `layerwise/<unit>/<tensor>`
    config.json, ...    as of the dense model

The header of the file holds, under `layerwise`, the units with their levels' recipes, what is dropped, and the shapes
of the tensors that are to be put together again. Its tensors take the predicted bytes, to the byte. `load` makes a
runnable model of it, with every weight decoded; no other tool reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.errors import CorruptArtifact
from layerwise.stages.contract import ModelSource
from layerwise.stages.export import copy_beside
from layerwise.stages.levels.level import Level
from layerwise.stages.models.checkpoint import Checkpoint
from layerwise.stages.models.compressed import CompressedModel, Weights
from layerwise.stages.models.stored import Stored
from layerwise.stages.models.trust import loading

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.models.causal_lm import CausalLM

KEY = "layerwise"
FILE = "model.safetensors"
GENERATION = "generation_config.json"


def native(source: ModelSource, out: Path) -> None:
    """Write the folder."""
    from safetensors.torch import save_file

    from layerwise.stages.models.causal_lm import CausalLM
    from layerwise.stages.models.survey import take_survey

    checkpoint = Checkpoint(source.path, source.trust)
    survey = take_survey(CausalLM.load(replace(source, compressed=None)), source)
    entries = () if source.compressed is None else CompressedModel(source.compressed).document.units
    dropped = [entry.unit.name for entry in entries if entry.unit.is_parent]
    encoded = {entry.unit.name for entry in entries if not entry.unit.is_parent}
    kept = survey.without(dropped)
    # A tensor of several units (experts) is given up as soon as one of them is encoded; the others stand one by one.
    broken = {view.tensor for unit, stored in kept.units if unit.name in encoded for view in stored.places}
    weights = Weights(source)
    tensors: dict[str, Tensor] = {name: checkpoint.read(name) for name in kept.tensors if name not in broken}
    units = []
    for unit, stored in kept.units:
        if any(view.tensor in broken for view in stored.places):
            level = weights.level(unit.name, stored)
            recipe = {"recipe": dict(level.recipe), "shape": list(level.shape)}
            units.append({"unit": unit.as_json(), "stored": stored.as_json(), "level": level.name} | recipe)
            tensors |= {f"{KEY}/{unit.name}/{name}": tensor for name, tensor in level.tensors.items()}
    missing = {
        name: [str(checkpoint.dtype(name)).removeprefix("torch."), list(checkpoint.headers[name][2])]
        for name in checkpoint.headers
        if name not in tensors
    }
    document = {"units": units, "dropped": dropped, "missing": missing}
    copy_beside(checkpoint, out)
    save_file(
        {name: tensors[name].contiguous() for name in sorted(tensors)},
        out / FILE,
        metadata={"format": "pt", KEY: json.dumps(document, sort_keys=True)},
    )


def load(folder: Path, dtype: str = "float32") -> CausalLM:
    """A native folder as a runnable network; `.model` is the Hugging Face model, in evaluation mode.

    Raises:
        CorruptArtifact: it is no native folder.
        UnsupportedModel: its configuration is that of no causal language model.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from layerwise.stages.models.causal_lm import CausalLM

    try:
        opened = safe_open(folder / FILE, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CorruptArtifact(f"{folder / FILE} cannot be read: {error}", hint="export the model again") from error
    with opened as file:
        metadata = file.metadata() or {}
        if KEY not in metadata:
            raise CorruptArtifact(f"{folder / FILE} was not exported with `format: native`")
        document = json.loads(metadata[KEY])
        state = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(f"{KEY}/")}  # noqa: SIM118
        for name, (kind, shape) in document["missing"].items():
            state[name] = torch.zeros(shape, dtype=getattr(torch, kind))
        for entry in document["units"]:
            prefix = f"{KEY}/{entry['unit']['name']}/"
            stored = {
                name.removeprefix(prefix): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118
                if name.startswith(prefix)
            }
            level = Level(entry["level"], entry["recipe"], tuple(entry["shape"]), stored)
            _put(state, Stored.from_json(entry["stored"]), level.decode())
    with loading(folder, trust=False) as options:
        config = AutoConfig.from_pretrained(folder, **options)
        with torch.device("meta"):  # only its class: the weights are at hand
            family = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    model = family.from_pretrained(None, config=config, state_dict=state, dtype=getattr(torch, dtype))
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    network = CausalLM(model)
    network.leave_out(document["dropped"])
    return network


def _put(state: Mapping[str, Tensor], stored: Stored, weight: Tensor) -> None:
    """A weight (out, in) into the tensors that hold it."""
    at = 0
    for view in stored.parts:
        height = len(view.read(state[view.tensor]))
        view.write(state[view.tensor], weight[at : at + height])
        at += height
    for view in stored.places[len(stored.parts) :]:
        view.write(state[view.tensor], weight)
