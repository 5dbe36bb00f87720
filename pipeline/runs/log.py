"""What a run leaves beside its tables while it runs: a log of each attempt, and how far the present stage is.

`runs/<run>/log/NNNN.log` has one line per event: the time in UTC, the stage in brackets or `-`, and what the display
was told. Each event is one write, so whoever follows the file sees whole lines, and a killed run has its last one.
`runs/<run>/progress.json` says which stage is at work and how far it is; it is replaced in one step, at most once a
second, and not written at all by a run that finds everything in the cache.

Both are for people who watch. Neither is flushed to the device, and a full disk costs lines, never the run: what holds
stands in the tables.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from layerwise.errors import LayerwiseError
from layerwise.pipeline.display import Display, Displays, LineDisplay, Pace, SilentDisplay, clock
from layerwise.results.links import open_plain, refuse_links, unfinished
from layerwise.results.sealed import read_sealed, sealed

SECONDS_BETWEEN_UPDATES = 1.0
"""How often `progress.json` is written within one stage."""


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        attempt: which attempt says so.
        stage: the stage at work, or the last one that was.
        reason: why it had to be made.
        started_at: when it began, by the clock of its host, in ISO form.
        done: items of its present step that are done, of `total`; both None before the first step.
        note: what the step counts.
        remaining_seconds: of the step, None while nothing can be said.
    """

    attempt: int
    stage: str
    reason: str
    started_at: str
    done: int | None = None
    total: int | None = None
    note: str = ""
    remaining_seconds: float | None = None


def read_progress(folder: Path) -> Progress | None:
    """What the run of a folder last said of itself; None if it said nothing that can be read."""
    record = read_sealed(_progress_file(folder))
    try:
        return None if record is None else Progress(**record)
    except TypeError:
        return None


def log_file(folder: Path, attempt: int) -> Path:
    """Where the log of an attempt stands."""
    return folder / "log" / f"{attempt:04}.log"


@contextmanager
def recorded(display: Display, folder: Path, attempt: int) -> Iterator[Display]:
    """A display that also keeps what it is told, in the folder of a run, and at the end how the attempt ended.

    Raises:
        StoreError: a link would lead these files out of the results folder.
    """
    for path in (log_file(folder, attempt), _progress_file(folder)):
        refuse_links(folder.parents[1], path)
    log = RunLog(log_file(folder, attempt))
    started = time.monotonic()
    try:
        yield Displays(log, ProgressFile(folder, attempt), display)
    except BaseException as error:
        log.ended(error, time.monotonic() - started)
        raise
    else:
        log.ended(None, time.monotonic() - started)
    finally:
        log.close()


class RunLog(LineDisplay):
    """Writes one line per event into a file.

    Args:
        path: the file; what stands in it is kept.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._stage: str | None = None
        self._descriptor: int | None = None
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            self._descriptor = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def start(self, stage: str, uses: str, reason: str) -> None:
        self._stage = stage
        super().start(stage, uses, reason)

    def finish(self, stage: str, seconds: float, cached: int, total: int) -> None:
        super().finish(stage, seconds, cached, total)
        self._stage = None

    def ended(self, error: BaseException | None, seconds: float) -> None:
        """Say how the attempt ended; of a mistake of ours also where it happened."""
        if isinstance(error, LayerwiseError):
            self.tell("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]), self._stage)
        elif isinstance(error, Exception):
            self.tell("error: " + "".join(traceback.format_exception(error)).rstrip(), self._stage)
        how = "finished" if error is None else "failed" if isinstance(error, Exception) else "stopped"
        self.tell(f"{how} after {clock(seconds)}")

    def tell(self, text: str, stage: str | None = None) -> None:
        if self._descriptor is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        head = f"{now} {'-' if stage is None else f'[{stage}]'}"
        lines = "".join(f"{head} {line}\n" for line in text.splitlines())
        with suppress(OSError):
            os.write(self._descriptor, lines.encode(errors="backslashreplace"))

    def close(self) -> None:
        """The last line was written."""
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


class ProgressFile(SilentDisplay):
    """Keeps `progress.json` up to date.

    Args:
        folder: the run's.
        attempt: the attempt's number.
    """

    def __init__(self, folder: Path, attempt: int) -> None:
        self._folder, self._attempt = folder, attempt
        self._pace = Pace()
        self._now: Progress | None = None
        self._written: Progress | None = None
        self._last = 0.0
        self._later: threading.Timer | None = None
        self._lock = threading.Lock()

    def start(self, stage: str, uses: str, reason: str) -> None:
        self._now = Progress(self._attempt, stage, reason, datetime.now(UTC).isoformat())
        self._write()

    def progress(self, stage: str, done: int, total: int, note: str) -> None:
        if self._now is None:
            return
        remaining = self._pace.remaining(done, total, note)
        self._now = replace(self._now, done=done, total=total, note=note, remaining_seconds=remaining)
        wait = self._last + SECONDS_BETWEEN_UPDATES - time.monotonic()
        if wait <= 0:
            self._write()
        elif self._later is None:  # the next item may take hours
            self._later = threading.Timer(wait, self._write)
            self._later.daemon = True
            self._later.start()

    def end(self) -> None:
        self._write()  # how far a stage was that did not end well

    def _write(self) -> None:
        with self._lock:
            if self._later is not None:
                self._later.cancel()
                self._later = None
            if self._now is None or self._now == self._written:
                return
            self._last, self._written = time.monotonic(), self._now
            path = _progress_file(self._folder)
            with suppress(OSError), unfinished(path) as temporary:
                temporary.write_bytes(sealed(asdict(self._now)))
                temporary.replace(path)


def _progress_file(folder: Path) -> Path:
    return folder / "progress.json"
