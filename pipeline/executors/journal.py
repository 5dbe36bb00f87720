"""The memory of an interrupted stage: answers of finished items on disk, so that none is worked out twice.

An answer is one JSON file, flushed to the device before the next answer is looked at; whatever kills the driver takes
only what was in flight. The file is named after the function and the item's key, because a stage may send the same
units through two functions. It is sealed, and it holds the digests of the files that the item left beside its answer,
taken where it was worked on. What does not fit is a missing answer, never an error. Answers come out of JSON even when
they are new, so that a resumed stage sees exactly what an uninterrupted one saw (lists, not tuples).

Left out: batches. Each answer is its own file and flush, which items of 100 ms and more do not notice.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic

from layerwise.pipeline.artifacts import file_sha256
from layerwise.pipeline.executors.raw import RawExecutor, gathered
from layerwise.results.durable import publish_file, settled_files
from layerwise.results.sealed import Damaged, sealed, unsealed
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
        items: the folder in which items leave files, by `durable.settle_file`; None if they leave none.
        progress: `(done, total, note)`, called at the start of each `map` that has a note, and after each
            of its answers.
    """

    def __init__(
        self,
        raw: RawExecutor,
        folder: Path,
        *,
        tmp: Path,
        items: Path | None = None,
        progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    ) -> None:
        self._raw = raw
        self._folder = folder
        self._tmp = tmp
        self._items = items
        self._progress = progress
        self._owners: dict[Path, object] = {}
        self.items_total = 0
        """Items of all `map` calls so far."""
        self.items_cached = 0
        """Those of them whose answer was found."""
        self.files: dict[Path, str] = {}
        """SHA-256 of the files that items left."""

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
        call = fn if entries is None else partial(_with_files, fn, self._items)
        return self._answer(partial(self._raw.stream, call), items, entries, note)

    @contextmanager
    def replicas(self, factory: Callable[[], Callable[[Item], Answer]]) -> Iterator[Replicas[Item, Answer]]:
        """As in `contract.Executor`; their `map` stores and finds answers as `JournaledExecutor.map` does.

        The same replicas may meet a key again, and then answer from the journal.
        """

        def answer(items: Sequence[Item], keys: Sequence[str] | None, note: str) -> list[Answer]:
            entries = self._entries(factory, keys, owner=raw)
            return self._answer(raw.stream if entries else partial(_plain, raw.stream), items, entries, note)

        def answer_together(parts: Sequence[Any], keys: Sequence[str], calls: int, note: str) -> list[Any]:
            stream = partial(_stream_together, raw.stream, calls)
            return self._answer(stream, parts, self._entries(factory, keys, owner=raw), note)

        with self._raw.replicas(partial(_noting_files, factory, self._items)) as raw:
            yield _JournaledReplicas(answer, answer_together)

    def _answer(
        self,
        stream: Callable[[Any, Any], Generator[tuple[int, Any], None, None]],  # of answers with their files, if keyed
        items: Sequence[Item],
        entries: Sequence[_Entry] | None,
        note: str,
    ) -> list[Answer]:
        assert entries is None or len(entries) == len(items), "one key per item"
        answers = {} if entries is None else self._stored(entries)
        self.items_total += len(items)
        self.items_cached += len(answers)
        self._report(len(answers), len(items), note)
        missing = [index for index in range(len(items)) if index not in answers]
        if missing:
            names = None if entries is None else [entries[index].key for index in missing]
            with closing(stream([items[index] for index in missing], names)) as arriving:
                for position, answer in arriving:
                    index = missing[position]
                    answers[index] = answer if entries is None else self._store(entries[index], *answer)
                    self._report(len(answers), len(items), note)
        return [answers[index] for index in range(len(items))]

    def _stored(self, entries: Sequence[_Entry]) -> dict[int, Any]:
        answers = {}
        for index, entry in enumerate(entries):
            record = entry.load()
            if record is not None:
                answers[index] = record["answer"]
                self.files |= entry.paths(record["files"])
        return answers

    def _store(self, entry: _Entry, answer: Any, files: Files) -> Any:
        self.files |= entry.paths(files)
        return entry.store(answer, files)

    def _report(self, done: int, total: int, note: str) -> None:
        if note:  # without one the stage reports its own progress
            self._progress(done, total, note)

    def _entries(
        self, fn: Callable[..., object], keys: Sequence[str] | None, *, owner: object
    ) -> Sequence[_Entry] | None:
        if keys is None:
            return None
        folder = self._folder / _file_name(_function_name(fn))
        entries = [_Entry(folder / f"{_file_name(key)}.json", key, self._tmp, self._items) for key in keys]
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
        for position, (answers, files) in arriving:
            assert len(answers) == len(items[position]), "one answer per part"
            yield from enumerate([(answer, files) for answer in answers], start=starts[position])


