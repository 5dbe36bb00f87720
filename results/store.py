"""The results store: append rows, read them back, as plain Parquet files that need no layerwise to be read.

Each batch of rows becomes one immutable file below `tables/<table>/run=<run id>/`, published whole or not at all. Its
name says which rows it holds, so committing a batch again after a crash meets the file of the first time and changes
nothing; and it says what its bytes are, so that none is read that has changed (`row_files.py`). Only the process that
drives a run writes its rows.

A stage's rows belong to its key, not to the run that happened to compute them, and an interrupted stage may be computed
again by another run. `Store` therefore gives each (stage key, seq) once. A reader without layerwise sees every row of
every run; those of one run are in its folder, and `run` appears as a column too.

Reading costs some milliseconds per file and little per row, so batches of 100 to 1,000 rows are best; appending one
takes 8 ms (100 candidates of 224 units, two busy cores, local disk). Left out: merging the small files of a finished
run. pyarrow and pandas are imported by the first call that needs them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import StoreError, UsageError
from layerwise.results.durable import make_folder, publish_file, replace_file
from layerwise.results.row_files import RowFiles
from layerwise.results.schema import COMMON, RUN_TABLES, SCHEMA_VERSION, TABLES, arrow_schema, columns_of
from layerwise.results.sealed import SEAL, Damaged, sealed, unsealed

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

FORMAT = 1
"""Format of the folder; raised when an older layerwise would misread it."""

MARKER = "layerwise-store.json"
"""The file that makes a folder a results folder."""

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def is_run_id(text: str) -> bool:
    """Whether this can be the id of a run, which is a folder's name, too; a foreign table may hold anything."""
    return _RUN_ID.fullmatch(text) is not None


