"""`compress`: the database of levels, one task per unit, all its levels from one factorisation.

A unit whose weights, statistics or levels are not finite loses those levels and says so in the store; the run goes on.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny, field_validator

from layerwise.errors import NotFinite, UsageError
from layerwise.stages.compress import find_compressor
from layerwise.stages.contract import Context, ModelSource, Params, Port, Stage


class CompressParams(Params):
    """The menu: which levels every unit gets."""

    menu: list[SerializeAsAny[Params]] = Field(
        min_length=1, description="one entry per method, with `method` and its parameters; see `layerwise schema`"
    )


def compress(context: Context, params: CompressParams) -> None:
    """Write every level of every unit, and the index.

    Raises:
        UsageError: two menu entries make a level of the same name.
    """
    from layerwise.stages.statistics import Statistics
    from layerwise.stages.database import write_index

    raise UsageError("unfinished")


STAGE = Stage("compress", CompressParams, compress, gives="database", takes={"statistics": Port("statistics")})
