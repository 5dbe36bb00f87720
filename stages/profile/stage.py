"""`profile`: how much each level of each unit hurts, everything else left dense.

`weight_nmse` and `output_error` were measured while the levels were made; `kl` runs the model with one unit changed (of
a half-block or block that is dropped, leave-one-out), and `influence` once as it is. `erk`, `lamp` and `owl` are rules
that others have published for how dense each layer should be (`densities.py`), for comparison.
Blocks before the changed one are shared by all levels of the unit, so a profile costs about half of what its number of
forward passes suggests.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field

from layerwise.errors import NotFinite
from layerwise.stages.contract import Context, Params, Port, Row, Stage, always
from layerwise.stages.data.text import Tokens, tokenized
from layerwise.stages.evaluate.scoring import Measurement, Pool, Request, evaluator_factory
from layerwise.stages.levels.database import UNCHANGED, Database, DatabaseIndex, LevelEntry, UnitEntry
from layerwise.stages.profile.densities import erk_losses, owl_losses
from layerwise.stages.profile.influence import measure_influence
from layerwise.stages.profile.pruned import lamp_losses, outliers
from layerwise.stages.quantities import Count

Metric = Literal["weight_nmse", "output_error", "kl", "influence", "erk", "lamp", "owl"]


class ProfileParams(Params):
    """Which harms to measure, and on which text."""

    metrics: list[Metric] = Field(
        ["weight_nmse", "output_error", "kl"],
        min_length=1,
        description="weight_nmse: |W - Q|^2 / |W|^2; output_error: the same weighted by the Hessian; "
        "kl: KL(dense || model with this one unit changed), nats per token, less that of the model as it is; "
        "influence: of half-blocks and blocks that may be dropped, 1 - cosine of the hidden states before and after; "
        "erk, lamp, owl: published rules for the density of layers, as losses whose least sum within a budget of "
        "density follows them",
    )
    data: str = Field(
        "calibration", description="the text for kl and influence, by its name in the workflow's data section"
    )
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
    text = tokenized(context, params.data) if on_text(params) else None
    tables = {metric: _measure(context, params, metric, units, text) for metric in params.metrics}
    evaluated = [level.get("n_tokens", 0) for table in tables.values() for unit in table for level in unit]
    document = {
        "database": index.digest,
        "units": [unit.name for unit in units],
        "levels": [[level.name for level in unit.levels] for unit in units],
        "metrics": {metric: [[level["mean"] for level in unit] for unit in table] for metric, table in tables.items()},
        "evaluated_tokens": sum(evaluated),
    }
    (context.out / "profile.json").write_text(json.dumps(document) + "\n", encoding="utf-8")
    context.record("profile", [row for metric, table in tables.items() for row in _rows(metric, units, table)])


Table = list[list[Measurement]]
"""Per unit and level."""


def on_text(params: ProfileParams) -> bool:
    """Whether a metric runs the model."""
    return bool({"kl", "influence"} & set(params.metrics))


def _measure(
    context: Context, params: ProfileParams, metric: Metric, units: list[UnitEntry], text: Tokens | None
) -> Table:
    if metric == "kl" and text is not None:
        return _one_unit_changed(context, params, units, text)
    if metric == "influence" and text is not None:
        return _influence(context, params, units, text)
    if metric in ("lamp", "owl"):
        return _of_weights(context, metric, units)
    if metric == "erk":
        return [[{"mean": loss} for loss in losses] for losses in erk_losses(units)]
    return [[{"mean": _error(level, metric)} for level in unit.levels] for unit in units]


def _of_weights(context: Context, metric: Metric, units: list[UnitEntry]) -> Table:
    """LAMP's or OWL's losses, for which each weight is looked at on a worker."""
    names = [unit.name for unit in units if not unit.unit.is_parent]
    database, keys = Database(context.input("database"), context.model), [f"{metric}-{name}" for name in names]
    if metric == "lamp":
        lamp = context.executor.map(partial(lamp_losses, database=database), names, keys=keys)
        by_unit = dict(zip(names, lamp, strict=True))
        losses = [by_unit.get(unit.name, [None] * len(unit.levels)) for unit in units]
    else:
        work = partial(outliers, database=database, statistics=context.input("statistics"))
        counts = context.executor.map(work, names, keys=keys)
        losses = owl_losses(units, dict(zip(names, counts, strict=True)))
    return [[{"mean": loss} for loss in of_unit] for of_unit in losses]


def _missing(
    params: ProfileParams, feeding: Mapping[str, Sequence[Any]]
) -> Iterable[tuple[tuple[str | int, ...], str]]:
    """OWL without the statistics that it takes."""
    if "owl" in params.metrics and not feeding.get("statistics"):
        yield ("metrics",), "owl looks at the inputs of layers: add the `calibrate` stage to needs"


def _influence(context: Context, params: ProfileParams, units: list[UnitEntry], text: Tokens) -> Table:
    """Of every level that drops something; what stays is 0, and of other levels nothing is known."""
    source = DatabaseIndex(context.input("database")).model(context.model)
    work = partial(
        measure_influence,
        tokens=text,
        wanted=params.tokens,
        batch_tokens=params.batch_tokens,
    )
    (found,) = context.executor.map(work, [source], keys=["influence"], note="influence")

    def measured(unit: UnitEntry, number: int, level: LevelEntry) -> Measurement:
        drops = level.recipe is not None and level.recipe["encoding"] == "drop"
        nothing: Measurement = {"mean": 0.0 if number == UNCHANGED else None}
        return found[unit.name] if drops else nothing

    return [[measured(unit, number, level) for number, level in enumerate(unit.levels)] for unit in units]


def _error(level: LevelEntry, metric: str) -> float | None:
    """An error that was measured when the level was made; keeping a parent costs nothing."""
    if level.recipe is not None and level.recipe["encoding"] == "keep":
        return 0.0
    value: float | None = getattr(level, metric)
    return value


def _one_unit_changed(context: Context, params: ProfileParams, units: list[UnitEntry], text: Tokens) -> Table:
    factory = evaluator_factory(context, text, database=context.input("database"), batch_tokens=params.batch_tokens)
    changes = [
        [number for number, level in enumerate(unit.levels) if level.usable and level.offered and number != UNCHANGED]
        for unit in units
    ]
    model = (UNCHANGED,) * len(units)
    requests = {
        unit: Request(tuple((*model[:unit], level, *model[unit + 1 :]) for level in levels), tokens=params.tokens)
        for unit, levels in enumerate(changes)
        if levels
    }
    with context.executor.replicas(factory) as pool:
        items = [(request,) for request in requests.values()]
        answers = pool.map(items, keys=[request.key for request in requests.values()], note="units")
        before = 0.0 if _is_dense(context) else _as_it_is(pool, Request((model,), tokens=params.tokens))
    table: Table = [
        [{"mean": 0.0 if number == UNCHANGED else None} for number in range(len(unit.levels))] for unit in units
    ]
    for unit, scores in zip(requests, answers, strict=True):
        for level, measured in zip(changes[unit], scores, strict=True):
            mean = measured["kl"]["mean"]
            table[unit][level] = measured["kl"] | {"mean": None if mean is None else mean - before}
    return table


def _is_dense(context: Context) -> bool:
    """Whether the levels are of the workflow's own model, which is off from itself by nothing."""
    return DatabaseIndex(context.input("database")).model(context.model) == context.model


def _as_it_is(pool: Pool, request: Request) -> float:
    """What the model whose levels these are is off by already, before any of them: a pruned one, say."""
    (scores,) = pool.map([(request,)], keys=[f"{request.key}-before"])
    mean: float | None = scores[0]["kl"]["mean"]
    if mean is None:
        raise NotFinite("the model that was compressed before gives NaN or Inf on this text")
    return mean


def _rows(metric: Metric, units: list[UnitEntry], table: Table) -> list[Row]:
    return [
        {
            "unit": unit.name,
            "level": level.name,
            "metric": metric,
            "value": measured["mean"],
            "stderr": measured.get("stderr"),
            "n_tokens": measured.get("n_tokens"),
            "status": "ok" if measured["mean"] is not None else "nan" if level.offered else "not_offered",
        }
        for unit, measurements in zip(units, table, strict=True)
        for level, measured in zip(unit.levels, measurements, strict=True)
    ]


STAGE = Stage(
    "profile",
    ProfileParams,
    profile,
    gives="profile",
    takes={"database": Port("database"), "statistics": Port("statistics", optional=True)},
    check=_missing,
    data=("data",),
    any_network=always,
    on_gpu=on_text,
)
