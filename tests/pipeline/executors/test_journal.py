"""The journal: no answer is worked out twice, and none is believed that cannot be read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import DiskFull
from layerwise.pipeline.executors import journal as journal_module
from layerwise.pipeline.executors.inline import InlineExecutor
from layerwise.pipeline.executors.journal import JournaledExecutor
from layerwise.results.durable import settle_file
from layerwise.results.sealed import sealed

KEYS = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "a/b c"]


class Recorder(InlineExecutor):
    """Counts what reaches the workers, and whether a stream was closed before its end."""

    def __init__(self) -> None:
        super().__init__(check_pickle=True)
        self.sent: list[Any] = []
        self.closed_early = False

    def stream(
        self, fn: Callable[[Any], Any], items: Sequence[Any], names: Sequence[str] | None = None
    ) -> Generator[tuple[int, Any], None, None]:
        self.sent += items
        try:
            yield from super().stream(fn, items, names)
        except GeneratorExit:
            self.closed_early = True
            raise


def pair(number: int) -> Any:
    return {"pair": (number, number + 1), 3: None}


def pair_with(offset: int, number: int) -> Any:
    return pair(number + offset)


def refuse_three(number: int) -> int:
    if number == 3:
        raise ValueError(number)
    return number


def load(folder: Path) -> Callable[[int], int]:
    def call(number: int) -> int:
        (folder / str(len(list(folder.iterdir())))).touch()
        return refuse_three(number)

    return call


def open_journal(folder: Path, **options: Any) -> tuple[JournaledExecutor, Recorder]:
    raw = Recorder()
    return JournaledExecutor(raw, folder / "answers", tmp=folder / "tmp", **options), raw


def test_a_second_attempt_works_on_nothing_and_answers_the_same(tmp_path: Path) -> None:
    first, raw = open_journal(tmp_path)
    answers = first.map(pair, [1, 2, 3], keys=KEYS)
    assert answers == [{"pair": [n, n + 1], "3": None} for n in (1, 2, 3)]  # as JSON gives it, new or found
    assert (raw.sent, first.items_total, first.items_cached) == ([1, 2, 3], 3, 0)
    second, raw = open_journal(tmp_path)
    assert second.map(pair, [1, 2, 3], keys=KEYS) == answers
    assert (raw.sent, second.items_total, second.items_cached) == ([], 3, 3)
    assert not list((tmp_path / "tmp").iterdir())


def test_what_was_finished_before_a_failure_is_kept(tmp_path: Path) -> None:
    first, _ = open_journal(tmp_path)
    with pytest.raises(ValueError) as caught:
        first.map(refuse_three, [1, 2, 3, 4], keys=["a", "b", "c", "d"])
    assert caught.value.__notes__ == ["while working on c"]
    second, raw = open_journal(tmp_path)
    with pytest.raises(ValueError):
        second.map(refuse_three, [1, 2, 3, 4], keys=["a", "b", "c", "d"])
    assert raw.sent == [3, 4]


def test_a_killed_driver_repeats_no_finished_item(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from layerwise.pipeline.executors.inline import InlineExecutor
from layerwise.pipeline.executors.journal import JournaledExecutor
from layerwise.results.durable import settle_file
from layerwise.results.sealed import sealed
folder = Path(sys.argv[1])
def work(number):
    tries = len(list(folder.glob(f"{number}-*")))
    (folder / f"{number}-{tries}").touch()
    if number in (2, 4) and tries == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number
journal = JournaledExecutor(InlineExecutor(), folder / "answers", tmp=folder / "tmp")
print(journal.map(work, list(range(6)), keys=[str(n) for n in range(6)]), journal.items_cached)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    ends = [subprocess.run(command, check=False, capture_output=True, text=True) for _ in range(3)]
    assert [end.returncode for end in ends] == [-9, -9, 0]
    assert ends[-1].stdout == "[0, 1, 4, 9, 16, 25] 4\n"
    tries = sorted(path.name for path in tmp_path.glob("[0-9]-*"))
    assert tries == ["0-0", "1-0", "2-0", "2-1", "3-0", "4-0", "4-1", "5-0"]


@pytest.mark.parametrize(
    "damage",
    [
        *(b"", b'{"key": ', b"\xff\xfe", b"[]", b"null", b'{"answer": 5}'),
        json.dumps({"key": KEYS[1], "answer": 5, "files": {}}).encode(),
        sealed({"key": "other", "answer": 5, "files": {}}),
        sealed({"key": KEYS[1], "answer": 5}),
    ],
)
def test_a_damaged_answer_is_worked_out_again_and_mended(tmp_path: Path, damage: bytes) -> None:
    first, _ = open_journal(tmp_path)
    answers = first.map(pair, [1, 2, 3], keys=KEYS)
    (victim,) = (tmp_path / "answers").rglob(f"{KEYS[1]}.json")
    victim.write_bytes(damage)
    for expected in ([2], []):
        journal, raw = open_journal(tmp_path)
        assert journal.map(pair, [1, 2, 3], keys=KEYS) == answers
        assert raw.sent == expected


def leave_file(folder: Path, number: int) -> int:
    path = folder / "parts" / f"{number}.bin"
    path.parent.mkdir(exist_ok=True)
    (folder / f"{number}.tmp").write_bytes(bytes([number] * 100))
    settle_file(folder / f"{number}.tmp", path)
    return number


def leave_files(folder: Path) -> Callable[[tuple[int, ...]], list[int]]:
    return lambda numbers: [leave_file(folder, number) for number in numbers]


def spoil_one_digit(answer: Path, item: Path) -> None:
    answer.write_text(answer.read_text().replace('"answer": 2', '"answer": 3'))


def spoil_one_bit(answer: Path, item: Path) -> None:
    item.write_bytes(item.read_bytes()[:50] + b"\x03" + item.read_bytes()[51:])


def spoil_the_end(answer: Path, item: Path) -> None:
    item.write_bytes(item.read_bytes()[:-1])


def spoil_by_deleting(answer: Path, item: Path) -> None:
    item.unlink()


@pytest.mark.parametrize("spoil", [spoil_one_digit, spoil_one_bit, spoil_the_end, spoil_by_deleting])
@pytest.mark.parametrize("how", ["map", "replicas", "together"])
def test_an_item_whose_answer_or_file_changed_is_worked_on_again_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path, Path], None], how: str
) -> None:
    items = tmp_path / "items"
    items.mkdir()
    keys = ["a", "b", "c"]

    def work() -> tuple[list[int], int]:
        journal, _ = open_journal(tmp_path, items=items)
        if how == "map":
            answers = journal.map(partial(leave_file, items), [1, 2, 3], keys=keys)
        elif how == "replicas":
            with journal.replicas(partial(partial, leave_file, items)) as replicas:
                answers = replicas.map([1, 2, 3], keys=keys)
        else:
            with journal.replicas(partial(leave_files, items)) as replicas:
                answers = replicas.map_together([1, 2, 3], keys=keys, calls=3)
        assert sorted(path.name for path in journal.files) == ["1.bin", "2.bin", "3.bin"]
        return answers, journal.items_cached

    assert work() == ([1, 2, 3], 0)
    assert work() == ([1, 2, 3], 3)
    assert not caplog.records
    item = items / "parts" / "2.bin"
    (answer,) = (tmp_path / "answers").rglob("b.json")
    spoil(answer, item)
    assert work() == ([1, 2, 3], 2)
    assert item.read_bytes() == bytes([2] * 100)
    (record,) = caplog.records
    assert str(answer) in record.getMessage()
    assert "working on b again" in record.getMessage()
    assert work() == ([1, 2, 3], 3)


def test_an_answer_is_stored_before_the_next_one_is_looked_at(tmp_path: Path) -> None:
    stored = []

    def count(done: int, total: int, note: str) -> None:
        stored.append((done, len(list((tmp_path / "answers").rglob("*.json")))))

    open_journal(tmp_path, progress=count)[0].map(pair, [1, 2, 3], keys=KEYS, note="units")
    assert stored == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_progress_starts_with_what_was_found_and_needs_a_note(tmp_path: Path) -> None:
    open_journal(tmp_path)[0].map(pair, [1, 2], keys=KEYS[:2])
    calls: list[tuple[int, int, str]] = []
    journal, _ = open_journal(tmp_path, progress=lambda *call: calls.append(call))
    journal.map(pair, [1, 2, 3], keys=KEYS, note="units")
    assert calls == [(2, 3, "units"), (3, 3, "units")]
    journal.map(pair, [1], note="")
    assert len(calls) == 2


def test_without_keys_nothing_is_stored_and_answers_stay_as_they_are(tmp_path: Path) -> None:
    journal, _ = open_journal(tmp_path)
    assert journal.map(pair, [1]) == [{"pair": (1, 2), 3: None}]
    assert not (tmp_path / "answers").exists()


def test_the_same_keys_may_go_through_two_functions(tmp_path: Path) -> None:
    for _ in range(2):
        journal, _ = open_journal(tmp_path)
        assert journal.map(refuse_three, [1], keys=["a"]) == [1]
        assert journal.map(pair, [1], keys=["a"]) == [{"pair": [1, 2], "3": None}]


def test_one_name_for_two_pieces_of_work_is_refused(tmp_path: Path) -> None:
    journal, _ = open_journal(tmp_path)
    with pytest.raises(AssertionError, match="same key"):
        journal.map(pair, [1, 2], keys=["a", "a"])
    journal.map(partial(pair_with, 1), [1], keys=["a"])
    with pytest.raises(AssertionError, match="'a' was already given to another pair_with"):
        journal.map(partial(pair_with, 2), [1], keys=["a"])
    with pytest.raises(AssertionError, match="one key per item"):
        journal.map(pair, [1, 2], keys=["b"])


def test_an_answer_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="JSON"):
        open_journal(tmp_path)[0].map(bytes, [1], keys=["a"])


def test_a_full_disk_stops_the_work_and_keeps_what_was_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = journal_module.publish_file

    def full_at_the_second(path: Path, data: bytes, tmp: Path) -> bool:
        if path.name == f"{KEYS[1]}.json":
            raise DiskFull("no space")
        return publish(path, data, tmp)

    journal, raw = open_journal(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(DiskFull):
        patch.setattr(journal_module, "publish_file", full_at_the_second)
        journal.map(pair, [1, 2, 3], keys=KEYS)
    assert raw.closed_early
    again, raw = open_journal(tmp_path)
    again.map(pair, [1, 2, 3], keys=KEYS)
    assert raw.sent == [2, 3]


def test_replicas_answer_from_the_journal_too(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()
    for attempt in range(2):
        journal = JournaledExecutor(InlineExecutor(), tmp_path / "answers", tmp=tmp_path / "tmp")
        with journal.replicas(partial(load, calls)) as replicas:
            assert replicas.map([1, 2], keys=["a", "b"]) == [1, 2]
            assert replicas.map([2, 4], keys=["b", "c"]) == [2, 4]  # the same candidate again
            assert replicas.map([5]) == [5]
        assert (journal.items_total, journal.items_cached) == (5, 1 if attempt == 0 else 4)
    assert len(list(calls.iterdir())) == 4 + 1


class Sums:
    """Answers several numbers at once with what each makes with the first of them, and remembers what it was given."""

    given: ClassVar[list[tuple[int, ...]]] = []

    def __call__(self, numbers: tuple[int, ...]) -> list[int]:
        Sums.given.append(numbers)
        return [10 * number for number in numbers]


def test_answers_that_were_worked_out_together_are_found_however_many_calls_there_are_then(tmp_path: Path) -> None:
    Sums.given.clear()
    keys = ["a", "b", "c", "d", "e"]
    journal, _ = open_journal(tmp_path)
    with journal.replicas(Sums) as replicas:
        assert replicas.map_together([1, 2, 3], keys=keys[:3], calls=2) == [10, 20, 30]
    journal, _ = open_journal(tmp_path)
    with journal.replicas(Sums) as replicas:
        assert replicas.map_together([1, 2, 3, 4, 5], keys=keys, calls=1) == [10, 20, 30, 40, 50]
        assert replicas.map_together([5, 1], keys=["e", "a"], calls=7) == [50, 10]
    assert Sums.given == [(1,), (2, 3), (4, 5)]
    assert (journal.items_total, journal.items_cached) == (7, 5)


def test_two_sets_of_replicas_do_not_share_a_key(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()
    journal, _ = open_journal(tmp_path)
    with journal.replicas(partial(load, calls)) as replicas:
        replicas.map([1], keys=["a"])
    with journal.replicas(partial(load, calls)) as replicas, pytest.raises(AssertionError, match="already"):
        replicas.map([2], keys=["a"])


@given(st.lists(st.text(max_size=160), unique=True, max_size=6))
def test_every_key_has_a_file_name_of_its_own(keys: list[str]) -> None:
    names = [journal_module._file_name(key) for key in keys]
    assert len(set(names)) == len(keys)
    for name in names:
        assert Path(name).name == name and not name.startswith(".") and len(name) < 200 and name.isascii()


def test_names_of_units_stay_readable_on_disk() -> None:
    assert journal_module._file_name(KEYS[0]) == KEYS[0]
