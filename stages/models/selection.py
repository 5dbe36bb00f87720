"""Which units a stage works on, as a workflow says it, and how the store tells of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Annotated, TypeVar

from pydantic import AfterValidator

from layerwise.stages.contract import ModelSource, Row
from layerwise.stages.models.checkpoint import Checkpoint
from layerwise.stages.models.network import Uncovered, Unit, select_units
from layerwise.stages.models.patterns import matches
from layerwise.stages.models.survey import Survey

Patterns = TypeVar("Patterns", list[str], dict[str, str])

QUICK_BYTES = 2 << 30
"""Weights that are loaded in order to say what a run will leave out, before it begins."""


def valid_patterns(value: Patterns) -> Patterns:
    """Refuse what is no regular expression, of a list or of the keys of a mapping."""
    for pattern in value:
        if pattern.startswith("re:"):
            try:
                matches(pattern[3:], "")
            except ValueError as error:
                raise ValueError(f"'{pattern}' {error}") from error
    return value


Targets = Annotated[list[str], AfterValidator(valid_patterns)]
Ignored = Annotated[list[str], AfterValidator(valid_patterns)]


def unit_rows(survey: Survey, selected: Collection[str]) -> list[Row]:
    """Rows of the `units` table: the units that get levels, and all weights that get none.

    Args:
        survey: of the model.
        selected: names of the units that get levels.
    """
    rows = [_unit_row(unit, "ok" if unit.name in selected else "not selected") for unit, _ in survey.units]
    return rows + [_uncovered_row(weight) for weight in survey.uncovered]


def _unit_row(unit: Unit, status: str) -> Row:
    return {
        "unit": unit.name,
        "kind": unit.kind,
        "role": unit.role,
        "block": unit.block,
        "shape": list(unit.shape),
        "n_weights": unit.n_weights,
        "group": unit.group,
        "parent": unit.parent,
        "status": status,
    }


def _uncovered_row(weight: Uncovered) -> Row:
    return {
        "unit": weight.tensor,
        "block": weight.block,
        "n_weights": weight.n_weights,
        "status": "no unit",
        "error": weight.reason,
    }


def noted(model: ModelSource, targets: Sequence[str], ignore: Sequence[str]) -> Iterator[str]:
    """What gets no level, told before the run; of a model that takes long to load only once it is loaded."""
    if is_large(model):
        yield "the model is large: which of its weights stay as they are is told when it has been loaded"
        return
    survey = _surveyed(model)
    chosen = {unit.name for unit in select_units([unit for unit, _ in survey.units], targets, ignore, survey.uncovered)}
    note = left_alone(survey, chosen)
    if note is not None:
        yield note


def is_large(model: ModelSource) -> bool:
    """Whether a model takes long to load."""
    return sum(file.stat().st_size for file in Checkpoint(model.path).files) > QUICK_BYTES


@cache
def _surveyed(model: ModelSource) -> Survey:
    from layerwise.stages.models.survey import survey_model

    return Survey.from_json(survey_model(model))


def left_alone(survey: Survey, selected: Collection[str]) -> str | None:
    """A sentence on the weights of two and more dimensions that get no levels; None if all do."""
    total = sum(unit.n_weights for unit, _ in survey.units) + sum(weight.n_weights for weight in survey.uncovered)
    missing = {unit.name: unit.n_weights for unit, _ in survey.units if unit.name not in selected}
    missing |= {weight.tensor: weight.n_weights for weight in survey.uncovered}
    if not missing:
        return None
    largest = sorted(missing, key=lambda name: -missing[name])[:3]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    count = sum(missing.values())
    return f"{count:,} of {total:,} weights ({count / total:.0%}) stay as they are: {', '.join(largest)}{more}"
