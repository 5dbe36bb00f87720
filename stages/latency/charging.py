"""What allocations are charged for time: measured products and rests, made into costs that add up to a forward pass.

A forward pass takes more than its products and what remains when they are put out of work: with one token and layers of
1024 x 1024 and more, predictions made of these two were up to 24 % too low (6 blocks, one core of a shared x86
machine). The likely reason is the cache that the weights take from what runs after them; it has not been shown. So the
rest of a model, its forward pass less the times of its products, is a line over the bytes of its weights, through two
models that are measured whole: all units dense, and every unit at its fastest level. Its slope is charged to the levels
by their bytes. Both models are then right by construction, whatever was wrong with the times of their products, and
those between them are right as far as the line is straight.

Levels of a shape whose times cannot be told apart (`dispatch.overlap`) are charged the mean of them, so that a solver
takes the most accurate and not the one that noise favoured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.errors import NoisyMeasurement
from layerwise.stages.levels.level import find_encoding

if TYPE_CHECKING:
    from layerwise.kernels.dispatch import Choice
    from layerwise.stages.levels.database import LevelEntry, UnitEntry

Shape = tuple[int, int]
"""(out, in)."""

Choices = Mapping[tuple[Shape, str], "Choice"]
"""By shape and kind of level (`Encoding.label`): what runs it."""


@dataclass(frozen=True)
class Rest:
    """The rest of a model.

    Args:
        ms: where no weight streams by.
        ms_per_byte: for each byte of the units' weights, as they are read.
    """

    ms: float
    ms_per_byte: float


def is_timed(unit: UnitEntry, level: LevelEntry) -> bool:
    """Whether a level has a time of its own: one that may be chosen, of a linear layer.

    What else there is (experts, a tied head, parents) runs decoded, as a part of the rest of the model; a dropped
    parent saves the times of the layers inside it.
    """
    return unit.unit.replaceable and level.usable and level.offered


def narrows(level: LevelEntry) -> bool:
    """Whether a level makes a half-block narrower, whose smaller products are not timed: no budget of time takes it."""
    return level.recipe is not None and level.recipe["encoding"] == "narrow"


def of_level(unit: UnitEntry, level: LevelEntry) -> tuple[Shape, str]:
    """The key of a level in `Choices`."""
    assert level.recipe is not None, "only levels that were made are timed"
    return unit.shape, find_encoding(level.recipe["encoding"]).label(level.recipe)


def fastest_levels(units: Sequence[UnitEntry], choices: Choices) -> dict[str, str]:
    """For each unit the level whose product takes least, of equals the one with the fewest bytes."""
    found = {}
    for unit in units:
        rows = {level.name: choices[of_level(unit, level)].row for level in unit.levels if is_timed(unit, level)}
        if rows:
            found[unit.name] = min(rows, key=lambda name: (rows[name].median_ms, rows[name].size_bytes))
    return found


def fit_rest(units: Sequence[UnitEntry], choices: Choices, dense_ms: float, fast_ms: float) -> Rest:
    """The line through two models.

    Args:
        units: of the database.
        choices: what runs their levels.
        dense_ms: forward pass of the dense model.
        fast_ms: that of the model of `fastest_levels`.
    Raises:
        NoisyMeasurement: products take longer than the forward pass that they are a part of.
    """
    fastest, alone = fastest_levels(units, choices), charge(choices, Rest(0.0, 0.0))
    keys = [of_level(unit, level) for unit in units for level in unit.levels if level.name == fastest.get(unit.name)]
    dense_rest = dense_ms - math.fsum(choices[key].dense.median_ms for key in keys)
    fast_rest = fast_ms - math.fsum(alone[key] for key in keys)
    if min(dense_rest, fast_rest) <= 0:
        raise NoisyMeasurement(
            f"forward passes of {dense_ms:.4g} ms (dense) and {fast_ms:.4g} ms (fastest levels) leave "
            f"{dense_rest:.4g} ms and {fast_rest:.4g} ms beside their products",
            hint="measure again on a quieter machine, or take more samples",
        )
    dense_bytes = sum(choices[key].dense.size_bytes for key in keys)
    fast_bytes = sum(choices[key].row.size_bytes for key in keys)
    # Where nothing is faster than dense, or noise hides what the caches do, the rest is the same for all.
    slope = max(0.0, dense_rest - fast_rest) / (dense_bytes - fast_bytes) if dense_bytes > fast_bytes else 0.0
    slope = min(slope, fast_rest / fast_bytes) if fast_bytes else slope  # no rest is less than nothing
    return Rest(fast_rest - slope * fast_bytes, slope)


def charge(choices: Choices, rest: Rest) -> dict[tuple[Shape, str], float]:
    """Milliseconds that an allocation pays: by shape, from the fastest up, those that overlap share their mean."""
    from layerwise.kernels.dispatch import overlap

    charged: dict[tuple[Shape, str], float] = {}
    for shape in dict.fromkeys(shape for shape, _ in choices):
        rising = sorted((key for key in choices if key[0] == shape), key=lambda key: choices[key].row.median_ms)
        while rising:
            rows = {key: choices[key].row for key in rising}
            tied = [key for key, row in rows.items() if overlap(rows[rising[0]], row)]
            total = sum(rows[key].median_ms + rest.ms_per_byte * rows[key].size_bytes for key in tied)
            charged |= dict.fromkeys(tied, total / len(tied))
            rising = [key for key in rising if key not in charged]
    return charged
