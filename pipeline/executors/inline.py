"""Everything in this process, one item after the other: for debugging, for unit tests, and for machines without Ray.

The numbers are those of the Ray executor, bit for bit on a CPU: calls are made with the same number of torch threads.
With `check_pickle` functions, items and answers also make the trip through pickle, so that what works here works there.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from layerwise.pipeline.executors.raw import RawReplicas, Resources, item_names, measured, naming
from layerwise.stages.contract import Answer, Item

Thing = TypeVar("Thing")


class InlineExecutor:
    """The executor that starts nothing.

    Args:
        resources: only the number of threads matters here; memory and devices are those of the process.
        check_pickle: send everything through pickle, as a worker process would get it.
    """

    workers = 1

    def __init__(self, resources: Resources = Resources(), *, check_pickle: bool = False) -> None:  # noqa: B008 (frozen)
        self.resources = resources
        self.check_pickle = check_pickle
        self.peak_rss_bytes = 0
        self._replicas_open = False

    def stream(
        self, fn: Callable[[Item], Answer], items: Sequence[Item], names: Sequence[str] | None = None
    ) -> Generator[tuple[int, Answer], None, None]:
        """As in `raw.RawExecutor`; answers come in the order of the items."""
        assert not self._replicas_open, "the cores belong to the replicas: leave their `with` first"
        fn = self._sent(fn)
        for index, (item, name) in enumerate(zip(items, item_names(items, names), strict=True)):
            with naming(name):
                answer = self._call(fn, item)
            yield index, answer

    @contextmanager
    def replicas(self, factory: Callable[[], Callable[[Item], Answer]]) -> Iterator[RawReplicas[Item, Answer]]:
        """As in `raw.RawExecutor`: one replica."""
        assert not self._replicas_open, "one set of replicas at a time"
        self._replicas_open = True
        try:
            yield _InlineReplica(self._call, self._sent(factory))
        finally:
            self._replicas_open = False

    def sized(self, resources: Resources) -> InlineExecutor:
        """The same for items of another size."""
        return InlineExecutor(resources, check_pickle=self.check_pickle)

    def close(self) -> None:
        """Nothing was started."""

    def _call(self, fn: Callable[[Item], Answer], item: Item) -> Answer:
        answer, peak = measured(fn, self._sent(item), self.resources.threads)
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak)
        return self._sent(answer)

    def _sent(self, thing: Thing) -> Thing:
        if not self.check_pickle:
            return thing
        received: Thing = pickle.loads(pickle.dumps(thing))
        return received


class _InlineReplica(Generic[Item, Answer]):
    def __init__(
        self, call: Callable[[Callable[[Item], Answer], Item], Answer], factory: Callable[[], Callable[[Item], Answer]]
    ) -> None:
        self._call = call
        self._factory = factory
        self._loaded: Callable[[Item], Answer] | None = None

    def stream(
        self, items: Sequence[Item], names: Sequence[str] | None = None
    ) -> Generator[tuple[int, Answer], None, None]:
        for index, (item, name) in enumerate(zip(items, item_names(items, names), strict=True)):
            with naming(name):
                answer = self._call(self._answer, item)
            yield index, answer

    def _answer(self, item: Item) -> Answer:
        answer = self._loaded or self._factory()
        self._loaded = None  # a replica that raises is not used again: nobody knows in which state it was left
        given = answer(item)
        self._loaded = answer
        return given
