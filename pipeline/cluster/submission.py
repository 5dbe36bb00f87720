"""The submissions of a run to clusters, one small file each.

`runs/<run>/submissions/NNNN.json` is written once, before the cluster is asked to do anything, and claims the number of
the attempt that the job will make: of two who submit the same run at once, one finds it taken. The job compares the
nonce, which tells it that the folder it sees is the folder that was written. A token never stands here.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from layerwise.errors import UsageError
from layerwise.pipeline.cluster.connection import plain_address
from layerwise.results.durable import publish_file
from layerwise.results.sealed import read_sealed, sealed

_LONGEST_ID = 150
"""Characters; Ray names log files after it, and file names end at 255 bytes."""


@dataclass(frozen=True)
class Submission:
    """One attempt at a run that was handed to a cluster.

    Args:
        number: of the attempt.
        job: the id that it has there.
        address: of the cluster's dashboard.
        argv: the command.
        ships: whether the files that the workflow names are sent along.
        elsewhere: those that are not; the cluster must see them under these absolute paths.
        pass_env: names of the variables that are handed on; their values are not kept.
        in_clear: whether the token may be sent there over plain HTTP.
        submitted_at: by the clock of the host that submitted it.
        nonce: tells this folder from another one at the same path.
    """

    number: int
    job: str
    address: str
    argv: tuple[str, ...] = ()
    ships: bool = True
    elsewhere: tuple[str, ...] = ()
    pass_env: tuple[str, ...] = ()
    in_clear: bool = False
    submitted_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))


def job_id(run: str, number: int) -> str:
    """The id of the job that makes an attempt; the same attempt has the same id, so it cannot run twice."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", run)[-_LONGEST_ID:]
    return f"lw-{safe}-a{number}"


def publish_submission(folder: Path, submission: Submission, tmp: Path) -> bool:
    """Write it down; False if its number is taken.

    Args:
        folder: the run's.
        submission: what to write.
        tmp: for the unfinished file, on the same file system.
    """
    record = {**asdict(submission), "submitted_at": submission.submitted_at.isoformat()}
    return publish_file(submission_file(folder, submission.number), sealed(record, indent=1), tmp)


def submission_numbers(folder: Path) -> list[int]:
    """The numbers of the attempts at a run that were submitted, in order."""
    return sorted(int(path.stem) for path in (folder / "submissions").glob("*.json") if path.stem.isdecimal())


def read_submission(folder: Path, number: int) -> Submission | None:
    """The record of a submission; None if there is none or it cannot be read."""
    record = read_sealed(submission_file(folder, number))
    if record is None:
        return None
    try:
        return Submission(
            number=number,
            job=_plain(record["job"], r"[A-Za-z0-9._-]+"),
            address=plain_address(str(record["address"])),
            argv=_texts(record["argv"]),
            ships=bool(record["ships"]),
            elsewhere=_texts(record["elsewhere"]),
            pass_env=tuple(_plain(name, r"[A-Za-z_][A-Za-z0-9_]*") for name in record["pass_env"]),
            in_clear=bool(record["in_clear"]),
            submitted_at=datetime.fromisoformat(record["submitted_at"]),
            nonce=str(record["nonce"]),
        )
    except (ValueError, KeyError, TypeError, UsageError):
        return None


def submission_file(folder: Path, number: int) -> Path:
    """Where the record of a submission stands."""
    return folder / "submissions" / f"{number:04}.json"


def _plain(value: Any, pattern: str) -> str:
    """A word that may stand in a URL or on a terminal, whoever wrote it."""
    if not re.fullmatch(pattern, value):
        raise ValueError(f"{value!r} is no plain word")
    return str(value)


def _texts(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)
