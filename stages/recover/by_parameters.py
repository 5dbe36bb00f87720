"""Repairs of parameters that are no units, as the stage makes them: they leave a dense model of their own below."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from layerwise.results.durable import settle_file
from layerwise.results.links import unfinished
from layerwise.stages.contract import Context, ModelSource
from layerwise.stages.models.compressed import BASE, source_of
from layerwise.stages.recover import RepairEntry, find_repair
from layerwise.stages.recover.texts import Text


def fit_parameters(
    context: Context, entry: RepairEntry, folder: Path, text: Text, key: str, out: Path
) -> dict[str, dict[str, Any]]:
    """Make a repair of scope `parameters`.

    Args:
        context: the stage's.
        folder: the model to be repaired.
        text: to be fitted to.
        key: of the repair, at the start of those of its items.
        out: gets the `base`.
    Returns:
        no levels: none is made anew.
    """
    fitted = context.items / f"fitted-{key}.safetensors"
    fit = partial(_fit, workflow=context.model, folder=folder, text=text, target=fitted)
    context.executor.map(fit, [entry], keys=[f"{key}-fitted"], note="models")
    context.executor.map(partial(write_base, workflow=context.model, folder=folder, out=out), [fitted])
    return {}


def _fit(entry: RepairEntry, *, workflow: ModelSource, folder: Path, text: Text, target: Path) -> int:
    from safetensors.torch import save_file

    from layerwise.stages.data.text import load_sequences
    from layerwise.stages.models.causal_lm import CausalLM

    student = CausalLM.load(source_of(folder, workflow))
    dense = CausalLM.load(replace(workflow, compressed=None))
    found = find_repair(entry.method).run(student, dense, load_sequences(text.tokens).to(student.device), entry)
    with unfinished(target) as partial_file:
        save_file({f"best/{name}": tensor.cpu().contiguous() for name, tensor in found.items()}, partial_file)
        settle_file(partial_file, target)
    return len(found)


def write_base(checkpoint: Path, *, workflow: ModelSource, folder: Path, out: Path) -> None:
    """Write the dense model below with the trained parameters that are no units, out of a training's checkpoint."""
    import torch
    from safetensors import safe_open

    from layerwise.stages.models.causal_lm import CausalLM
    from layerwise.stages.models.checkpoint import Checkpoint
    from layerwise.stages.transform.folder import Layout

    source = source_of(folder, workflow)
    network = CausalLM.load(replace(source, dtype="float32", compressed=None, device="cpu"))
    layout = Layout.of(network, Checkpoint(source.path, source.trust))
    with safe_open(checkpoint, framework="pt") as file, torch.no_grad():
        for name in (key.removeprefix("best/") for key in file.keys() if key.startswith("best/")):  # noqa: SIM118
            network.parameter(name).copy_(file.get_tensor(f"best/{name}"))
    shutil.rmtree(out / BASE, ignore_errors=True)
    (out / BASE).mkdir(parents=True)
    layout.save(network, (), out / BASE)
