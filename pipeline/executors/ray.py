"""Items as Ray tasks, replicas as Ray actors, on the cores and devices of this machine.

Tasks go out through a window of twice the slots, so that a slot never waits for the driver and nothing queues without
bound. A task whose process dies is repeated by Ray; what a task raises is never repeated, for it would be raised again.
Weights do not travel through Ray: items name files, and every process maps them into its memory.

Left out: Ray's object store for large things, deadlines, and duplicates of slow items.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from layerwise.errors import UsageError
from layerwise.pipeline.executors.raw import RawReplicas, Resources, collect, describe, item_names, measured, naming
from layerwise.pipeline.executors.ray_failures import fetch, lost
from layerwise.pipeline.executors.ray_replicas import RayReplicas, Replica
from layerwise.pipeline.executors.ray_session import RaySession
from layerwise.stages.contract import Answer, Item

logger = logging.getLogger(__name__)

MAX_RETRIES = 3
"""How often Ray repeats a task whose process died."""

_CANCEL_ROUNDS = 10  # of a second each


class RayExecutor:
    """The executor that uses the whole machine.

    Args:
        resources: what one item, or one replica, occupies; slots are how often that fits.
        session: the Ray to use; None for one of its own, started at the first use.
    """

    def __init__(self, resources: Resources = Resources(), session: RaySession | None = None) -> None:  # noqa: B008 (frozen)
        self.resources = resources
        self.peak_rss_bytes = 0
        self._session = session or RaySession()

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
        if not items:
            return
        ray, names = self._session.ray(), item_names(items, names)
        task = ray.remote(measured).options(**self._claims(), max_retries=MAX_RETRIES, retry_exceptions=False)
        function, threads, window = ray.put(fn), self.resources.threads, 2 * self.workers
        waiting = deque(range(len(items)))
        flying: dict[Any, int] = {}
        try:
            while waiting or flying:
                while waiting and len(flying) < window:
                    index = waiting.popleft()
                    flying[task.remote(function, items[index], threads)] = index
                (ref,), _ = ray.wait(list(flying), num_returns=1)
                index = flying.pop(ref)
                try:
                    with naming(names[index]):
                        answer = self._fetch(ref)
                except ray.exceptions.RayError as error:
                    raise lost(ray, names[index], error) from error
                yield index, answer
        finally:
            _cancel(ray, list(flying))

    def map(
        self, fn: Callable[[Item], Answer], items: Sequence[Item], *, keys: Sequence[str] | None = None, note: str = ""
    ) -> list[Answer]:
        """As in `contract.Executor`, without a journal."""
        return collect(self.stream(fn, items, keys))

    @contextmanager
    def replicas(self, factory: Callable[[], Callable[[Item], Answer]]) -> Iterator[RawReplicas[Item, Answer]]:
        """As in `raw.RawExecutor`: at most one actor per slot, each created when an item needs it."""
        assert not self._session.replicas_open, "one set of replicas at a time"
        pool: RayReplicas[Item, Answer] = RayReplicas(
            self._session, partial(self._spawn, factory), lambda: self.workers, self._fetch
        )
        self._session.replicas_open = True
        try:
            yield pool
        finally:
            self._session.replicas_open = False
            pool.close()

    def sized(self, resources: Resources) -> RayExecutor:
        """The same Ray for items of another size."""
        return RayExecutor(resources, self._session)

    def close(self) -> None:
        """End the Ray that was started here, for every executor that shares it."""
        self._session.close()

    def _spawn(self, factory: Callable[[], Callable[[Item], Answer]]) -> Any:
        actor = self._session.ray().remote(Replica).options(**self._claims(), max_restarts=0, max_task_retries=0)
        return actor.remote(factory, self.resources.threads)

    def _claims(self) -> dict[str, Any]:
        claims = {"num_cpus": self.resources.cpus, "num_gpus": self.resources.gpus}
        return claims if self.resources.memory_bytes is None else claims | {"memory": self.resources.memory_bytes}

    def _slots(self, machine: Mapping[str, float]) -> int:
        wanted = {"CPU": self.resources.cpus, "GPU": self.resources.gpus, "memory": self.resources.memory_bytes or 0}
        return int(min(machine.get(name, 0) / amount for name, amount in wanted.items() if amount))

    def _fetch(self, ref: Any) -> Any:
        answer, peak = fetch(self._session.ray(), ref)
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak)
        return answer


def _cancel(ray: Any, refs: list[Any]) -> None:
    """End tasks, and see to it that they ended: Ray can miss one that is just on its way to a worker."""
    refs = refs[::-1]  # the queued before the running, whose slots they would take
    for _ in range(_CANCEL_ROUNDS):
        if not refs:
            return
        for ref in refs:
            ray.cancel(ref, force=True)
        _, refs = ray.wait(refs, num_returns=len(refs), timeout=1)
    logger.warning("%d cancelled tasks did not end; they may go on for a while", len(refs))
