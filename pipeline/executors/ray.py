"""Items and replicas in worker processes of Ray, on the cores and devices of this machine or of a cluster.

Everything runs on `ray_hosts.Hosts`, processes that stay warm from stage to stage. As many items are in flight as there
are slots, and never more. An item whose process dies is repeated; what it raises is never repeated, for it would be
raised again. Weights do not travel through Ray: items name files, and every process maps them into its memory.

Left out: Ray's object store for large things, deadlines, and duplicates of slow items.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic

from layerwise.errors import UsageError
from layerwise.pipeline.executors.raw import RawReplicas, Resources, describe
from layerwise.pipeline.executors.ray_hosts import Hosts
from layerwise.pipeline.executors.ray_session import RaySession
from layerwise.stages.contract import Answer, Item


class RayExecutor:
    """The executor that uses the whole machine.

    Args:
        resources: what one item, or one replica, occupies; slots are how often that fits.
        session: the Ray to use; None for one of its own, started at the first use.
        address: instead, that of a running cluster, which is joined at the first use; see `RaySession`.
    """

    def __init__(
        self,
        resources: Resources = Resources(),  # noqa: B008 (frozen)
        session: RaySession | None = None,
        address: str | None = None,
    ) -> None:
        self.resources = resources
        self.peak_rss_bytes = 0
        self._session = session or RaySession(address=address)

    @property
    def workers(self) -> int:
        """How many items run at a time; starts Ray.

        Raises:
            UsageError: one item is larger than any machine, and would wait for ever.
        """
        machines = self._session.machines()
        slots = sum(self._slots(machine) for machine in machines)
        if slots == 0:
            largest = max(machines, key=lambda machine: machine.get("CPU", 0))
            offer = describe(largest.get("CPU", 0), largest.get("GPU", 0), largest.get("memory", 0))
            raise UsageError(f"an item needs {self.resources}; the largest machine has {offer}", hint="ask for less")
        return slots

    def stream(
        self, fn: Callable[[Item], Answer], items: Sequence[Item], names: Sequence[str] | None = None
    ) -> Generator[tuple[int, Answer], None, None]:
        """As in `raw.RawExecutor`; answers come in the order in which they finish."""
        assert not self._session.replicas_open, "the cores belong to the replicas: leave their `with` first"
        if items:
            hosts = self._hosts()
            yield from self._answers(hosts, hosts.publish(partial(_itself, fn)), items, names)

    @contextmanager
    def replicas(self, factory: Callable[[], Callable[[Item], Answer]]) -> Iterator[RawReplicas[Item, Answer]]:
        """As in `raw.RawExecutor`: at most one per slot, each loaded when an item needs it."""
        assert not self._session.replicas_open, "one set of replicas at a time"
        published: list[tuple[int, Any]] = []

        def stream(items: Sequence[Item], names: Sequence[str] | None) -> Generator[tuple[int, Answer], None, None]:
            if items:
                hosts = self._hosts()
                if not published:
                    published.append(hosts.publish(factory))
                yield from self._answers(hosts, published[0], items, names)

        self._session.replicas_open = True
        try:
            yield _RayReplicas(stream)
        finally:
            self._session.replicas_open = False

    def sized(self, resources: Resources) -> RayExecutor:
        """The same Ray for items of another size."""
        return RayExecutor(resources, self._session)

    def close(self) -> None:
        """End the Ray that was started here, for every executor that shares it."""
        self._session.close()

    def _hosts(self) -> Hosts:
        return self._session.hosts(self.resources, self.workers)

    def _answers(
        self, hosts: Hosts, published: tuple[int, Any], items: Sequence[Item], names: Sequence[str] | None
    ) -> Generator[tuple[int, Answer], None, None]:
        for index, (answer, peak) in hosts.stream(published, items, names):
            self.peak_rss_bytes = max(self.peak_rss_bytes, peak)
            yield index, answer

    def _slots(self, machine: Mapping[str, float]) -> int:
        wanted = {"CPU": self.resources.cpus, "GPU": self.resources.gpus, "memory": self.resources.memory_bytes or 0}
        return int(min(machine.get(name, 0) / amount for name, amount in wanted.items() if amount))


class _RayReplicas(Generic[Item, Answer]):
    def __init__(
        self, stream: Callable[[Sequence[Item], Sequence[str] | None], Generator[tuple[int, Answer], None, None]]
    ) -> None:
        self._stream = stream

    def stream(
        self, items: Sequence[Item], names: Sequence[str] | None = None
    ) -> Generator[tuple[int, Answer], None, None]:
        return self._stream(items, names)


def _itself(fn: Callable[[Item], Answer]) -> Callable[[Item], Answer]:
    return fn
