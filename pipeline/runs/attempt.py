"""The attempts at a run: who started it, when and where, one small file each.

`runs/<run>/attempts/NNNN.json` is written once, before the attempt does anything. How it ended stands in the table
`runs`; this file is what a process that was killed leaves to be recognised by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from layerwise.errors import StoreError
from layerwise.pipeline.cluster.submission import submission_numbers
from layerwise.pipeline.runs.process import Process
from layerwise.results.durable import publish_file
from layerwise.results.sealed import read_sealed, sealed


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Args:
        number: how many times the run has been started, this time included.
        process: that drives it.
        executor: where the work runs.
        argv: the command.
        started_at: by the clock of its host.
    """

    number: int
    process: Process
    executor: str
    argv: tuple[str, ...]
    started_at: datetime


def begin_attempt(folder: Path, executor: str, argv: Sequence[str], tmp: Path, submitted: int | None = None) -> Attempt:
    """Record that this process starts a run; only the holder of the run's lock may.

    Args:
        folder: the run's.
        executor: where the work runs.
        argv: the command.
        tmp: for the unfinished file, on the same file system.
        submitted: the number that this attempt was given when it was submitted; None for the next free one.
    Raises:
        StoreError: the attempt of that number has begun already.
    """
    if submitted is not None:
        attempt = Attempt(submitted, Process.this(), executor, tuple(argv), datetime.now(UTC))
        if not _publish(folder, attempt, tmp):
            raise StoreError(f"attempt {submitted} of run {folder.name} has begun already")
        return attempt
    number = last_number(folder)
    created = False
    while not created:  # at the first go, unless the file system has no locks that other hosts see
        number += 1
        attempt = Attempt(number, Process.this(), executor, tuple(argv), datetime.now(UTC))
        created = _publish(folder, attempt, tmp)
    return attempt


def last_number(folder: Path) -> int:
    """The highest number that an attempt at a run has, begun or submitted; 0 if there is none."""
    return max([*attempt_numbers(folder), *submission_numbers(folder)], default=0)


def _publish(folder: Path, attempt: Attempt, tmp: Path) -> bool:
    record = {**asdict(attempt), "started_at": attempt.started_at.isoformat()}
    return publish_file(_file(folder, attempt.number), sealed(record, indent=1), tmp)


def attempt_numbers(folder: Path) -> list[int]:
    """The numbers of the attempts at a run, in order."""
    return sorted(int(path.stem) for path in (folder / "attempts").glob("*.json") if path.stem.isdecimal())


def read_attempt(folder: Path, number: int) -> Attempt | None:
    """The record of an attempt; None if there is none or it cannot be read."""
    record = read_sealed(_file(folder, number))
    if record is None:
        return None
    try:
        return Attempt(
            number,
            Process(**record["process"]),
            str(record["executor"]),
            tuple(record["argv"]),
            datetime.fromisoformat(record["started_at"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _file(folder: Path, number: int) -> Path:
    return folder / "attempts" / f"{number:04}.json"
