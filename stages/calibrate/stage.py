"""`calibrate`: layer statistics from text, in one streaming pass.

Statistics add up, so the text is split into shards that run in parallel; the number of shards is a parameter, because
the order of a float32 sum decides its last bits, and the same workflow shall give the same bytes on any machine. What
is gathered is what the menus of the `compress` stages behind it need.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from layerwise.errors import UsageError
from layerwise.stages.calibrate import find_statistic, in_order
from layerwise.stages.contract import Context, ModelSource, Params, Port, Stage, always
from layerwise.stages.data.text import Tokens, load_labels, load_sequences, tokenized
from layerwise.stages.models.selection import Ignored, Targets, unit_rows


class CalibrateParams(Params):
    """What to take statistics of, and from which text."""

    data: str = Field("calibration", description="the text, by its name in the workflow's data section")
    targets: Targets = Field(
        [],
        description="units to compress: blocks, head, embedding; exact names, kinds (mlp.down_proj) or the end of one, "
        "or re:<pattern>; empty for blocks",
    )
    ignore: Ignored = Field([], description="units to leave alone, in the same form")
    statistics: list[str] | None = Field(
        None, description="hessian, channels, fisher, block_inputs; what the menus behind it need, if left out"
    )
    shards: int = Field(2, ge=1, description="parts of the text that run in parallel and are added up in order")
    batch_size: int = Field(8, ge=1, description="sequences that run through a block at a time")

    @field_validator("statistics")
    @classmethod
    def _known(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            try:
                find_statistic(name)
            except UsageError as error:
                raise ValueError(error.message) from error
        return None if value is None else in_order(value)

    def sources(self) -> Iterable[str]:
        """The modules of its statistics."""
        from layerwise.stages.calibrate import STATISTICS

        return [STATISTICS[name].partition(":")[0] for name in self.statistics or () if name in STATISTICS]


def fill(params: CalibrateParams, behind: Sequence[Params]) -> CalibrateParams:
    """Gather what the menus behind it need, unless the workflow says what."""
    if params.statistics is not None:
        return params
    needed = [name for other in behind for name in getattr(other, "needs_statistics", ())]
    return params.model_copy(update={"statistics": in_order(needed)})


def notes(params: CalibrateParams, model: ModelSource) -> Iterable[str]:
    """What stays as it is, of a model that is looked at quickly."""
    from layerwise.stages.models.selection import noted

    return noted(model, params.targets, params.ignore)


def calibrate(context: Context, params: CalibrateParams) -> None:
    """Write the statistics of every part of the network, and `statistics.json`.

    Raises:
        DataError: not enough text.
        UnsupportedModel: the model cannot be taken apart, or no unit is chosen.
    """
    from layerwise.stages.calibrate.statistics import INDEX, MODEL
    from layerwise.stages.models.compressed import adopt, model_of
    from layerwise.stages.models.survey import Survey

    names = ["hessian"] if params.statistics is None else params.statistics
    tokens = tokenized(context, params.data)
    shards = range(params.shards)
    work = partial(
        _collect_shard,
        model=model_of(context, "model"),
        params=params,
        statistics=names,
        tokens=tokens,
        folder=context.items,
    )
    answers = context.executor.map(work, list(shards), keys=[f"shard-{shard}" for shard in shards], note="shards")
    # A shard may hold no sequence at all; the first one always does.
    filled = [shard for shard, answer in zip(shards, answers, strict=True) if answer["n_tokens"]]
    parts = [(name, position) for name in names for position in _positions(context.items, name)]
    merge = partial(_merge_part, folder=context.items, shards=filled, out=context.out)
    context.executor.map(merge, parts, note="merging shards")
    counts: dict[str, int] = {}
    owners: dict[str, str] = {}
    for answer in answers:
        owners |= answer["owners"]
        for unit, count in answer["counts"].items():
            counts[unit] = counts.get(unit, 0) + count
    index = {
        "n_tokens": sum(answer["n_tokens"] for answer in answers),
        "gathered": names,
        "selected": answers[0]["selected"],
        "owners": owners,
        "counts": counts,
        "survey": answers[0]["survey"],
    }
    model = context.optional("model")
    if model is not None:
        adopt(model, context.out / MODEL)
    (context.out / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    context.record("units", unit_rows(Survey.from_json(index["survey"]), set(index["selected"])))


def _collect_shard(
    shard: int,
    *,
    model: ModelSource,
    params: CalibrateParams,
    statistics: Sequence[str],
    tokens: Tokens,
    folder: Path,
) -> dict[str, Any]:
    """Statistics of one shard, as files; what the stage needs to know of the model comes back."""
    from layerwise.stages.calibrate.collect import Gathered, collect
    from layerwise.stages.models.loading import load_network
    from layerwise.stages.models.network import select_units
    from layerwise.stages.models.survey import survey_model

    gradients = any(find_statistic(name).of == "gradients" for name in statistics)  # of the model as a whole
    network = load_network(model, block_by_block=not gradients)
    units = select_units(network.units, params.targets, params.ignore, network.uncovered)
    sequences = load_sequences(tokens).tensor_split(params.shards)[shard]
    labels = load_labels(tokens)
    gathered = Gathered()
    if len(sequences):
        gathered = collect(
            network,
            units,
            sequences,
            folder,
            statistics=statistics,
            shard=shard,
            batch_size=params.batch_size,
            labels=None if labels is None else labels.tensor_split(params.shards)[shard],
        )
    return {
        "n_tokens": len(sequences) * network.predictions(sequences),
        "selected": [unit.name for unit in units],
        "owners": gathered.owners,
        "counts": gathered.counts,
        "survey": survey_model(model, network) if shard == 0 else None,
    }


def _positions(folder: Path, statistic: str) -> list[int]:
    """Positions in the network that there are files of, whichever shard they are from."""
    files = (folder / statistic).glob("part-*.safetensors")
    return sorted({int(file.stem.split("-")[1]) - 1 for file in files})


def _merge_part(part: tuple[str, int], *, folder: Path, shards: list[int], out: Path) -> None:
    from layerwise.stages.calibrate.collect import merge, statistic_file
    from layerwise.stages.models.compressed import link_or_copy

    name, position = part
    files = [statistic_file(folder, name, position, shard) for shard in shards]
    statistic = find_statistic(name)
    if statistic.of == "hidden":
        (out / name).mkdir(exist_ok=True)
        for file in files:
            link_or_copy(file, out / name / file.name)
        return
    # An expert that no token of a shard reached leaves no file there.
    merge([file for file in files if file.is_file()], statistic_file(out, name, position), statistic.merge)


STAGE = Stage(
    "calibrate",
    CalibrateParams,
    calibrate,
    gives="statistics",
    takes={"model": Port("model", optional=True)},
    data=("data",),
    fill=fill,
    notes=notes,
    any_network=always,
    on_gpu=always,
)
