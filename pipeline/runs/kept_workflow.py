"""The workflow that a run keeps in its folder, with nothing left to defaults or to other files.

`runs/<run>/workflow.yaml` is a workflow file like any other; its last line, a comment, is the SHA-256 of all before. A
file that does not fit it is written again from the table `runs`, which holds the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.errors import UsageError
from layerwise.pipeline.workflow.yaml12 import dump, load_text
from layerwise.results.durable import replace_file
from layerwise.results.store import Store
from layerwise.results.told import warn_once

WORKFLOW = "workflow.yaml"
"""The file's name in a run's folder."""

_SEAL = "# sha256: "


def keep_workflow(folder: Path, resolved: Mapping[str, Any], tmp: Path) -> None:
    """Write the workflow of a run down, unless it stands there.

    Args:
        folder: the run's.
        resolved: all that it takes to run it again, wherever the workflow file has gone.
        tmp: for the unfinished file, on the same file system.
    """
    path, data = folder / WORKFLOW, _sealed(dump(resolved))
    if _content(path) == data:
        return
    if path.exists() and damage_of(path):
        warn_once(f"{path} is damaged: it was written again")
    replace_file(path, data, tmp)


def kept_workflow(store: Store, run: str) -> Path:
    """The file of a run, written again from the tables if it is damaged or missing.

    Raises:
        UsageError: it is, and the tables know nothing of the run.
    """
    path = store.root / "runs" / run / WORKFLOW
    what = damage_of(path)
    if what is None:
        return path
    known = [row["resolved"] for row in store.rows("runs", run=run, columns=["resolved"]) if row["resolved"]]
    if not known:
        raise UsageError(f"{path} {what}", hint="run the workflow file again: what is finished is found")
    replace_file(path, _sealed(dump(json.loads(known[-1]))), store.root / "tmp")
    warn_once(f"{path} {what}: it was written again, from the tables")
    return path


def read_kept(path: Path) -> dict[str, Any] | None:
    """What the file says, as plain values; None if it is damaged, with a warning, or missing."""
    what = damage_of(path)
    if what is None:
        document: dict[str, Any] = load_text(path.read_text(encoding="utf-8"), str(path)).plain()
        return document
    if path.exists():
        warn_once(f"{path} {what}")
    return None


def damage_of(path: Path) -> str | None:
    """What is wrong with the file, in a few words; None if nothing is."""
    data = _content(path)
    if data is None:
        return "is missing" if not path.exists() else "cannot be read"
    text, _, seal = data.rpartition(_SEAL.encode())
    return None if seal == hashlib.sha256(text).hexdigest().encode() + b"\n" else "is damaged, its checksum differs"


def _sealed(text: str) -> bytes:
    data = text.encode()
    return data + f"{_SEAL}{hashlib.sha256(data).hexdigest()}\n".encode()


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
