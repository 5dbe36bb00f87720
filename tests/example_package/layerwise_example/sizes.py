"""`sizes`: a table of what each block of a database takes at each of its levels: `sizes.csv`.

For people who want to see where the bytes are before they allocate anything. A level is counted where every unit of the
block has it.
"""

from __future__ import annotations

import csv
from typing import Literal

from pydantic import Field

from layerwise.stages.contract import Context, Params, Port, Stage


class SizesParams(Params):
    """In which unit."""

    unit: Literal["bytes", "KiB", "MiB"] = Field("bytes", description="bytes, KiB or MiB")


DIVISORS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20}


def sizes(context: Context, params: SizesParams) -> None:
    """Write `sizes.csv`: block, level, units that have it, and their size."""
    from layerwise.stages.levels.database import DatabaseIndex

    totals: dict[tuple[int, str], list[float]] = {}
    for entry in DatabaseIndex(context.input("database")).units:
        block = -1 if entry.unit.block is None else entry.unit.block
        for level in entry.levels:
            if level.costs is not None and not entry.is_parent:
                totals.setdefault((block, level.name), []).append(level.costs["bytes"])
    with (context.out / "sizes.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["block", "level", "units", params.unit])
        for (block, name), found in sorted(totals.items()):
            where = "outside" if block == -1 else block
            table.writerow([where, name, len(found), f"{sum(found) / DIVISORS[params.unit]:.10g}"])


STAGE = Stage("sizes", SizesParams, sizes, gives="sizes", takes={"database": Port("database")})
