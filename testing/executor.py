"""An executor that remembers answers, counts work and can be interrupted, all in this process.

It is to stages what the pipeline's is (functions, items and answers make the trip through pickle, keyed answers through
JSON), so that a stage that keeps its promises here keeps them on a cluster.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from layerwise.stages.contract import Answer, Item, Replicas
from layerwise.testing.promises import demand


class Interrupted(BaseException):
    """Ends a stage in the middle, as a signal would."""


@dataclass
class Journal:
    """What survives an interruption.

    Args:
        answers: by function and key, as JSON.
        worked: how often each was worked out.
    """

    answers: dict[tuple[str, str], str] = field(default_factory=dict)
    worked: dict[tuple[str, str], int] = field(default_factory=dict)


class RecordingExecutor:
    """One item after the other.

    Args:
        journal: of the stage.
        until: raise Interrupted once so many new answers have been stored.
        workers: what it says of itself.
    """

    def __init__(self, journal: Journal, until: int | None = None, workers: int = 2) -> None:
        self.journal, self.workers = journal, workers
        self._left = until
        self._owners: dict[tuple[str, str], object] = {}

    def map(
        self, fn: Callable[[Item], Answer], items: Sequence[Item], *, keys: Sequence[str] | None = None, note: str = ""
    ) -> list[Answer]:
        """As of `layerwise.stages.contract.Executor`."""
        sent = _sent(fn)
        return self._answers(lambda parts: [sent(part) for part in parts], fn, items, keys, calls=None, owner=object())

    @contextmanager
    def replicas(self, factory: Callable[[], Callable[[Item], Answer]]) -> Iterator[Replicas[Item, Answer]]:
        """As of `layerwise.stages.contract.Executor`."""
        replica = _Replica(self, factory)
        try:
            yield replica
        finally:
            replica.unload()

    def _answers(
        self,
        work: Callable[[Sequence[Any]], list[Any]],
        fn: Callable[..., object],
        items: Sequence[Any],
        keys: Sequence[str] | None,
        *,
        calls: int | None,
        owner: object,
    ) -> list[Any]:
        """Answers in the order of the items; those without one are worked on, gathered into calls or one by one."""
        if keys is None:
            return [_sent(answer) for item in items for answer in work([_sent(item)])]
        names = [(_name(fn), key) for key in keys]
        demand(len(names) == len(items), f"{_name(fn)} gets {len(items)} items and {len(names)} keys")
        demand(len(set(names)) == len(names), f"{_name(fn)} gets two items of one key")
        for name in names:
            demand(self._owners.setdefault(name, owner) is owner, f"{name[0]} meets the key {name[1]} again")
        missing = [number for number, name in enumerate(names) if name not in self.journal.answers]
        size = 1 if calls is None else max(1, -(-len(missing) // calls))
        for start in range(0, len(missing), size):
            numbers = missing[start : start + size]
            answers = work([_sent(items[number]) for number in numbers])
            for number, answer in zip(numbers, answers, strict=True):
                self._store(names[number], _sent(answer))
        return [json.loads(self.journal.answers[name]) for name in names]

    def _store(self, name: tuple[str, str], answer: Any) -> None:
        self.journal.answers[name] = json.dumps(answer)
        self.journal.worked[name] = self.journal.worked.get(name, 0) + 1
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                raise Interrupted


class _Replica:
    """The one replica; it is loaded when there is something to do."""

    def __init__(self, executor: RecordingExecutor, factory: Callable[[], Callable[[Any], Any]]) -> None:
        self._executor, self._factory = executor, factory
        self._loaded: Callable[[Any], Any] | None = None

    def map(self, items: Sequence[Any], *, keys: Sequence[str] | None = None, note: str = "") -> list[Any]:
        return self._executor._answers(
            lambda parts: [self._call(part) for part in parts], self._factory, items, keys, calls=None, owner=self
        )

    def map_together(self, parts: Sequence[Any], *, keys: Sequence[str], calls: int, note: str = "") -> list[Any]:
        return self._executor._answers(
            lambda some: list(self._call(tuple(some))), self._factory, parts, keys, calls=calls, owner=self
        )

    def unload(self) -> None:
        """Let go of what was loaded, which may be a model: the executor remembers its replicas, and they it."""
        self._loaded = None

    def _call(self, item: Any) -> Any:
        if self._loaded is None:
            self._loaded = _sent(self._factory)()
        return self._loaded(item)


def _sent(thing: Any) -> Any:
    """As a worker would get it."""
    return pickle.loads(pickle.dumps(thing))


def _name(fn: Callable[..., object]) -> str:
    while isinstance(fn, partial):
        fn = fn.func
    return getattr(fn, "__qualname__", type(fn).__qualname__)
