"""`profile`: how much each level of each unit hurts, everything else left dense.

`weight_nmse` and `output_error` were measured while the levels were made; `kl` runs the model with one unit changed.
Blocks before the changed one are shared by all levels of the unit, so a profile costs about half of what its number of
forward passes suggests.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from layerwise.stages.contract import Context, Params, Port, Row, Stage
from layerwise.stages.data.text import tokenized
from layerwise.stages.evaluate.scoring import DENSE, Measurement, Request, evaluator_factory
from layerwise.stages.levels.database import DatabaseIndex
from layerwise.stages.quantities import Count

Metric = Literal["weight_nmse", "output_error", "kl"]


class ProfileParams(Params):
    """Which harms to measure, and on which text."""

    metrics: list[Metric] = Field(
        ["weight_nmse", "output_error", "kl"],
        min_length=1,
        description="weight_nmse: |W - Q|^2 / |W|^2; output_error: the same weighted by the Hessian; "
        "kl: KL(dense || model with this one unit changed), nats per token",
    )
    data: str = Field("calibration", description="the text for kl, by its name in the workflow's data section")
    tokens: Count | None = Field(None, description="tokens of it to use; all if left out")
    batch_tokens: Count = Field(2048, description="tokens that run at a time")


def profile(context: Context, params: ProfileParams) -> None:
    """Write `profile.json`: per metric a table (units, levels), null where a level has no finite value.

    Raises:
        DataError: not enough text.
        NotFinite: the dense model gives NaN or Inf.
    """
    index = DatabaseIndex(context.input("database"))
    units = index.units
    tables = {metric: _measure(context, params, metric, units) for metric in params.metrics}
    evaluated = [level.get("n_tokens", 0) for table in tables.values() for unit in table for level in unit]
    document = {
        "database": index.digest,
        "units": [unit["unit"] for unit in units],
        "levels": [[level["level"] for level in unit["levels"]] for unit in units],
        "metrics": {metric: [[level["mean"] for level in unit] for unit in table] for metric, table in tables.items()},
        "evaluated_tokens": sum(evaluated),
    }
    (context.out / "profile.json").write_text(json.dumps(document) + "\n", encoding="utf-8")
    context.record("profile", [row for metric, table in tables.items() for row in _rows(metric, units, table)])


Table = list[list[Measurement]]
"""Per unit and level."""


def _measure(context: Context, params: ProfileParams, metric: Metric, units: list[dict[str, Any]]) -> Table:
    if metric == "kl":
        return _one_unit_changed(context, params, units)
    return [[{"mean": level[metric]} for level in unit["levels"]] for unit in units]


def _one_unit_changed(context: Context, params: ProfileParams, units: list[dict[str, Any]]) -> Table:
    tokens = tokenized(context, params.data)
    factory = evaluator_factory(context, tokens, database=context.input("database"), batch_tokens=params.batch_tokens)
    usable = [[number for number, level in enumerate(unit["levels"]) if level["status"] == "ok"] for unit in units]
    dense = (DENSE,) * len(units)
    requests = {
        unit: Request(tuple((*dense[:unit], level, *dense[unit + 1 :]) for level in levels), tokens=params.tokens)
        for unit, levels in enumerate(usable)
        if levels
    }
    with context.executor.replicas(factory) as pool:
        items = [(request,) for request in requests.values()]
        answers = pool.map(items, keys=[request.key for request in requests.values()], note="units")
    table: Table = [[{"mean": None} for _ in unit["levels"]] for unit in units]
    for unit, scores in zip(requests, answers, strict=True):
        for level, measured in zip(usable[unit], scores, strict=True):
            table[unit][level] = measured["kl"]
    return table


def _rows(metric: Metric, units: list[dict[str, Any]], table: Table) -> list[Row]:
    return [
        {
            "unit": unit["unit"],
            "level": level["level"],
            "metric": metric,
            "value": measured["mean"],
            "stderr": measured.get("stderr"),
            "n_tokens": measured.get("n_tokens"),
            "status": "nan" if measured["mean"] is None else "ok",
        }
        for unit, measurements in zip(units, table, strict=True)
        for level, measured in zip(unit["levels"], measurements, strict=True)
    ]


STAGE = Stage("profile", ProfileParams, profile, gives="profile", takes={"database": Port("database")}, data=("data",))
