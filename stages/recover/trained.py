"""Repairs of scope `model`, as the stage makes them: one training on a worker, told of stretch by stretch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.stages.contract import Context, ModelSource, Row
from layerwise.stages.models.compressed import CompressedModel, source_of
from layerwise.stages.recover.by_parameters import write_base
from layerwise.stages.recover.texts import Text

if TYPE_CHECKING:
    from layerwise.stages.models.network import Unit
    from layerwise.stages.recover.training import Trainer
    from layerwise.stages.recover.training_params import TrainingParams

HISTORY = "recovery.json"
"""In the artifact: of every training its losses, and why it ended."""


def train(
    context: Context, entry: TrainingParams, folder: Path, units: Sequence[Unit], text: Text, key: str, out: Path
) -> dict[str, dict[str, Any]]:
    """Train one repair and write what comes of it.

    Args:
        context: the stage's.
        folder: the model to be repaired.
        units: those that it is made of.
        text: to be trained on.
        key: of the repair, at the start of those of its items.
        out: gets the units' files, and where parameters that are no units were trained a `base` of its own.
    Returns:
        by unit, name and recipe of its level.
    Raises:
        DataError: the text is too short.
        NotFinite: the model gives NaN or Inf before it is trained.
        UsageError: its teacher is of another kind.
    """
    entry = entry.for_units(units)
    checkpoints = context.items / f"train-{key}"
    work = partial(
        open_training,
        entry=entry,
        workflow=context.model,
        folder=folder,
        units=tuple(unit.name for unit in units),
        text=text,
        checkpoints=checkpoints,
        out=out,
    )
    history: dict[str, Any] = {"repair": entry.name, "losses": [], "heldout": [], "stop": ""}
    with context.executor.replicas(work) as pool:
        for point in _points(entry):
            (told,) = pool.map([("train", point)], keys=[f"{key}-step-{point}"])
            context.record("recovery", _rows(entry, told, point, context.data[text.name].sequence_length))
            context.progress(point, entry.steps, f"steps; held-out loss {told['heldout']:.4g}")
            history["losses"] += told["losses"]
            history["heldout"].append([point, told["heldout"]])
            history |= {"best_step": told["best_step"], "stop": told["stop"]}
            if told["stop"]:
                break
        (levels,) = pool.map([("write", point)], keys=[f"{key}-written"])
    if not entry.of_units:
        write = partial(write_base, workflow=context.model, folder=folder, out=out)
        context.executor.map(write, [checkpoints / _file(point)])
    _write_history(folder, history, out)
    return dict(levels)


def _points(entry: TrainingParams) -> list[int]:
    """The steps after which there is a checkpoint, the start and the end among them."""
    return [*range(0, entry.steps, entry.check_every), entry.steps]


def _file(step: int) -> str:
    return f"step-{step:08}.safetensors"


def _rows(entry: TrainingParams, told: Mapping[str, Any], point: int, length: int) -> list[Row]:
    """Rows of the `recovery` table: the loss of every step of a stretch, and the held-out one behind it."""
    first = point - len(told["losses"]) if told["stop"] != "nan" else told["step"] - 1 - len(told["losses"])
    per_step = entry.batch_size * entry.accumulate * length
    common = {"repair": entry.name, "status": "ok"}
    rows: list[Row] = [
        {**common, "step": step, "metric": "loss", "value": loss, "n_tokens": step * per_step}
        for step, loss in enumerate(told["losses"], first + 1)
    ]
    if told["stop"] == "nan":
        error = f"the loss of step {told['step']} is not finite; the state after step {told['best_step']} is kept"
        return [*rows, {"repair": entry.name, "step": told["step"], "metric": "loss", "status": "nan", "error": error}]
    return [*rows, {**common, "step": point, "metric": "heldout_loss", "value": told["heldout"]}]


def open_training(
    *,
    entry: TrainingParams,
    workflow: ModelSource,
    folder: Path,
    units: tuple[str, ...],
    text: Text,
    checkpoints: Path,
    out: Path,
) -> Callable[[tuple[str, int]], dict[str, Any]]:
    """Load what a training takes; gives what answers `("train", step)` and `("write", step)`."""
    from layerwise.stages.data.text import load_sequences
    from layerwise.stages.models.causal_lm import CausalLM
    from layerwise.stages.models.checkpoint import Checkpoint
    from layerwise.stages.recover import find_repair
    from layerwise.stages.recover.by_block import BlockTrainer
    from layerwise.stages.recover.parts import ModelRepair
    from layerwise.stages.recover.training import Trainer, split_sequences

    train_on, heldout = split_sequences(load_sequences(text.tokens), entry, text.name)
    source = source_of(folder, workflow)
    student = CausalLM.load(source)
    asked = entry.by_block or any(weight for name, weight in entry.loss.items() if name != "cross_entropy")
    teacher = CausalLM.load(replace(workflow, compressed=None)) if asked else None
    model = CompressedModel(folder)
    made = {one.unit.name: one for one in model.document.units}
    levels = {name: (made[name].unit, model.level(name).to(source.device)) for name in units}
    checkpoint = Checkpoint(source.path, source.trust)

    def dense(unit: str) -> Any:
        stored = made[unit].stored
        assert stored is not None, "a parent has no weight"
        return stored.read(checkpoint).to(source.device)

    parts = find_repair(entry.method).run(ModelRepair(student, levels, dense), entry)
    texts = train_on.to(source.device), heldout.to(source.device)
    trainer: Trainer
    if entry.by_block:
        assert teacher is not None, "asked for above"
        of = [levels[name][0] for name in units]
        trainer = BlockTrainer(student, teacher, parts, *texts, entry, checkpoints, of)
    else:
        trainer = Trainer(student, teacher, parts, *texts, entry, checkpoints)
    return partial(_answer, trainer, out)


def _answer(trainer: Trainer, out: Path, item: tuple[str, int]) -> dict[str, Any]:
    from layerwise.stages.levels.files import write_unit

    what, step = item
    if what == "train":
        return trainer(step)
    if trainer.state.step != step or not trainer.best:
        trainer.load(step)
    trainer.restore_best()
    found = {}
    for part in trainer.parts:
        for unit, level in part.levels().items():
            write_unit(out, unit, [level])
            found[unit] = {"level": level.name, "recipe": dict(level.recipe)}
    return found


def _write_history(folder: Path, history: Mapping[str, Any], out: Path) -> None:
    before = json.loads((folder / HISTORY).read_text(encoding="utf-8")) if (folder / HISTORY).is_file() else []
    out.mkdir(exist_ok=True)
    (out / HISTORY).write_text(json.dumps([*before, history], indent=1) + "\n", encoding="utf-8")
