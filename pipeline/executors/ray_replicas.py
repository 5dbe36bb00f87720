"""Replicas as Ray actors, and the dispatcher that keeps them busy.

Each replica loads its object once and answers one item at a time. The dispatcher, not Ray, replaces a replica that died
and sends its item again, because only it knows which item that was and how often it was tried. Items go to whichever
replica is idle, in their order. A replica is created when there is an item for it, so few items load few models.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from layerwise.pipeline.executors.raw import collect, item_names, measured, naming
from layerwise.pipeline.executors.ray_failures import lost
from layerwise.pipeline.executors.ray_session import RaySession
from layerwise.stages.contract import Answer, Item

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often an item is tried whose replicas die under it."""


class Replica(Generic[Item, Answer]):
    """What lives in the actor. It loads at the first item, so that a failing factory raises like a failing call."""

    def __init__(self, factory: Callable[[], Callable[[Item], Answer]], threads: int) -> None:
        self._factory = factory
        self._threads = threads
        self._loaded: Callable[[Item], Answer] | None = None

    def answer(self, item: Item) -> tuple[Answer, int]:
        """The answer, and the peak resident memory in bytes of this process."""
        return measured(self._answer, item, self._threads)

    def _answer(self, item: Item) -> Answer:
        if self._loaded is None:
            self._loaded = self._factory()
        return self._loaded(item)


@dataclass(frozen=True)
class _Try:
    index: int
    attempt: int


class RayReplicas(Generic[Item, Answer]):
    """A pool of actors.

    Args:
        session: the Ray to use; started at the first item.
        spawn: starts one actor around a `Replica`.
        limit: gives the most actors at a time.
        fetch: gets an answer, as in `ray_failures.fetch`.
    """

    def __init__(
        self,
        session: RaySession,
        spawn: Callable[[], Any],
        limit: Callable[[], int],
        fetch: Callable[[Any], Answer],
    ) -> None:
        self._session, self._spawn, self._limit, self._fetch = session, spawn, limit, fetch
        self._ray: Any = None
        self._idle: deque[Any] = deque()
        self._busy: dict[Any, tuple[_Try, Any]] = {}  # by the reference to the answer

    def stream(
        self, items: Sequence[Item], names: Sequence[str] | None = None
    ) -> Generator[tuple[int, Answer], None, None]:
        """As in `raw.RawReplicas`; answers come in the order in which they finish."""
        if not items:
            return
        ray = self._ray = self._session.ray()
        limit, names = self._limit(), item_names(items, names)
        waiting = deque(_Try(index, 1) for index in range(len(items)))
        try:
            while waiting or self._busy:
                while waiting and len(self._busy) < limit:
                    self._send(waiting.popleft(), items)
                (ref,), _ = ray.wait(list(self._busy), num_returns=1)
                tried, actor = self._busy.pop(ref)
                try:
                    with naming(names[tried.index]):
                        answer = self._fetch(ref)
                except ray.exceptions.RayError as error:
                    ray.kill(actor)
                    if tried.attempt == ATTEMPTS:
                        raise lost(ray, names[tried.index], error) from error
                    logger.info("a replica died while working on %s: starting another", names[tried.index])
                    waiting.appendleft(_Try(tried.index, tried.attempt + 1))
                except Exception:
                    ray.kill(actor)  # nobody knows in which state it was left
                    raise
                else:
                    self._idle.append(actor)
                    yield tried.index, answer
        finally:
            self._kill_busy()

    def map(self, items: Sequence[Item], *, keys: Sequence[str] | None = None, note: str = "") -> list[Answer]:
        """As in `contract.Replicas`, without a journal."""
        return collect(self.stream(items, keys))

    def close(self) -> None:
        """End every replica."""
        self._kill_busy()
        while self._idle:
            self._ray.kill(self._idle.pop())

    def _send(self, tried: _Try, items: Sequence[Item]) -> None:
        actor = self._idle.popleft() if self._idle else self._spawn()
        self._busy[actor.answer.remote(items[tried.index])] = (tried, actor)

    def _kill_busy(self) -> None:
        """After a failure nobody waits for the others; a later call starts fresh replicas in their place."""
        while self._busy:
            _, (_, actor) = self._busy.popitem()
            self._ray.kill(actor)
