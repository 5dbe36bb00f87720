"""Which process does something, told so that another process can later ask whether it is still alive.

A process id alone says little: ids are used again, and on another machine or in another container they mean something
else. So the moment at which the process started is kept with it, and the kernel and the namespace that know the id.
"""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """One process of one machine.

    Args:
        host: the machine's name.
        pid: the process id there.
        started: when it started, in the words of the kernel: the same id with another start is another process.
        boot: the id of the machine's present boot; empty where the kernel has none.
        namespace: in which the process id holds; it differs between containers. Empty where there are none.
    """

    host: str
    pid: int
    started: str
    boot: str = ""
    namespace: str = ""

    @classmethod
    def this(cls) -> Process:
        """The calling process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _started(pid) or "", _boot(), _namespace())

    def alive(self) -> bool | None:
        """Whether it has not ended; None if nobody here can know, because it belongs to another host or container."""
        if self.host != socket.gethostname():
            return None
        if self.boot != _boot():
            return False
        return None if self.namespace != _namespace() else _started(self.pid) == self.started


def _boot() -> str:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return str((_PROC / "self/ns/pid").readlink())
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started, None if there is none or only its exit status is left of it."""
    if not (_PROC / "self/stat").exists():
        return _started_by_ps(pid)
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # clock ticks since the boot


def _started_by_ps(pid: int) -> str | None:
    listed = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = listed.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()
