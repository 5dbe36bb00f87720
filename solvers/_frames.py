"""Problems as long tables: one row for each unit and level, in pandas or Arrow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layerwise.errors import InvalidProblem

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from layerwise.solvers.problem import Problem


def read_frame(
    frame: pd.DataFrame | pa.Table, unit: str, level: str, loss: str | None, costs: Sequence[str] | None
) -> dict[str, Any]:
    """The arguments `costs`, `losses`, `units` and `levels` of `Problem`; see `Problem.from_frame`."""
    import pandas as pd

    table: pd.DataFrame = frame if isinstance(frame, pd.DataFrame) else frame.to_pandas()
    keys = [unit, level, *([] if loss is None else [loss])]
    _require(table, keys)
    if costs is None:
        costs = [name for name in table.select_dtypes("number").columns if name not in keys]
        if not costs:
            raise InvalidProblem(f"no column of numbers but {', '.join(keys)}; the table has {_columns(table)}")
    _require(table, costs)
    repeated = table.duplicated([unit, level])
    if repeated.any():
        first = table[repeated].iloc[0]
        raise InvalidProblem(f"two rows for {first[unit]} at {first[level]}")
    rows, units = pd.factorize(table[unit])
    columns, levels = pd.factorize(table[level])

    def filled(name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise InvalidProblem(f"{name} is not a column of numbers, but of {table[name].dtype}")
        if table[name].isna().any():
            first = table[table[name].isna()].iloc[0]
            raise InvalidProblem(
                f"{name} is null for {first[unit]} at {first[level]}",
                hint="leave out the row of a level that does not exist",
            )
        entries = np.full((len(units), len(levels)), np.inf)
        entries[rows, columns] = table[name].to_numpy(dtype=np.float64)
        return entries

    return {
        "costs": {name: filled(name) for name in costs},
        "losses": None if loss is None else filled(loss),
        "units": [str(name) for name in units],
        "levels": [str(name) for name in levels],
    }


def _require(table: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InvalidProblem(
            f"no column {', '.join(missing)} in the table; it has {', '.join(map(str, table.columns))}"
        )


def _columns(table: pd.DataFrame) -> str:
    return ", ".join(map(str, table.columns))


def write_frame(problem: Problem) -> pd.DataFrame:
    """See `Problem.to_frame`."""
    import pandas as pd

    assert problem.units is not None and problem.levels is not None  # filled in at construction
    rows, columns = np.nonzero(problem.available)
    named = {
        "unit": np.array(problem.units, dtype=object)[rows],
        "level": np.array(problem.levels, dtype=object)[columns],
    }
    tables = {**problem.costs, **({} if problem.losses is None else {"loss": problem.losses})}
    return pd.DataFrame(named | {name: table[rows, columns] for name, table in tables.items()})
