"""The memory of an interrupted stage: answers of finished items on disk, so that none is worked out twice.

An answer is one JSON file, flushed to the device before the next answer is looked at; whatever kills the driver takes
only what was in flight. The file is named after the function and the item's key, because a stage may send the same
units through two functions. A file that cannot be read is a missing answer, never an error. Answers come out of JSON
even when they are new, so that a resumed stage sees exactly what an uninterrupted one saw (lists, not tuples).

Left out: batches. Each answer is its own file and flush, which items of 100 ms and more do not notice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic

from layerwise.pipeline.executors.raw import RawExecutor, gathered
from layerwise.results.durable import publish_file
from layerwise.stages.contract import Answer, Item, Replicas

logger = logging.getLogger(__name__)

_LONGEST_NAME = 120  # characters of a file name, well below every file system's 255 bytes


class JournaledExecutor:
    """What a stage gets as its executor: a raw one, a journal and a progress display.

    Args:
        raw: does the work; closing it stays with the caller.
        folder: where the answers stand. It belongs to one stage with its inputs and parameters (one key), and to one
            driver at a time.
        tmp: for unfinished files, on the same file system.
        progress: `(done, total, note)`, called at the start of each `map` that has a note, and after each
            of its answers.
    """

    def __init__(
        self,
        raw: RawExecutor,
        folder: Path,
        *,
        tmp: Path,
        progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    ) -> None:
        self._raw = raw
        self._folder = folder
        self._tmp = tmp
        self._progress = progress
        self._owners: dict[Path, object] = {}
        self.items_total = 0
        """Items of all `map` calls so far."""
        self.items_cached = 0
        """Those of them whose answer was found."""

    @property
    def workers(self) -> int:
        """How many items run at a time."""
        return self._raw.workers

    @property
    def peak_rss_bytes(self) -> int:
        """The most memory that any process had resident after a call; 0 before the first."""
        return self._raw.peak_rss_bytes

    def map(
        self, fn: Callable[[Item], Answer], items: Sequence[Item], *, keys: Sequence[str] | None = None, note: str = ""
    ) -> list[Answer]:
        """As in `contract.Executor`: with keys, only items without a stored answer are worked on.

        Within a stage a key may meet a function only once, because the same name must mean the same work; functions
        with the same qualified name count as one, whatever a `functools.partial` binds to them.

        Raises:
            Exception: whatever `fn` raised; what was finished before is kept.
            DiskFull: an answer could not be stored.
            TypeError: an answer with a key is not JSON.
        """
        entries = self._entries(fn, keys, owner=object())
        return self._answer(partial(self._raw.stream, fn), items, entries, note)

    @contextmanager
    def replicas(self, factory: Callable[[], Callable[[Item], Answer]]) -> Iterator[Replicas[Item, Answer]]:
        """As in `contract.Executor`; their `map` stores and finds answers as `JournaledExecutor.map` does.

        The same replicas may meet a key again, and then answer from the journal.
        """

        def answer(items: Sequence[Item], keys: Sequence[str] | None, note: str) -> list[Answer]:
            return self._answer(raw.stream, items, self._entries(factory, keys, owner=raw), note)

        def answer_together(parts: Sequence[Any], keys: Sequence[str], calls: int, note: str) -> list[Any]:
            stream = partial(_stream_together, raw.stream, calls)
            return self._answer(stream, parts, self._entries(factory, keys, owner=raw), note)

        with self._raw.replicas(factory) as raw:
            yield _JournaledReplicas(answer, answer_together)

    def _answer(
        self,
        stream: Callable[[Sequence[Item], Sequence[str] | None], Generator[tuple[int, Answer], None, None]],
        items: Sequence[Item],
        entries: Sequence[_Entry] | None,
        note: str,
    ) -> list[Answer]:
        assert entries is None or len(entries) == len(items), "one key per item"
        answers = {} if entries is None else _stored(entries)
        self.items_total += len(items)
        self.items_cached += len(answers)
        self._report(len(answers), len(items), note)
        missing = [index for index in range(len(items)) if index not in answers]
        if missing:
            names = None if entries is None else [entries[index].key for index in missing]
            with closing(stream([items[index] for index in missing], names)) as arriving:
                for position, answer in arriving:
                    index = missing[position]
                    answers[index] = answer if entries is None else entries[index].store(answer)
                    self._report(len(answers), len(items), note)
        return [answers[index] for index in range(len(items))]

    def _report(self, done: int, total: int, note: str) -> None:
        if note:  # without one the stage reports its own progress
            self._progress(done, total, note)

    def _entries(
        self, fn: Callable[..., object], keys: Sequence[str] | None, *, owner: object
    ) -> Sequence[_Entry] | None:
        if keys is None:
            return None
        folder = self._folder / _file_name(_function_name(fn))
        entries = [_Entry(folder / f"{_file_name(key)}.json", key, self._tmp) for key in keys]
        assert len({entry.path for entry in entries}) == len(keys), "two items have the same key"
        for entry in entries:
            known = self._owners.setdefault(entry.path, owner)
            assert known is owner, f"'{entry.key}' was already given to another {_function_name(fn)}"
        return entries


class _JournaledReplicas(Generic[Item, Answer]):
    def __init__(
        self,
        answer: Callable[[Sequence[Item], Sequence[str] | None, str], list[Answer]],
        answer_together: Callable[[Sequence[Any], Sequence[str], int, str], list[Any]],
    ) -> None:
        self._answer, self._answer_together = answer, answer_together

    def map(self, items: Sequence[Item], *, keys: Sequence[str] | None = None, note: str = "") -> list[Answer]:
        return self._answer(items, keys, note)

    def map_together(self, parts: Sequence[Any], *, keys: Sequence[str], calls: int, note: str = "") -> list[Any]:
        return self._answer_together(parts, keys, calls, note)


def _stream_together(
    stream: Callable[[Any, Sequence[str]], Generator[tuple[int, Any], None, None]],
    calls: int,
    parts: Sequence[Any],
    keys: Sequence[str],
) -> Generator[tuple[int, Any], None, None]:
    """The answer of each part, as the items that they were gathered into are answered."""
    items, names = gathered(parts, keys, calls)
    starts = [0, *itertools.accumulate(map(len, items))]
    with closing(stream(items, names)) as arriving:
        for position, answers in arriving:
            assert len(answers) == len(items[position]), "one answer per part"
            yield from enumerate(answers, start=starts[position])


@dataclass(frozen=True)
class _Entry:
    path: Path
    key: str
    tmp: Path

    def load(self) -> dict[str, Any] | None:
        """The stored record, None if there is none that can be used."""
        try:
            record = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            record = None
        if isinstance(record, dict) and record.keys() == {"key", "answer"} and record["key"] == self.key:
            return record
        logger.warning("%s is damaged: working on %s again", self.path, self.key)
        self.path.unlink()
        return None

    def store(self, answer: Any) -> Any:
        """Make the answer durable; gives it as `load` would."""
        text = json.dumps({"key": self.key, "answer": answer})
        publish_file(self.path, text.encode(), self.tmp)
        return json.loads(text)["answer"]


def _stored(entries: Sequence[_Entry]) -> dict[int, Any]:
    records = ((index, entry.load()) for index, entry in enumerate(entries))
    return {index: record["answer"] for index, record in records if record is not None}


def _function_name(fn: Callable[..., object]) -> str:
    while isinstance(fn, partial):
        fn = fn.func
    return getattr(fn, "__qualname__", type(fn).__qualname__)


def _file_name(text: str) -> str:
    """The text itself where it can be a file name; else made safe, with a hash that keeps it apart from others."""
    safe = re.sub(r"[^A-Za-z0-9._-]|^\.", "_", text)[:_LONGEST_NAME]
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
