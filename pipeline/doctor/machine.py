"""This machine: its cores and its memory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from layerwise.pipeline.doctor.check import Finding, Surroundings, gigabytes, ok, warning

LITTLE_MEMORY_BYTES = 2 * 2**30  # Ray idles at 0.6 GiB, its object store takes 0.25, a worker with torch some 0.5

_MEMORY = Path("/proc/meminfo")
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def cores(_: Surroundings) -> Finding:
    """Cores that a run would use."""
    from layerwise.pipeline.executors.ray_session import available_cores

    usable, all_ = available_cores(), os.cpu_count() or 1
    return ok(f"{usable} usable" + (f" of {all_}, by affinity or the quota of the container" if usable < all_ else ""))


def memory(_: Surroundings) -> Finding:
    """Memory that is free or can be freed, here and within the limit of a container."""
    try:
        free = _numbers(_MEMORY, "MemAvailable")["MemAvailable"] * 1024
    except (OSError, KeyError):
        return ok("free memory is not known on this system")
    try:
        limit = int((_CONTROL_GROUP / "memory.max").read_text())
        used = int((_CONTROL_GROUP / "memory.current").read_text())
        cache = _numbers(_CONTROL_GROUP / "memory.stat", "inactive_file")["inactive_file"]
        free = min(free, limit - used + cache)
    except (OSError, ValueError, KeyError):
        pass  # no container, or one without a limit ("max")
    if free < LITTLE_MEMORY_BYTES:
        return warning(f"{gigabytes(free)} free", "end other programs, or use `--executor inline`, which spares Ray's")
    return ok(f"{gigabytes(free)} free")


def _numbers(path: Path, *names: str) -> Mapping[str, int]:
    """Numbers from lines such as "MemAvailable:  12345 kB"."""
    found = re.findall(rf"^({'|'.join(names)}):?\s+(\d+)", path.read_text(), re.MULTILINE)
    return {name: int(digits) for name, digits in found}
