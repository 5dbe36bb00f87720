"""What a check is: a function from the surroundings to a finding.

What two checks ask for, and is dear, the surroundings remember.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from layerwise.errors import ClusterError
from layerwise.pipeline.cluster.connection import Visit, visit
from layerwise.pipeline.doctor import child

State = Literal["ok", "warning", "problem"]

_ASK_TORCH = """
import json, torch
devices = []
for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    device = torch.cuda.get_device_properties(index)
    fault = None
    try:
        torch.ones(2, device=index).sum().item()
    except RuntimeError as error:
        fault = str(error).splitlines()[0]
    devices.append({"name": device.name, "bytes": device.total_memory, "fault": fault})
print(json.dumps({"built_for_gpus": bool(torch.version.cuda or torch.version.hip), "devices": devices}))
"""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        state: a problem keeps something from working, a warning does not.
        found: what is there, with its version or size.
        hint: what to do about it, None if nothing.
    """

    state: State
    found: str
    hint: str | None = None


def ok(found: str) -> Finding:
    """Nothing to do."""
    return Finding("ok", found)


def warning(found: str, hint: str) -> Finding:
    """It works, but."""
    return Finding("warning", found, hint)


def problem(found: str, hint: str | None = None) -> Finding:
    """It does not work."""
    return Finding("problem", found, hint)


@dataclass(frozen=True)
class Surroundings:
    """What the checks look at.

    Args:
        results: the results folder, existing or not.
        address: a cluster's `http(s)://host:port`, None for none.
    """

    results: Path
    address: str | None = None

    @cached_property
    def place(self) -> Path:
        """The results folder, or the nearest parent that exists."""
        path = self.results.absolute()
        return next(folder for folder in (path, *path.parents) if folder.exists())

    @cached_property
    def torch(self) -> child.Answer:
        """What torch says about itself and its devices."""
        return child.ask(_ASK_TORCH)

    @cached_property
    def cluster(self) -> Visit | ClusterError:
        """How the cluster let us in, or why it did not."""
        assert self.address is not None
        try:
            return visit(self.address)
        except ClusterError as error:
            return error


Check = Callable[[Surroundings], Finding]


def gigabytes(size: float) -> str:
    """A size for people."""
    return f"{size / 1e9:.3g} GB"
