"""Warm worker processes as Ray actors, and the dispatcher that keeps them busy.

A host answers items with whatever callable it is given, one item at a time, and keeps what it loaded until it is given
something else. It outlives the call and the stage, because a fresh process spends seconds on importing torch: a stage
with little to do would spend its time on that. The dispatcher, not Ray, replaces a host that died and sends its item
again, because only it knows which item that was and how often it was tried. Items go to whichever host is idle, in
their order. A host is created when there is an item for it, so few items start few processes.
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
                while waiting and len(self._busy) < self.limit:
                    tried = waiting.popleft()
                    host = self._idle.popleft() if self._idle else self._actor.remote(self.resources.threads)
                    self._busy[host.answer.remote(*published, items[tried.index])] = (tried, host)
                (ref,), _ = ray.wait(list(self._busy), num_returns=1)
                tried, host = self._busy.pop(ref)
                try:
                    with naming(names[tried.index]):
                        answer = fetch(ray, ref)
                except ray.exceptions.RayError as error:
                    ray.kill(host)
                    if tried.attempt == ATTEMPTS:
                        raise lost(ray, names[tried.index], error) from error
                    logger.info("a process died while working on %s: starting another", names[tried.index])
                    waiting.appendleft(_Try(tried.index, tried.attempt + 1))
                except Exception:
                    self._idle.append(host)
                    raise
                else:
                    self._idle.append(host)
                    yield tried.index, answer
        finally:
            self._kill_busy()

    def close(self) -> None:
        """End every host."""
        self._kill_busy()
        while self._idle:
            self._ray.kill(self._idle.pop())

    def _kill_busy(self) -> None:
        """After a failure nobody waits for the others; a later call starts fresh hosts in their place."""
        while self._busy:
            _, (_, host) = self._busy.popitem()
            self._ray.kill(host)
