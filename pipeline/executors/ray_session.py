"""The one Ray of this process: started at the first use, on this machine, quietly, and taken down with the process.

Or a running cluster, if its address is given: it is joined at the first use and left at the end. Its machines must see
the results folder, the model and the texts under the same paths.

Decisions, each from a measured surprise of Ray 2.60:

- `address="local"` for a Ray of our own: without it `ray.init` joins whatever `RAY_ADDRESS` or the last started cluster
  says. A Ray that the process has already initialised is joined instead, and left running at the end.
- Token authentication is asked for, not only left on: a local Ray listens on every interface, and Ray before 2.59 asks
  nobody for a token. Ray writes the token file readable for everyone, so it is tightened. `RAY_AUTH_MODE` set by the
  user is respected.
- One retry after running out of memory instead of endless ones, which would hang the run without a word.
- The address of a cluster is tried before Ray gets it, which would wait for a minute where nobody answers.
- A short private folder for Ray's sockets and logs: socket paths end at 107 bytes. Ray opens the folder that it is
  given to everybody (mode 0777), so that one stands inside of it. It goes away with the session; a driver that is
  killed leaves it behind, some hundred KiB.
- The host's SIGTERM handler is put back, since `ray.init` replaces it.
- Ray prints a worker's death on stdout, where the command line's answers go; it goes to the log.

Left out: the dashboard, and starting clusters of several machines.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerwise.errors import ClusterError, LayerwiseError
from layerwise.pipeline.cluster.tokens import has_token, token_file
from layerwise.pipeline.executors.raw import Resources
from layerwise.pipeline.executors.ray_hosts import Hosts

logger = logging.getLogger(__name__)

_ENVIRONMENT = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_task_oom_retries": "1"}
RAYS_FOLDER = "ray"
"""What Ray is given of the private folder."""

_OBJECT_STORE_BYTES = 256 * 2**20  # items and answers are small; Ray's own default is 30% of the machine
_PATIENCE_SECONDS = 5.0  # for a cluster to accept a connection
_LONGEST_TEMPORARY_FOLDER = 24  # bytes of it that leave room for Ray's own 75 and our 15 below 107


class RaySession:
    """Ray, when it is needed.

    Args:
        cores: how many cores the local Ray hands out; None for all that this process may use.
        address: of a running cluster to join: `auto`, `host:port` or `ray://host:port`. None starts one here.
    """

    def __init__(self, cores: int | None = None, address: str | None = None) -> None:
        self._cores, self._address = cores, address
        self._joined = False
        self._ray: Any = None
        self._folder: Path | None = None  # set while a Ray of ours runs
        self._pid = 0
        self._hosts: Hosts | None = None
        self.replicas_open = False

    def ray(self) -> Any:
        """The module `ray`, connected.

        Raises:
            LayerwiseError: Ray does not start here.
            ClusterError: nobody answers at the address, or not to us.
        """
        if self._ray is None or not self._ray.is_initialized():
            self._ray = self._connect()
        return self._ray

    def machines(self) -> list[Mapping[str, float]]:
        """What each machine offers in total, by Ray's names: `CPU`, `GPU`, `memory`."""
        return [node["Resources"] for node in self.ray().nodes() if node["Alive"]]

    def hosts(self, resources: Resources, limit: int) -> Hosts:
        """Worker processes of that size; those of another size end first, for they hold the cores."""
        ray = self.ray()
        if self._hosts is None or self._hosts.resources != resources:
            self._close_hosts()
            self._hosts = Hosts(ray, resources, limit, self._check_alive)
        return self._hosts

    def _check_alive(self) -> None:
        """Raise if a process of the Ray that was started here ended.

        Ray itself says nothing of it, or ends this process a minute later, or blames the item that was worked on.
        """
        node: Any = getattr(_private_worker(self._ray), "_global_node", None)
        if self._folder is None or not hasattr(node, "dead_processes"):
            return
        for name, process in node.dead_processes():
            code = process.returncode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise LayerwiseError(
                f"Ray's own process {name} on this machine {how}, and all worker processes went with it",
                hint="finished items are kept; where the machine ran out of memory, state that of an item "
                "(`resources`), so that fewer run at a time; `--executor inline` needs no Ray",
            )

    def close(self) -> None:
        """Take down the Ray that this session started; one that was found running goes on, without our processes."""
        if self._pid == os.getpid():
            self._close_hosts()
            if self._joined:
                atexit.unregister(self.close)
                self._ray.shutdown()  # leaves the cluster, which goes on
                self._ray, self._joined = None, False
        if self._folder is None or self._pid != os.getpid():  # a forked child must not end its parent's Ray
            return
        atexit.unregister(self.close)
        self._ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._ray = self._folder = None

    def _close_hosts(self) -> None:
        if self._hosts is not None and self._ray is not None and self._ray.is_initialized():
            self._hosts.close()
        self._hosts = None

    def _connect(self) -> Any:
        for name, value in _ENVIRONMENT.items():
            if name != "RAY_AUTH_MODE" or self._address is None or has_token():  # a cluster may do without tokens
                os.environ.setdefault(name, value)  # before the import, which reads them
        import ray

        self._pid = os.getpid()
        if ray.is_initialized():
            logger.info("using the Ray that this process has already initialised")
            return ray
        if self._address is not None:
            return self._join(ray, self._address)
        self.close()  # a Ray of ours that somebody else shut down
        self._ray, self._folder = ray, private_folder()
        atexit.register(self.close)
        logger.info("starting Ray (some seconds)")
        try:
            with _sigterm_handler_kept():
                ray.init(
                    address="local",
                    num_cpus=self._cores or available_cores(),
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(self._folder / RAYS_FOLDER),
                )
        except (RuntimeError, OSError, ValueError, ray.exceptions.RayError) as error:
            self.close()
            raise LayerwiseError(f"Ray did not start: {error}", hint="`--executor inline` works without it") from error
        _make_token_private()
        _log_instead_of_print(ray)
        return ray

    def _join(self, ray: Any, address: str) -> Any:
        if not _answers(address):
            raise ClusterError(
                f"no Ray cluster answers at {address}",
                hint="`ray status` on its head says whether it runs; behind a firewall, tunnel the port",
            )
        logger.info("joining the Ray cluster at %s", address)
        try:
            with _sigterm_handler_kept():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, OSError, ValueError, ray.exceptions.RayError) as error:
            raise ClusterError(
                f"joining the Ray cluster at {address} failed: {error}",
                hint="it must run the same versions of Python and Ray, and take our token if it asks for one",
            ) from error
        self._ray, self._joined = ray, True
        atexit.register(self.close)
        _log_instead_of_print(ray)
        return ray


