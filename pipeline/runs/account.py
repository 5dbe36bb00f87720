"""The durable account of one attempt at a run: its rows in the tables `runs` and `stages`.

Rows are only ever added: a run that is killed leaves the row that says it was running, and nobody claims otherwise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from layerwise import __version__
from layerwise.errors import LayerwiseError
from layerwise.pipeline.artifacts import digest_of
from layerwise.results.runs import latest_stages
from layerwise.results.store import Store
from layerwise.stages.contract import Row


class Account:
    """Writes what happens to a run.

    Args:
        store: where to.
        run: the run's id.
        name: of the workflow.
        resolved: the workflow with nothing left to defaults.
        executor: where the work runs.
        argv: the command.
    """

    def __init__(
        self,
        store: Store,
        *,
        run: str,
        name: str,
        resolved: Mapping[str, Any],
        executor: str,
        argv: Sequence[str],
    ) -> None:
        self.store, self.run, self.attempt = store, run, 0
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()
        self._facts: Row = {
            "name": name,
            "workflow_sha256": digest_of(resolved),
            "resolved": json.dumps(resolved),
            "layerwise_version": __version__,
            "argv": list(argv),
            "executor": executor,
            "started_at": self._started,
        }
        self._rows = {"runs": 0, "stages": 0}
        self._known = {
            name: row["stage_key"] for name, row in latest_stages(store, run).items() if row["status"] == "ok"
        }

    @contextmanager
    def open(self, attempt: int) -> Iterator[None]:
        """Say that the run goes on, and at the end how it ended.

        Args:
            attempt: how many times it has been started, this time included.
        """
        self.attempt = attempt
        self._append("runs", {**self._facts, "status": "running"})
        try:
            yield
        except BaseException as error:
            with suppress(LayerwiseError, OSError):  # the disk may be full; the error itself matters more
                self._end(_status(error), error)
            raise
        self._end("ok")

    def _end(self, status: str, error: BaseException | None = None) -> None:
        seconds = time.monotonic() - self._clock
        row = {"status": status, "ended_at": datetime.now(UTC), "seconds": seconds, **_described(error)}
        self._append("runs", {**self._facts, **row})

    def stage(self, stage: str, key: str | None, row: Row) -> None:
        """Say that a stage was made; `row` holds columns of `stages`."""
        self._append("stages", {"status": "ok", **row}, stage, key)

    def hit(self, stage: str, key: str | None, row: Row) -> None:
        """Say that a stage was found, unless the run's latest row already says that it is there: a workflow that is run
        a thousand times from the cache does not fill the store."""
        if self._known.get(stage) != key:
            self._append("stages", {"status": "ok", "cache": "hit", "seconds": 0.0, **row}, stage, key)

    def failure(self, stage: str, key: str | None, row: Row, error: BaseException) -> None:
        """Say that a stage did not end well."""
        with suppress(LayerwiseError, OSError):  # as above
            self._append("stages", {"status": _status(error), **row, **_described(error)}, stage, key)

    def _append(self, table: str, row: Row, stage: str | None = None, key: str | None = None) -> None:
        seq = self._rows[table]
        self._rows[table] += 1
        self.store.append(
            table, [row], run_id=self.run, stage=stage, stage_key=key, attempt=self.attempt, first_seq=seq
        )


def _status(error: BaseException) -> str:
    return "failed" if isinstance(error, Exception) else "stopped"


def _described(error: BaseException | None) -> dict[str, str]:
    return {} if error is None else {"error_type": type(error).__name__, "error": str(error)[:2000]}
