"""Everything that a results folder holds, read from the disk and compared with the checksums it was written with.

Commands and runs compare what they use, and believe a file that has not been touched since it was last compared. What
a disk changes by itself leaves no such trace: here nothing is believed, and every byte is read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from layerwise.errors import CorruptArtifact
from layerwise.pipeline.artifacts import ArtifactStore
from layerwise.pipeline.display import clock
from layerwise.pipeline.doctor.check import Finding, gigabytes, ok, problem, warning
from layerwise.pipeline.executors.journal import read_answer
from layerwise.pipeline.runs.kept_workflow import WORKFLOW, damage_of
from layerwise.results.row_files import RowFiles
from layerwise.results.sealed import Damaged, unsealed
from layerwise.results.store import MARKER

SHOWN = 20
"""Damaged files of one kind that are named; the others are counted."""

_SECONDS = 5.0
"""Between two lines about progress."""


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was written.

    Args:
        what: the file, and what is wrong with it.
        lost: whether something is missing until it is made again.
    """

    what: str
    lost: bool = True


def read_all(root: Path) -> Iterator[tuple[str, Finding]]:
    """Read everything below a results folder; the name and the finding of each kind as soon as there is one.

    Args:
        root: the results folder; nothing in it is changed.
    """
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"reading {gigabytes(size)} in {root}", file=sys.stderr, flush=True)
    for name, look in KINDS.items():
        started, number = time.monotonic(), 0
        said, faults = started, []
        for fault in look(root):
            number += fault is None
            if fault is not None:
                faults.append(fault)
            if time.monotonic() - said > _SECONDS:
                said = time.monotonic()
                print(f"{name}: {number} sound after {clock(said - started)}", file=sys.stderr, flush=True)
        yield name, _finding(number, faults)


def _finding(number: int, faults: list[Fault]) -> Finding:
    if not faults:
        return ok(f"{number} read, all as they were written")
    lost = any(fault.lost for fault in faults)
    shown = [fault.what for fault in sorted(faults, key=lambda fault: not fault.lost)[:SHOWN]]
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    found = f"{number} as they were written, {len(faults)} not: " + "; ".join([*shown, *more])
    if lost:
        return problem(found, "run its workflow again: what is missing is made anew; and look after the disk")
    return warning(found, "no result is lost, and a run puts back what it needs; look after the disk")


def _tables(root: Path) -> Iterator[Fault | None]:
    """Rows: files of the tables, and their copies."""
    files = RowFiles(root)
    for damage in files.verdicts():
        yield None if damage is None else Fault(str(damage), damage.lost)


def _artifacts(root: Path) -> Iterator[Fault | None]:
    """Finished stages, with all their files."""
    store = ArtifactStore(root)
    for folder in sorted(root.glob("artifacts/*/*")):
        if folder != store.folder(folder.name) or not folder.is_dir():
            yield Fault(f"{folder} is no artifact of layerwise", lost=False)
            continue
        try:
            artifact = store.find(folder.name, believing=False)
        except CorruptArtifact as error:
            yield Fault(error.message)
            continue
        assert artifact is not None, folder
        yield None


def _unfinished(root: Path) -> Iterator[Fault | None]:
    """Answers of stages that were interrupted, and the files that items left beside them."""
    for path in sorted(root.glob("work/*/journal/*/*.json")):
        yield _sound(path, lambda path: read_answer(path, path.parents[2] / "items"))


def _records(root: Path) -> Iterator[Fault | None]:
    """What is written down about runs and about the folder."""
    sealed = [root / MARKER, root / "digests.json"]
    for pattern in ("runs/*/attempts/*.json", "runs/*/progress.json", "submissions/*.json"):
        sealed += sorted(root.glob(pattern))
    for path in sealed:
        if path.exists():
            yield _sound(path, lambda path: unsealed(path.read_bytes()), lost=False)
    for path in sorted(root.glob(f"runs/*/{WORKFLOW}")):
        what = damage_of(path)
        yield None if what is None else Fault(f"{path} {what}", lost=False)


def _sound(path: Path, read: Callable[[Path], object], lost: bool = True) -> Fault | None:
    try:
        read(path)
    except (Damaged, OSError) as error:
        return Fault(f"{path} is damaged ({error})", lost)
    return None


KINDS: Mapping[str, Callable[[Path], Iterator[Fault | None]]] = {
    "tables": _tables,
    "artifacts": _artifacts,
    "unfinished stages": _unfinished,
    "records": _records,
}
"""What is read: for each thing None if it is as it was written, and else what is wrong."""
