"""`calibrate`: layer statistics from text, in one streaming pass.

Statistics add up, so the text is split into shards that run in parallel; the number of shards is a parameter, because
the order of a float32 sum decides its last bits, and the same workflow shall give the same bytes on any machine.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from layerwise.stages.contract import Context, ModelSource, Params, Stage
from layerwise.stages.data.text import Tokens, load_sequences, tokenized


class CalibrateParams(Params):
    """What to take statistics of, and from which text."""

    data: str = Field("calibration", description="the text, by its name in the workflow's data section")
    targets: list[str] = Field(
        [], description="units to compress: exact names, kinds (mlp.down_proj) or re:<pattern>; empty for all"
    )
    ignore: list[str] = Field([], description="units to leave alone, in the same form")
    shards: int = Field(2, ge=1, description="parts of the text that run in parallel and are added up in order")
    batch_size: int = Field(8, ge=1, description="sequences that run through a block at a time")

    @field_validator("targets", "ignore")
    @classmethod
    def _valid_patterns(cls, value: list[str]) -> list[str]:
        for pattern in value:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"'{pattern}' is no regular expression: {error}") from error
        return value


def calibrate(context: Context, params: CalibrateParams) -> None:
    """Write the Hessians of every block and `units.json`.

    Raises:
        DataError: not enough text.
        UnsupportedModel: the model cannot be taken apart, or no unit is chosen.
    """
    tokens = tokenized(context, params.data)
    shards = range(params.shards)
    collect_shard = partial(_collect_shard, model=context.model, params=params, tokens=tokens, folder=context.items)
    answers = context.executor.map(
        collect_shard, list(shards), keys=[f"shard-{shard}" for shard in shards], note="shards"
    )
    units = answers[0]["units"]
    for unit in units:
        # A shard may hold no sequence at all; the first one always does.
        unit["hessian"] = answers[0]["aliases"][unit["name"]]
    filled = [shard for shard, answer in zip(shards, answers, strict=True) if answer["n_tokens"]]
    blocks = sorted({unit["block"] for unit in units})
    context.executor.map(
        partial(_merge_block, folder=context.items, shards=filled, out=context.out), blocks, note="merging shards"
    )
    index = {
        "n_tokens": sum(answer["n_tokens"] for answer in answers),
        "rest_bytes": answers[0]["rest_bytes"],
        "units": units,
    }
    (context.out / "units.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    context.record("units", [_unit_row(unit) for unit in units])


def _collect_shard(
    shard: int, *, model: ModelSource, params: CalibrateParams, tokens: Tokens, folder: Path
) -> dict[str, Any]:
    """Statistics of one shard, as files in its folder; what the stage needs to know of the model comes back."""
    from layerwise.stages.calibrate.statistics import collect, describe
    from layerwise.stages.models.causal_lm import CausalLM, select_units
    from layerwise.stages.models.checkpoint import Checkpoint

    lm = CausalLM.load(model)
    units = select_units(lm.units, params.targets, params.ignore)
    sequences = load_sequences(tokens).tensor_split(params.shards)[shard]
    target = folder / f"shard-{shard}"
    target.mkdir(exist_ok=True)
    aliases = collect(lm, units, sequences, target, batch_size=params.batch_size) if len(sequences) else {}
    checkpoint = Checkpoint(model.path)
    described = [describe(unit, lm.stored_name(unit, checkpoint), "") for unit in units]
    return {
        "n_tokens": sequences.numel(),
        "units": described,
        "aliases": aliases,
        "rest_bytes": checkpoint.size_bytes - sum(checkpoint.tensor_bytes(unit["tensor"]) for unit in described),
    }


def _merge_block(block: int, *, folder: Path, shards: list[int], out: Path) -> None:
    from layerwise.stages.calibrate.statistics import add_up

    name = f"block-{block}.safetensors"
    add_up([folder / f"shard-{shard}" / name for shard in shards], out / name)


def _unit_row(unit: dict[str, Any]) -> dict[str, Any]:
    rows, columns = unit["shape"]
    return {
        "unit": unit["name"],
        "kind": unit["kind"],
        "block": unit["block"],
        "shape": unit["shape"],
        "n_weights": rows * columns,
        "group": unit["group"],
    }


STAGE = Stage("calibrate", CalibrateParams, calibrate, gives="statistics", data=("data",))