@dataclass(frozen=True)
class Store:
    """A results folder; get one from `Store.open`."""

    root: Path
    mends: bool = field(default=False, compare=False)
    """Whether files of tables that are damaged or missing are put back from their copies: of a store for writing."""

    @classmethod
    def open(cls, root: Path, create: bool = False) -> Store:
        """Open a results folder.

        Args:
            root: the folder.
            create: make it if it is missing, for writing.
        Raises:
            UsageError: there is no results folder, or none can be made there.
            StoreError: it was written by a newer layerwise.
        """
        marker = root / MARKER
        if create:
            try:
                make_folder(root)
                publish_file(marker, sealed({"format": FORMAT}), root / "tmp")
            except OSError as error:
                raise UsageError(
                    f"cannot use {root} as a results folder: {error.strerror}", hint="choose another with --results"
                ) from error
        elif not marker.is_file():
            found = f"{MARKER} is missing in it" if root.is_dir() else "no such folder"
            raise UsageError(
                f"{root} is not a results folder: {found}",
                hint="run a workflow first, or say with --results where its results are",
            )
        _check_format(marker, mend=create)
        if create and not os.access(root, os.W_OK):
            raise UsageError(f"cannot write to the results folder {root}", hint="choose another with --results")
        return cls(root, mends=create)

    @cached_property
    def files(self) -> RowFiles:
        """The files of the tables."""
        return RowFiles(self.root, self.mends)

    def append(
        self,
        table: str,
        rows: Sequence[Mapping[str, Any]],
        *,
        run_id: str,
        stage: str | None = None,
        stage_key: str | None = None,
        attempt: int,
        first_seq: int,
    ) -> bool:
        """Add rows to a table; they are durable when this returns.

        Args:
            table: a name in `schema.TABLES`.
            rows: values by column; a column left out is NULL. numpy scalars and arrays will do. NaN and infinities
                become NULL, and in a table with a `status` that must then not be `ok`.
            run_id: the run that writes; letters, digits, `.`, `_` and `-`.
            stage: the stage's name in the workflow; None in `runs`.
            stage_key: the stage's key; None in `runs`.
            attempt: how many times the run has been started, from 1.
            first_seq: position of the first row among the rows of this stage (in `runs` and `stages`: of this attempt).
        Returns:
            True if the rows were written; False if there were none, or they had been committed before.
        Raises:
            DiskFull: the file system took no more; none of the rows was added.
            AssertionError: an unknown table or column, or a value that does not fit; the caller's mistake.
        """
        _demand(table in TABLES, f"unknown table {table!r}")
        _demand(is_run_id(run_id), f"run id {run_id!r} is no plain name")
        _demand(table in RUN_TABLES or stage_key is not None, f"rows of {table} need a stage key")
        if not rows:
            return False
        common = {
            "run_id": run_id,
            "stage": stage,
            "stage_key": stage_key,
            "attempt": attempt,
            "written_at": datetime.now(UTC),
            "schema_version": SCHEMA_VERSION,
        }
        records = [{**common, "seq": seq, **_checked(table, row)} for seq, row in enumerate(rows, first_seq)]
        # Rows about the run differ between its attempts; what a stage computes does not, and a repetition may collide.
        suffix = f"-a{attempt}" if table in RUN_TABLES else ""
        name = f"{(stage_key or 'run')[:16]}-{first_seq:09d}-{first_seq + len(rows) - 1:09d}{suffix}"
        return self.files.add(table, run_id, name, _parquet(table, records))

    def read(
        self,
        table: str,
        *,
        run: str | None = None,
        stage_key: str | Collection[str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Read a table into pandas; integers and booleans are nullable types, so NULL never turns them into floats.

        Args:
            table: a name in `schema.TABLES`.
            run: only rows that this run wrote.
            stage_key: only rows of this stage, or of these.
            columns: only these columns, in this order.
        Returns:
            The rows by run and stage; those of one stage together, by seq, even if two runs computed parts of it. Each
            (stage key, seq) occurs once, from the lowest attempt. Empty, with the right columns, when nothing is there.
            A file that is damaged or missing is read from its copy; without one its rows are left out, with a warning.
        Raises:
            UsageError: no such table or column.
            StoreError: a file of the table cannot be read, though it is as it was written.
        """
        import pandas as pd
        import pyarrow as pa

        nullable = {
            pa.bool_(): pd.BooleanDtype(),
            pa.int16(): pd.Int16Dtype(),
            pa.int32(): pd.Int32Dtype(),
            pa.int64(): pd.Int64Dtype(),
        }
        arrow = self._arrow(table, run, stage_key, columns)
        frame: pd.DataFrame = arrow.to_pandas(types_mapper=nullable.get)
        return frame

    def rows(
        self,
        table: str,
        *,
        run: str | None = None,
        stage_key: str | Collection[str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """What `read` gives, as plain Python values (NULL is None)."""
        records: list[dict[str, Any]] = self._arrow(table, run, stage_key, columns).to_pylist()
        return records

    def holds(self, stage_key: str, counts: Mapping[str, int]) -> bool:
        """Whether all rows of a stage are there.

        Args:
            stage_key: the stage's key.
            counts: how many it wrote, by table.
        """
        return all(self.files.count(table, stage_key) >= count for table, count in counts.items())

    def _arrow(
        self, table: str, run: str | None, stage_key: str | Collection[str] | None, columns: Sequence[str] | None
    ) -> Any:
        import pyarrow as pa
        import pyarrow.dataset as ds

        if table not in TABLES:
            raise UsageError(f"no table {table!r}", hint=f"the tables are {', '.join(TABLES)}")
        names = list(columns_of(table)) if columns is None else list(columns)
        unknown = [name for name in names if name not in columns_of(table)]
        if unknown:
            raise UsageError(
                f"table {table} has no column {', '.join(unknown)}", hint=f"it has {', '.join(columns_of(table))}"
            )
        schema = arrow_schema(table)  # a file of an older layerwise lacks some of its columns: they read as NULL
        keys = [stage_key] if isinstance(stage_key, str) else None if stage_key is None else list(stage_key)
        files = [str(path) for path in self.files.sound(table, run, keys)]
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        try:
            rows = ds.dataset(
                files, schema=schema, format=ds.ParquetFileFormat(default_fragment_scan_options=options)
            ).to_table(
                columns=list(dict.fromkeys([*names, *COMMON])),
                filter=None if keys is None else ds.field("stage_key").isin(pa.array(keys, pa.string())),
            )
        except (pa.ArrowException, OSError) as error:
            raise StoreError(
                f"a file of table {table} in {self.root} cannot be read: {error}",
                hint="move that file away; all others stay readable",
            ) from error
        return rows.take(pa.array(_order(table, rows), pa.int64())).select(names)


def _check_format(marker: Path, mend: bool) -> None:
    """Refuse a folder of a newer layerwise. A marker that is damaged says nothing, and is written again."""
    try:
        found = _format(marker)
    except (Damaged, OSError) as error:
        found = FORMAT
        logger.warning("%s is damaged (%s)%s", marker, error, ": it was written again" if mend else "")
        if mend:
            replace_file(marker, sealed({"format": FORMAT}), marker.parent / "tmp")
    if found != FORMAT:
        raise StoreError(
            f"results folder {marker.parent} was written by a newer layerwise "
            f"(format {found}, this one reads {FORMAT})",
            hint="upgrade layerwise, or choose another folder with --results",
        )


def _format(marker: Path) -> Any:
    data = marker.read_bytes()
    try:
        plain = json.loads(data)
    except ValueError:
        plain = None
    if isinstance(plain, dict) and "format" in plain and SEAL not in plain:
        return plain["format"]  # of a layerwise before the seals
    return unsealed(data).get("format")


def _demand(holds: bool, otherwise: str) -> None:
    """An assertion that stays when Python is started with -O: rows that do not fit must never be stored."""
    if not holds:
        raise AssertionError(otherwise)


def _checked(table: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row in plain Python values, what is not finite replaced by None."""
    types = TABLES[table]
    unknown = sorted(set(row) - set(types))
    _demand(not unknown, f"table {table} has no column {', '.join(unknown)}")
    plain = {name: _plain(f"{table}.{name}", types[name], value) for name, value in row.items()}
    lost = [name for name, value in plain.items() if isinstance(value, float) and not math.isfinite(value)]
    plain.update(dict.fromkeys(lost))
    if lost and "status" in types:
        status = plain.get("status")
        _demand(status not in (None, "ok"), f"{table}.{lost[0]} is not finite, but the row's status is {status!r}")
    return plain


def _plain(column: str, kind: str, value: Any) -> Any:
    """A value without numpy, and without a conversion of pyarrow that would lose something silently."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, float) and kind.startswith("int"):
        _demand(value.is_integer(), f"{column} takes {kind}, not {value}")
        return int(value)
    return value


def _parquet(table: str, records: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(table)
    columns = []
    for column in schema:
        try:
            columns.append(pa.array([record.get(column.name) for record in records], column.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise AssertionError(f"{table}.{column.name} takes {column.type}: {error}") from error
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), buffer, compression="zstd", write_page_checksum=True)
    data: bytes = buffer.getvalue().to_pybytes()
    return data


def _order(table: str, rows: Any) -> list[int]:
    """Which rows to give, in which order: every row about a run, each row of a stage once."""
    runs, stages, keys, attempts, seqs = (
        rows.column(name).to_pylist() for name in ("run_id", "stage", "stage_key", "attempt", "seq")
    )
    if table in RUN_TABLES:
        return sorted(range(len(seqs)), key=lambda i: (runs[i], attempts[i], seqs[i]))
    once: dict[tuple[str, int], int] = {}
    first: dict[str, tuple[str, str]] = {}  # the run and stage that a key came from; its rows stay together
    for i in sorted(range(len(seqs)), key=lambda i: (attempts[i], runs[i])):
        once.setdefault((keys[i], seqs[i]), i)
        first[keys[i]] = min(first.get(keys[i], (runs[i], stages[i] or "")), (runs[i], stages[i] or ""))
    return sorted(once.values(), key=lambda i: (first[keys[i]], keys[i], seqs[i]))