Files = Mapping[str, str]
"""SHA-256 of the files that an item left, by their path in the folder of items."""


def _with_files(fn: Callable[[Item], Answer], folder: Path | None, item: Item) -> tuple[Answer, Files]:
    """Where the work happens: the answer, and what was written for it."""
    with settled_files() as paths:
        answer = fn(item)
    names = {path: path.relative_to(folder).as_posix() for path in paths if folder and path.is_relative_to(folder)}
    return answer, {name: file_sha256(path) for path, name in names.items()}


def _noting_files(
    factory: Callable[[], Callable[[Item], Answer]], folder: Path | None
) -> Callable[[Item], tuple[Answer, Files]]:
    return partial(_with_files, factory(), folder)


def _plain(
    stream: Callable[[Any, Any], Generator[tuple[int, Any], None, None]], items: Any, names: Any
) -> Generator[tuple[int, Any], None, None]:
    """Answers without the files, for which nobody asks who gave no keys."""
    with closing(stream(items, names)) as arriving:
        for position, (answer, _) in arriving:
            yield position, answer


def read_answer(path: Path, items: Path | None) -> dict[str, Any]:
    """The record in a file of the journal: `key`, `answer` and `files`.

    Args:
        path: the file.
        items: the folder in which items leave files.
    Raises:
        Damaged: the record, or a file that it names, is not what was written.
        FileNotFoundError: there is no such record.
    """
    record = unsealed(path.read_bytes())
    if record.keys() != {"key", "answer", "files"}:
        raise Damaged("it is no answer")
    for name, sha256 in record["files"].items():
        file = (items or path.parent) / name
        if not file.is_file():
            raise Damaged(f"its file {name} is missing")
        if file_sha256(file) != sha256:
            raise Damaged(f"the checksum of its file {name} differs")
    return record


@dataclass(frozen=True)
class _Entry:
    path: Path
    key: str
    tmp: Path
    items: Path | None

    def load(self) -> dict[str, Any] | None:
        """The stored record, None if there is none that can be used."""
        try:
            record = read_answer(self.path, self.items)
            if record["key"] != self.key:
                raise Damaged("it is another item's")
        except FileNotFoundError:
            return None
        except (Damaged, OSError) as error:
            logger.warning("%s is damaged (%s): working on %s again", self.path, error, self.key)
            self.path.unlink()
            return None
        return record

    def paths(self, files: Files) -> dict[Path, str]:
        """The files' digests by where they stand."""
        return {(self.items or self.path.parent) / name: sha256 for name, sha256 in files.items()}

    def store(self, answer: Any, files: Files) -> Any:
        """Make the answer durable; gives it as `load` would."""
        data = sealed({"key": self.key, "answer": answer, "files": files})
        publish_file(self.path, data, self.tmp)
        return unsealed(data)["answer"]


def _function_name(fn: Callable[..., object]) -> str:
    while isinstance(fn, partial):
        fn = fn.func
    return getattr(fn, "__qualname__", type(fn).__qualname__)


def _file_name(text: str) -> str:
    """The text itself where it can be a file name; else made safe, with a hash that keeps it apart from others."""
    safe = re.sub(r"[^A-Za-z0-9._-]|^\.", "_", text)[:_LONGEST_NAME]
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
