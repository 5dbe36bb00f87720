"""Warm worker processes as Ray actors, and the dispatcher that keeps them busy.

A host answers items with whatever callable it is given, one item at a time, and keeps what it loaded until it is given
something else. It outlives the call and the stage, because a fresh process spends seconds on importing torch: a stage
with little to do would spend its time on that. The dispatcher, not Ray, replaces a host that died and sends its item
again, because only it knows which item that was and how often it was tried. Items go to whichever host is idle, in
their order. A host is created when there is an item for it, so few items start few processes; but it gets one only when
it runs. On a cluster that others use too there may be no room for it until they end, and an item that waits for that,
while another host is idle, would have two runs wait for each other for ever.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from layerwise.pipeline.executors.raw import Resources, item_names, measured, naming
from layerwise.pipeline.executors.ray_failures import fetch, lost

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often an item is tried whose hosts die under it."""


class Host:
    """What lives in the actor.

    Args:
        threads: torch threads of each call.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._serial: int | None = None
        self._loaded: Callable[[Any], Any] | None = None

    def ready(self) -> None:
        """Answers as soon as this process runs."""

    def answer(self, serial: int, factory: Callable[[], Callable[[Any], Any]], item: Any) -> tuple[Any, int]:
        """The answer of `factory()`, loaded once per serial, and the peak resident memory of this process in bytes.

        Loading happens at the first item, so a factory that fails raises like a call that fails.
        """

        def call(item: Any) -> Any:
            if self._serial != serial:
                self._loaded = None  # first, so that two models are never held at a time
                self._loaded = factory()
            self._serial = None  # what raises is not used again: nobody knows in which state it was left
            assert self._loaded is not None
            answer = self._loaded(item)
            self._serial = serial
            return answer

        return measured(call, item, self._threads)


@dataclass(frozen=True)
class _Try:
    index: int
    attempt: int


class Hosts:
    """A pool of hosts of one size.

    Args:
        ray: the module, connected.
        resources: what one host occupies.
        limit: the most hosts at a time.
    """

    def __init__(self, ray: Any, resources: Resources, limit: int) -> None:
        self._ray, self.resources, self.limit = ray, resources, limit
        claims = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
        if resources.memory_bytes is not None:
            claims["memory"] = resources.memory_bytes
        self._actor = ray.remote(Host).options(**claims, max_restarts=0, max_task_retries=0)
        self._serial = 0
        self._idle: deque[Any] = deque()
        self._starting: dict[Any, Any] = {}  # by the reference to `ready`; there may be no room for them yet
        self._busy: dict[Any, tuple[_Try, Any]] = {}  # by the reference to the answer

    def publish(self, factory: Callable[[], Callable[[Any], Any]]) -> tuple[int, Any]:
        """Make a factory known to all hosts; the result goes into `stream`."""
        self._serial += 1
        return self._serial, self._ray.put(factory)

    def stream(
        self, published: tuple[int, Any], items: Sequence[Any], names: Sequence[str] | None = None
    ) -> Generator[tuple[int, tuple[Any, int]], None, None]:
        """As in `raw.RawExecutor`, with the peak memory beside each answer; in the order in which they finish."""
        ray, names = self._ray, item_names(items, names)
        waiting = deque(_Try(index, 1) for index in range(len(items)))
        try:
            while waiting or self._busy:
                while waiting and self._idle:
                    tried, host = waiting.popleft(), self._idle.popleft()
                    self._busy[host.answer.remote(*published, items[tried.index])] = (tried, host)
                self._start(len(waiting))
                (ref,), _ = ray.wait([*self._busy, *self._starting], num_returns=1)
                if ref in self._starting:
                    self._started(ref, waiting, names)
                    continue
                tried, host = self._busy.pop(ref)
                try:
                    with naming(names[tried.index]):
                        answer = fetch(ray, ref)
                except ray.exceptions.RayError as error:
                    ray.kill(host)
                    waiting.appendleft(self._again(tried, names, error))
                except Exception:
                    self._idle.append(host)
                    raise
                else:
                    self._idle.append(host)
                    yield tried.index, answer
        finally:
            self._kill_busy()

    def _start(self, wanted: int) -> None:
        """Have as many hosts on their way as there are items for them, within the limit."""
        while len(self._starting) < wanted and len(self._busy) + len(self._starting) < self.limit:
            host = self._actor.remote(self.resources.threads)
            self._starting[host.ready.remote()] = host

    def _started(self, ref: Any, waiting: deque[_Try], names: Sequence[str]) -> None:
        """Take in a host that runs; one that died at its start counts as a try of the item that waited for it."""
        host = self._starting.pop(ref)
        try:
            fetch(self._ray, ref)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(host)
            if waiting:
                waiting.appendleft(self._again(waiting.popleft(), names, error))
        else:
            self._idle.append(host)

    def _again(self, tried: _Try, names: Sequence[str], error: Exception) -> _Try:
        """The next try of an item whose host died under it."""
        name = names[tried.index]
        if tried.attempt == ATTEMPTS:
            raise lost(self._ray, name, error) from error
        logger.info("a process died while working on %s: starting another", name)
        return _Try(tried.index, tried.attempt + 1)

    def close(self) -> None:
        """End every host."""
        self._kill_busy()
        while self._starting:
            self._ray.kill(self._starting.popitem()[1])
        while self._idle:
            self._ray.kill(self._idle.pop())

    def _kill_busy(self) -> None:
        """After a failure nobody waits for the others; a later call starts fresh hosts in their place."""
        while self._busy:
            _, (_, host) = self._busy.popitem()
            self._ray.kill(host)
