"""What a time was measured on, and whether this is the same.

A time means nothing away from the machine, the library versions and the number of threads that it was measured with.
So every table of times carries a `Device`, and whoever uses the table compares it with the device at hand: a table from
elsewhere is refused, with the names of what differs, never used as a guess.

Versions are read from the installed packages and a processor from what Linux says of it, so the fingerprint of a CPU
loads no torch. Left out: clocks, temperature and load, which change from minute to minute; a table carries the spread
of its samples instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from layerwise.errors import DeviceChanged, UsageError

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MEMORY = Path("/proc/meminfo")

FEATURES = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "sve",
    "bf16",
)
"""Instruction sets that decide which matrix product a library takes, by the names that Linux gives them."""

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """The fingerprint of what computes.

    Args:
        kind: `cpu` or `cuda`.
        name: of the processor or the GPU.
        cores: of the processor, pinned or not, or streaming multiprocessors.
        features: instruction sets that matter, or the compute capability.
        memory_gib: memory, rounded to whole GiB.
        cache_bytes: the last level of cache (L3 of a processor, L2 of a GPU); 0 if unknown.
        threads: of a processor, that compute at a time; 0 on a GPU.
        torch: version of torch.
        triton: version of Triton, None without it.
        driver: version of the GPU's driver, None on a processor.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    cores: int
    features: tuple[str, ...]
    memory_gib: int
    cache_bytes: int
    threads: int
    torch: str
    triton: str | None = None
    driver: str | None = None

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change with any of it."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()[:12]

    def as_json(self) -> dict[str, Any]:
        """JSON values; `from_json` takes them back."""
        return {**asdict(self), "features": list(self.features)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Device:
        """Undo `as_json`.

        Raises:
            UsageError: values are missing, or there are others.
        """
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            odd = ", ".join(sorted(set(values) ^ known))
            raise UsageError(f"not the description of a device: {odd}", hint="measure the times again")
        return cls(**{**values, "features": tuple(values["features"])})

    def differences(self, other: Device) -> list[str]:
        """What differs, as `torch: 2.13.0 and 2.14.0`, this one first."""
        pairs = [(field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return [f"{name}: {_words(mine)} and {_words(theirs)}" for name, mine, theirs in pairs if mine != theirs]

    def __str__(self) -> str:
        units = f"{self.cores} cores, threads used: {self.threads}" if self.kind == "cpu" else f"{self.cores} SMs"
        versions = [f"torch {self.torch}", f"triton {self.triton}" if self.triton else "", self.driver or ""]
        return ", ".join(part for part in (self.name, units, " ".join(self.features), *versions) if part)


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    return "none" if value is None else str(value)


def require_same(recorded: Device, here: Device, what: str) -> None:
    """Refuse times of another device.

    Args:
        recorded: what they were measured on.
        here: what they would be used for.
        what: the times, for the message: `table latency.json`.
    Raises:
        DeviceChanged: the two differ; names how.
    """
    found = recorded.differences(here)
    if found:
        raise DeviceChanged(
            f"{what} was measured on another device ({recorded.digest}, this is {here.digest}): {'; '.join(found)}",
            hint="measure the times again on this device",
        )


def this_device(kind: str, threads: int = 1) -> Device:
    """The fingerprint of this machine's processor or GPU.

    Args:
        kind: `cpu` or `cuda`.
        threads: that compute at a time on a processor; times are measured with one.
    Raises:
        UsageError: no such kind, or no GPU that torch can use.
    """
    if kind == "cpu":
        return _cpu(threads)
    if kind == "cuda":
        return _gpu()
    raise UsageError(f"unknown device '{kind}' (known: cpu, cuda)")


def require_gpu() -> None:
    """Refuse to go on without a GPU that torch can use, and say which of the two is missing.

    Raises:
        UsageError: torch was built without CUDA, or it finds no GPU.
    """
    import torch

    if torch.version.cuda is None:
        raise UsageError(
            f"device cuda: this torch ({torch.__version__}) was built without CUDA",
            hint="install a CUDA build of torch, or use the device cpu",
        )
    if not torch.cuda.is_available():
        raise UsageError("device cuda: torch finds no GPU", hint="run it where there is one, or use the device cpu")


def cache_bytes(folder: Path = CACHES) -> int:
    """The size of a processor's last level of cache; 0 where Linux does not say it."""
    sizes = [_size(path.read_text(encoding="utf-8").strip()) for path in sorted(folder.glob("index*/size"))]
    return max(sizes, default=0)


def _size(text: str) -> int:
    """`32768K` in bytes."""
    return int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]] if text[-1].isalpha() else int(text)


def processor(path: Path = CPUINFO) -> tuple[str, tuple[str, ...]]:
    """Name of the processor and those of its instruction sets that matter.

    A cloud's processors often share a bare brand name, so family and model stand beside it.
    """
    if not path.exists():
        return platform.processor() or platform.machine(), ()
    facts: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    name = facts.get("model name") or platform.machine()
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts.get('model', '?')})"
    return name, tuple(feature for feature in FEATURES if feature in flags)


def _cpu(threads: int) -> Device:
    name, features = processor()
    return Device(
        kind="cpu",
        name=name,
        cores=os.cpu_count() or 1,  # not those of the affinity: pinning a measurement makes no other machine
        features=features,
        memory_gib=_memory_gib(),
        cache_bytes=cache_bytes(),
        threads=threads,
        torch=version("torch"),
        triton=None,  # no kernel of ours runs on a processor
    )


def _memory_gib() -> int:
    if not MEMORY.exists():
        return 0
    for line in MEMORY.read_text(encoding="utf-8").splitlines():
        if line.startswith("MemTotal:"):
            return round(int(line.split()[1]) * 1024 / GIB)
    return 0


def _gpu() -> Device:
    require_gpu()
    import torch

    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(
        kind="cuda",
        name=facts.name,
        cores=facts.multi_processor_count,
        features=(f"sm_{facts.major}{facts.minor}",),
        memory_gib=round(facts.total_memory / GIB),
        cache_bytes=facts.L2_cache_size,
        threads=0,
        torch=version("torch"),
        triton=_installed("triton"),
        driver=_driver(),
    )


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of the kernel module, which is that of the driver."""
    if not path.exists():
        return None
    words = path.read_text(encoding="utf-8").split()
    numbers = [word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()]
    return f"driver {numbers[0]}" if numbers else None
