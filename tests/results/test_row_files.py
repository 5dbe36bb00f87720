"""Rows come back as they were written, from one file or the other, or are said to be missing."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerwise.results.store import Store

KEY = "ab" * 32
ROWS = [[{"candidate": f"{batch}-{row}", "fitness": 0.5 + row} for row in range(4)] for batch in range(3)]
WHOLE = [row["candidate"] for batch in ROWS for row in batch]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = Store.open(tmp_path / "results", create=True)
    for number, rows in enumerate(ROWS):
        append(store, rows, 4 * number)
    return store.root


def append(store: Store, rows: Sequence[dict[str, object]], first: int) -> bool:
    where = {"run_id": "r1", "stage": "search", "stage_key": KEY, "attempt": 1}
    return store.append("candidates", rows, **where, first_seq=first)  # type: ignore[arg-type]


def files(root: Path, tree: str = "tables") -> list[Path]:
    return sorted((root / tree).rglob("*.parquet"))


def candidates(store: Store) -> list[str]:
    return [row["candidate"] for row in store.rows("candidates")]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = random.Random(len(data)).randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


SPOIL = [flip, cut, empty, Path.unlink]


@pytest.mark.parametrize("spoil", SPOIL)
def test_what_is_damaged_or_missing_is_read_from_its_copy_and_put_back_by_whoever_writes(
    root: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    victim, before = files(root)[1], [path.read_bytes() for path in files(root)]
    spoil(victim)
    assert candidates(Store.open(root)) == WHOLE
    assert [str(damage.path) for damage in Store.open(root).files.damages()] == [str(victim)]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(str(victim)) and told.endswith("its copy is read")
    assert candidates(Store.open(root, create=True)) == WHOLE
    assert [path.read_bytes() for path in files(root)] == before
    assert "put back from its copy" in caplog.records[-1].getMessage()
    assert not list(Store.open(root).files.damages())


@pytest.mark.parametrize("spoil", SPOIL)
def test_a_copy_that_is_damaged_or_missing_is_made_again(root: Path, spoil: Callable[[Path], None]) -> None:
    spoil(files(root, "copies")[1])
    assert len(list(Store.open(root).files.damages())) == 1
    assert candidates(Store.open(root)) == WHOLE
    Store.open(root, create=True).files.mend("r1")
    assert [path.read_bytes() for path in files(root, "copies")] == [path.read_bytes() for path in files(root)]
    assert not list(Store.open(root).files.damages())


@pytest.mark.parametrize("tree", ["tables", "copies"])
def test_a_deleted_table_comes_back(root: Path, tree: str) -> None:
    before = [path.read_bytes() for path in files(root)]
    shutil.rmtree(root / tree)
    assert candidates(Store.open(root)) == WHOLE
    Store.open(root, create=True).files.mend("r1")
    for each in ("tables", "copies"):
        assert [path.read_bytes() for path in files(root, each)] == before


def test_rows_of_which_both_files_are_lost_are_told_missed_and_can_be_written_again(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counts = {"candidates": 12, "units": 0}
    assert Store.open(root).holds(KEY, counts)
    flip(files(root)[1])
    flip(files(root, "copies")[1])
    store = Store.open(root, create=True)
    assert candidates(store) == WHOLE[:4] + WHOLE[8:]
    (told,) = [record.getMessage() for record in caplog.records]
    assert "its rows are missing" in told
    assert [damage.lost for damage in store.files.damages()] == [True, True]
    assert not store.holds(KEY, counts)
    assert [append(store, rows, 4 * number) for number, rows in enumerate(ROWS)] == [False, True, False]
    assert candidates(store) == WHOLE
    assert store.holds(KEY, counts)
    assert not list(store.files.damages())
    assert len(list((root / "quarantine").iterdir())) == 2


def test_what_is_no_file_of_ours_is_passed_over_and_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = files(root)[0].parent
    (folder / "notes.txt").write_text("mine")
    (folder / "no.parquet").write_bytes(b"PAR1 but no more")
    pq.write_table(pa.table({"city": ["Bonn"]}), folder / "cities.parquet")
    pq.write_table(pa.table({"candidate": [[1]], "seq": ["x"]}), folder / "types.parquet")
    (folder.parent / "stray.parquet").write_bytes(b"")
    (folder.parent / "run=r2").write_bytes(b"")
    make_a_folder_here = folder / "folder.parquet"
    make_a_folder_here.mkdir()
    os.mkfifo(folder / "pipe.parquet")
    assert candidates(Store.open(root)) == WHOLE
    named = {Path(record.getMessage().split()[0]).name for record in caplog.records}
    assert named == {"no.parquet", "cities.parquet", "types.parquet", "folder.parquet", "pipe.parquet"}
    found = {damage.path.name for damage in Store.open(root).files.damages()}
    assert found == named


@pytest.mark.parametrize("spoil", [make_a_folder, make_a_pipe])
def test_what_took_the_place_of_a_file_is_no_obstacle(root: Path, spoil: Callable[[Path], None]) -> None:
    spoil(files(root)[1])
    assert candidates(Store.open(root)) == WHOLE
    assert candidates(Store.open(root, create=True)) == WHOLE
    assert not list(Store.open(root).files.damages())


def test_a_file_without_a_checksum_is_read_if_it_can_be(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As layerwise before the checksums left them."""
    for path in files(root):
        path.rename(path.with_name(path.name.split(".")[0] + ".parquet"))
    shutil.rmtree(root / "copies")
    assert candidates(Store.open(root)) == WHOLE
    assert not list(Store.open(root).files.damages())
    assert Store.open(root).holds(KEY, {"candidates": 12})
    assert not append(Store.open(root, create=True), ROWS[1], 4)
    cut(files(root)[1])
    assert candidates(Store.open(root)) == WHOLE[:4] + WHOLE[8:]
    assert "cannot be read" in caplog.records[-1].getMessage()


def test_pages_carry_checksums_for_readers_without_layerwise(root: Path) -> None:
    """A flip in the middle of the file, where the data stand, is noticed by pyarrow alone."""
    path = files(root)[0]
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.ParquetFile(path, page_checksum_verification=True).read()
