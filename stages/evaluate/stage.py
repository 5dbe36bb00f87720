"""`evaluate`: what allocations and compressed models are worth on text that nothing was calibrated or searched on.

The dense model is always measured beside them. Allocations are scored by swapping levels; a compressed model by putting
its weights in, so that what is reported is what was written. The mean of every sequence is kept in the artifact, so two
rows can be compared in pairs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from layerwise.errors import UsageError
from layerwise.stages.allocate.allocation import check_database, load_allocations
from layerwise.stages.contract import Context, Params, Port, Row, Stage, always
from layerwise.stages.data.text import Tokens, tokenized
from layerwise.stages.evaluate.model_levels import ModelLevels
from layerwise.stages.evaluate.scoring import (
    Genome,
    Measurement,
    Request,
    Score,
    evaluator_factory,
    perplexity,
    score,
)
from layerwise.stages.levels.database import DatabaseIndex
from layerwise.stages.models.compressed import CompressedModel
from layerwise.stages.quantities import Count

Metric = Literal["perplexity", "kl", "agreement", "accuracy", "cross_entropy"]
DENSE = "dense"
"""The workflow's own model, among the candidates."""

MEASURED_AS = {
    "perplexity": "nll",
    "kl": "kl",
    "agreement": "agreement",
    "accuracy": "accuracy",
    "cross_entropy": "nll",
}

OF_LANGUAGE: tuple[Metric, ...] = ("perplexity", "kl", "agreement")
OF_CLASSES: tuple[Metric, ...] = ("accuracy", "cross_entropy", "kl", "agreement")
"""What is measured unless the workflow says what."""


class EvaluateParams(Params):
    """What to report, and on which text."""

    metrics: list[Metric] | None = Field(
        None,
        min_length=1,
        description="perplexity of the next token; kl: KL(dense || model) in nats per token; agreement: share of "
        "positions where both predict the same token; of a classifier entries stand for tokens: accuracy: share of its "
        "answers that are the label; cross_entropy of the label in nats; all that suits the network if left out",
    )
    data: str = Field("heldout", description="the text, by its name in the workflow's data section")
    batch_tokens: Count = Field(2048, description="tokens that run at a time")


def evaluate(context: Context, params: EvaluateParams) -> None:
    """Write `metrics.json`: for every candidate its metrics, with standard errors and the mean of each sequence.

    Raises:
        UsageError: nothing to evaluate, or allocations without the very database that they choose from.
        NotFinite: the dense model gives NaN or Inf.
    """
    if not context.inputs["allocations"] and not context.inputs["models"]:
        raise UsageError("nothing to evaluate", hint="add an `allocate` or an `apply` stage to `needs`")
    tokens = tokenized(context, params.data)
    if params.metrics is None:
        usual = OF_LANGUAGE if context.model.python is None else OF_CLASSES
        params = params.model_copy(update={"metrics": list(usual)})
    found: dict[str, Score] = {}
    if context.inputs["allocations"]:
        found |= _score(context, params, tokens, *_allocations(context), note="allocations")
    for number, folder in enumerate(context.inputs["models"]):
        found |= _score(context, params, tokens, *_model(context, folder), note=f"model {number + 1}")
    if DENSE not in found:  # everything was made of a model that had been changed before
        found = _score(context, params, tokens, {DENSE: ()}, {"models": []}, note=DENSE) | found
    (context.out / "metrics.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    context.record(
        "metrics",
        [
            _row(candidate, params.data, metric, measured[MEASURED_AS[metric]])
            for candidate, measured in found.items()
            for metric in params.metrics or ()
        ],
    )


Levels = dict[str, Any]
"""Which levels genomes choose from: the keyword argument of `evaluator_factory`."""


def _allocations(context: Context) -> tuple[dict[str, Genome], Levels]:
    """Genomes by candidate, the dense model first."""
    if not context.inputs["database"]:
        raise UsageError("allocations need the database that they choose from", hint="add the `compress` stage")
    (database,) = context.inputs["database"]
    index = DatabaseIndex(database)
    allocations = [allocation for folder in context.inputs["allocations"] for allocation in load_allocations(folder)]
    check_database(allocations, index)
    genomes: dict[str, Genome] = {allocation.candidate: allocation.genome for allocation in allocations}
    if index.model(context.model) == context.model:
        genomes = {DENSE: (0,) * len(index.units), **genomes}
    return genomes, {"database": database}


def _model(context: Context, folder: Path) -> tuple[dict[str, Genome], Levels]:
    """The same for a model. One made from an allocation goes by `<candidate>@model`, for what is written may differ
    from what was searched, once it is repaired by `<candidate>@<repairs>`; one that is as dense as the workflow's, but
    transformed, by the name of its transform."""
    model, levels = CompressedModel(folder), ModelLevels([folder])
    units = len(levels.unit_names)
    about = model.document.about
    made = "+".join(about.get("repairs", ())) or "model"
    name = f"{about['allocation']['candidate']}@{made}" if "allocation" in about else str(about["transform"])
    genomes: dict[str, Genome] = {name: (1,) * units}
    if levels.model(context.model) == context.model:
        genomes = {DENSE: (0,) * units, **genomes}
    return genomes, {"models": [folder]}


def _score(
    context: Context, params: EvaluateParams, tokens: Tokens, genomes: dict[str, Genome], levels: Levels, *, note: str
) -> dict[str, Score]:
    metrics = tuple(dict.fromkeys(MEASURED_AS[metric] for metric in params.metrics or ()))
    request = Request(tuple(genomes.values()), metrics, sequences=True)
    with context.executor.replicas(
        evaluator_factory(context, tokens, batch_tokens=params.batch_tokens, **levels)
    ) as pool:
        scores = score(pool, request, workers=context.executor.workers, note=note)
    return dict(zip(genomes, scores, strict=True))


def _row(candidate: str, data: str, metric: Metric, measured: Measurement) -> Row:
    value, stderr = measured["mean"], measured["stderr"]
    if metric == "perplexity":
        value = perplexity(value)
        stderr = None if value is None or stderr is None else value * stderr  # to first order
    return {
        "candidate": candidate,
        "data": data,
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "n_tokens": measured["n_tokens"],
        "status": "nan" if value is None else "ok",
    }


STAGE = Stage(
    "evaluate",
    EvaluateParams,
    evaluate,
    gives="metrics",
    takes={
        "allocations": Port("allocations", many=True, optional=True),
        "database": Port("database", optional=True),
        "models": Port("model", many=True, optional=True),
    },
    data=("data",),
    reports=True,
    any_network=always,
    on_gpu=always,
)
