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
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from layerwise.pipeline.executors.raw import Resources, item_names, measured, naming
from layerwise.pipeline.executors.ray_failures import fetch, lost

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often an item is tried whose hosts die under it."""

LOADINGS = 10
"""How many hosts in a row may die before they have loaded what answers items. That is no fault of an item."""

NOTHING = 0
"""The serial of a host that has loaded nothing."""

_LOOK_SECONDS = 2.0  # how long a Ray that died may go unnoticed


class Host:
    """What lives in the actor.

    Args:
        threads: torch threads of each call.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._loaded: Callable[[Any], Any] | None = None

    def load(self, factory: Callable[[], Callable[[Any], Any]]) -> None:
        """Have `factory()` answer from now on."""

        def load(factory: Callable[[], Callable[[Any], Any]]) -> None:
            self._loaded = None  # first, so that two models are never held at a time
            self._loaded = factory()

        measured(load, factory, self._threads)

    def answer(self, item: Any) -> tuple[Any, int]:
        """The answer of what was loaded, and the peak resident memory of this process in bytes."""
        assert self._loaded is not None
        return measured(self._loaded, item, self._threads)


@dataclass(frozen=True)
class _Try:
    index: int
    attempt: int


@dataclass
class _Slot:
    """A host, and the serial of what it has loaded, or is loading."""

    host: Any
    serial: int = NOTHING


class Hosts:
    """A pool of hosts of one size.

    Args:
        ray: the module, connected.
        resources: what one host occupies.
        limit: the most hosts at a time.
        check: raises if Ray itself died, for then every host did, and Ray says nothing of it for a minute.
    """

    def __init__(self, ray: Any, resources: Resources, limit: int, check: Callable[[], None]) -> None:
        self._ray, self.resources, self.limit, self._check = ray, resources, limit, check
        claims = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
        if resources.memory_bytes is not None:
            claims["memory"] = resources.memory_bytes
        self._actor = ray.remote(Host).options(**claims, max_restarts=0, max_task_retries=0)
        self._serial = NOTHING
        self._died_loading = 0  # in a row
        self._idle: deque[_Slot] = deque()
        self._loading: dict[Any, _Slot] = {}  # by the reference to `load`; there may be no room for them yet
        self._busy: dict[Any, tuple[_Try, _Slot]] = {}  # by the reference to the answer

    def publish(self, factory: Callable[[], Callable[[Any], Any]]) -> tuple[int, Any]:
        """Make a factory known to all hosts; the result goes into `stream`."""
        self._serial += 1
        self._died_loading = 0
        return self._serial, self._ray.put(factory)

    def stream(
        self, published: tuple[int, Any], items: Sequence[Any], names: Sequence[str] | None = None
    ) -> Generator[tuple[int, tuple[Any, int]], None, None]:
        """As in `raw.RawExecutor`, with the peak memory beside each answer; in the order in which they finish."""
        ray, names = self._ray, item_names(items, names)
        waiting = deque(_Try(index, 1) for index in range(len(items)))
        try:
            while waiting or self._busy:
                self._hand_out(waiting, items, published)
                ready, _ = ray.wait([*self._busy, *self._loading], num_returns=1, timeout=_LOOK_SECONDS)
                self._check()
                for ref in ready:
                    if ref in self._loading:
                        self._take_in(ref, published[0], names[waiting[0].index] if waiting else None)
                        continue
                    tried, slot = self._busy.pop(ref)
                    try:
                        with naming(names[tried.index]):
                            answer = fetch(ray, ref)
                    except ray.exceptions.RayError as error:
                        ray.kill(slot.host)
                        waiting.appendleft(self._again(tried, names, error))
                    except Exception:
                        slot.serial = NOTHING  # what raised is not used again: nobody knows how it was left
                        self._idle.append(slot)
                        raise
                    else:
                        self._idle.append(slot)
                        yield tried.index, answer
        finally:
            self._kill_busy()

    def _hand_out(self, waiting: deque[_Try], items: Sequence[Any], published: tuple[int, Any]) -> None:
        """Give items to the hosts that have loaded what answers them, and have others load it, within the limit."""
        serial, factory = published
        loaded = [slot for slot in self._idle if slot.serial == serial]
        for slot in loaded[: len(waiting)]:
            self._idle.remove(slot)
            tried = waiting.popleft()
            self._busy[slot.host.answer.remote(items[tried.index])] = (tried, slot)
        while len(self._loading) < len(waiting) and (self._idle or len(self._busy) + len(self._loading) < self.limit):
            slot = self._idle.popleft() if self._idle else _Slot(self._actor.remote(self.resources.threads))
            slot.serial = serial
            self._loading[slot.host.load.remote(factory)] = slot

    def _take_in(self, ref: Any, serial: int, name: str | None) -> None:
        """A host that runs and has loaded something, or died before that, which is no fault of an item.

        Args:
            ref: to its loading.
            serial: of what is wanted now; it may have been told to load something for a call that has ended.
            name: of the item that waits for it.
        Raises:
            Exception: what it raised while it loaded for that item, as if answering it did.
        """
        slot = self._loading.pop(ref)
        try:
            with naming(name) if name else nullcontext():
                fetch(self._ray, ref)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(slot.host)
            self._died_loading += 1
            again = not isinstance(error, self._ray.exceptions.OutOfMemoryError)  # or it would run out of it again
            if self._died_loading >= (LOADINGS if again else ATTEMPTS):
                raise lost(self._ray, "loading", error) from error
            logger.info("a process died while it was loading: starting another")
        except Exception:
            wanted = slot.serial == serial and name is not None
            slot.serial = NOTHING
            self._idle.append(slot)
            if wanted:
                raise
        else:
            self._died_loading = 0
            self._idle.append(slot)

    def _again(self, tried: _Try, names: Sequence[str], error: Exception) -> _Try:
        """The next try of an item whose host died under it."""
        name = names[tried.index]
        if tried.attempt == ATTEMPTS:
            raise lost(self._ray, f"working on {name}", error) from error
        logger.info("a process died while working on %s: starting another", name)
        return _Try(tried.index, tried.attempt + 1)

    def close(self) -> None:
        """End every host."""
        self._kill_busy()
        while self._loading:
            self._ray.kill(self._loading.popitem()[1].host)
        while self._idle:
            self._ray.kill(self._idle.pop().host)

    def _kill_busy(self) -> None:
        """After a failure nobody waits for the others; a later call starts fresh hosts in their place."""
        while self._busy:
            _, (_, slot) = self._busy.popitem()
            self._ray.kill(slot.host)
