"""What goes to the cluster with a submission: layerwise itself, the workflow, and the local files that it names.

layerwise goes as one of Ray's `py_modules`: a copy of the package as it runs here, found by its own `__file__`, so that
a checkout with its symlinks and an installed wheel ship the same. What it depends on must be installed there.

The workflow goes resolved, with its files beside it, in Ray's `working_dir`. Nothing in there differs from one
submission of a run to the next, and Ray names packages by content, so a second submission uploads nothing. Files keep
their bytes but not their place: the run's id and the keys of its stages depend on contents alone.

Left out: models of the Hugging Face hub and its datasets, which the cluster fetches or finds in the results folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layerwise
from layerwise.errors import UsageError
from layerwise.pipeline.workflow import Workflow
from layerwise.pipeline.workflow.yaml12 import dump
from layerwise.stages.models.folder import ModelFolder

SHIP_LIMIT_BYTES = 256 * 2**20
"""Half of the message that Ray 2.60 takes; the head keeps what is shipped in memory, and each machine unpacks it."""

ENTRYPOINT = "exec sh start.sh"
"""The job's command, without its arguments; `exec`, so that signals and exit codes pass through no shell."""

_WORKFLOW, _START = "workflow.yaml", "start.sh"

START = """\
# Runs the job with the Python whose Ray started it. `python` may be another one here, or none; but Ray's library is
# mapped into the process that started this shell, and its path leads to the environment that it is installed in.
place='s#^[^/]*\\(/.*\\)/lib[^/]*/python[^/]*/[a-z]*-packages/ray/_raylet.*$#\\1#p'
prefix=$(sed -n "$place" "/proc/$PPID/maps" 2>/dev/null | head -n 1)
program=$(readlink "/proc/$PPID/exe" 2>/dev/null)
tried=
for python in "$prefix/bin/python3" "$prefix/bin/python" "$program" python3 python; do
    command -v "$python" >/dev/null 2>&1 || continue
    has_ray='import importlib.util, sys; sys.exit(importlib.util.find_spec("ray") is None)'
    "$python" -c "$has_ray" 2>/dev/null && exec "$python" -m layerwise.pipeline.cluster.driver "$@"
    tried="$tried $python"
done
echo "error: no Python here has Ray; tried:$tried" >&2
echo "hint: put the environment that Ray was started from first on the PATH of the cluster's machines" >&2
exit 2
"""


@dataclass(frozen=True)
class Cargo:
    """The local files of a workflow.

    Args:
        files: absolute path -> where it stands in the job's folder.
        size_bytes: of all together.
    """

    files: Mapping[Path, str]
    size_bytes: int

    @property
    def fits(self) -> bool:
        """Whether they may be shipped."""
        return self.size_bytes <= SHIP_LIMIT_BYTES


def cargo(workflow: Workflow) -> Cargo:
    """The files of the model, if it is a local folder, and the local texts.

    Raises:
        UsageError: the model is code of the user's, which is not shipped.
    """
    if workflow.model.python is not None:
        raise UsageError(
            f"the network of {workflow.model.python} cannot be submitted: its code is not shipped",
            hint="run it where the code and the cluster are: layerwise run FILE --address HOST:PORT",
        )
    files: dict[Path, str] = {}
    if workflow.model.path is not None:
        folder = workflow.model.path
        files |= {
            path: f"files/model/{path.relative_to(folder)}" for path in ModelFolder(folder, workflow.model.trust).files
        }
    texts = dict.fromkeys(path for text in workflow.data.values() for path in text.paths)
    files |= {
        path: f"files/text-{index}{path.suffix}" for index, path in enumerate(texts)
    }  # the ending says how it is read
    return Cargo(files, sum(path.stat().st_size for path in files))


def named_paths(workflow: Workflow) -> list[Path]:
    """The local folders and files that a workflow names."""
    model = [] if workflow.model.path is None else [workflow.model.path]
    return [*model, *dict.fromkeys(path for text in workflow.data.values() for path in text.paths)]


def stage_job(folder: Path, workflow: Workflow, load: Cargo | None) -> Path:
    """Make the job's folder.

    Args:
        folder: a new one, to make it in.
        workflow: what to run.
        load: the files to ship; None if the cluster sees them under their own paths.
    Returns:
        The folder for `working_dir`.
    """
    place = folder / "job"
    place.mkdir()
    resolved = workflow.resolved()
    if load is not None:
        for path, name in load.files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place / name)
        resolved = _moved(resolved, workflow, load)
    (place / _WORKFLOW).write_text(dump(resolved), encoding="utf-8")
    (place / _START).write_text(START, encoding="utf-8")
    return place


def stage_package(folder: Path) -> Path:
    """A copy of the package as it is installed, with its symlinks followed, for `py_modules`.

    Raises:
        UsageError: the package is not in a folder.
    """
    source = Path(layerwise.__file__ or "").parent
    if not (source / "pipeline").is_dir():
        raise UsageError(f"layerwise cannot be shipped from {source}", hint="install it with pip, not from a zip file")
    target = folder / "layerwise"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
    return target


def _moved(resolved: Mapping[str, Any], workflow: Workflow, load: Cargo) -> dict[str, Any]:
    """The workflow with its files where they are shipped to, relative to it."""
    model = dict(resolved["model"])
    if workflow.model.path is not None:
        model["path"] = "files/model"
    data = {
        name: entry | ({"text": [load.files[path] for path in workflow.data[name].paths]} if "text" in entry else {})
        for name, entry in resolved["data"].items()
    }
    return {**resolved, "model": model, "data": data}