def _answers(address: str) -> bool:
    """True if something listens at `host:port`, or the address does not say a port."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE_SECONDS).close()
    except OSError:
        return False
    return True


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def private_folder() -> Path:
    """A new folder that is ours alone, with a path short enough for Ray's sockets."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="lw-", dir=base if len(base) <= _LONGEST_TEMPORARY_FOLDER else "/tmp"))


@contextmanager
def _sigterm_handler_kept() -> Iterator[None]:
    """Put the host's handler back; where it had none, Ray's orderly exit stays, but without its dump of the stack."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            # Setting it anew also takes the signal back from Ray's C++ core, which would print that dump.
            signal.signal(signal.SIGTERM, before if callable(before) else signal.getsignal(signal.SIGTERM))


def _make_token_private() -> None:
    token = token_file()
    try:
        if token.stat().st_uid == os.getuid() and token.stat().st_mode & 0o077:
            token.chmod(0o600)
    except OSError:  # no token file, or one that somebody manages for us
        return


def _private_worker(ray: Any) -> Any:
    """The module of Ray with what it has no switch for. Its names are private: do without what is not there."""
    return getattr(getattr(ray, "_private", None), "worker", None)


def _log_instead_of_print(ray: Any) -> None:

    def log(data: Mapping[str, Any], **_: object) -> None:
        logger.info("Ray: %s", " ".join(data.get("lines", ())))

    worker = _private_worker(ray)
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = log
