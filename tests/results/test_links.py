"""Opening and writing where somebody else may have been before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layerwise.errors import StoreError
from layerwise.results.durable import publish_file, replace_file
from layerwise.results.links import open_plain, refuse_links, refuse_links_below, unfinished

WRITE = os.O_WRONLY | os.O_CREAT | os.O_APPEND


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What must stay as it is."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    return tmp_path / "outside" / "file"


@pytest.mark.parametrize("flags", [WRITE, os.O_RDONLY])
def test_what_is_no_plain_file_is_not_opened(tmp_path: Path, outside: Path, flags: int) -> None:
    link, dangling, pipe = tmp_path / "link", tmp_path / "dangling", tmp_path / "pipe"
    link.symlink_to(outside)
    dangling.symlink_to(tmp_path / "new")
    os.mkfifo(pipe)
    for path in (link, dangling, pipe):
        with pytest.raises(StoreError, match=str(path)):
            open_plain(path, flags)
    assert not (tmp_path / "new").exists()


def test_a_file_with_a_second_name_is_read_and_not_written(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "name").hardlink_to(outside)
    os.close(open_plain(tmp_path / "name", os.O_RDONLY))
    with pytest.raises(StoreError, match="has a second name elsewhere"):
        open_plain(tmp_path / "name", WRITE)


def test_every_part_of_the_way_is_looked_at_but_not_what_the_user_named(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "root").symlink_to(outside.parent)  # the results folder itself
    root = tmp_path / "root"
    refuse_links(root, root / "a" / "b")
    refuse_links(root, tmp_path / "other" / "b")
    (root / "a").symlink_to(tmp_path)
    for path in (root / "a", root / "a" / "b", root / "a" / "b" / "c"):
        with pytest.raises(StoreError, match=f"{root / 'a'} is a link to {tmp_path}, where layerwise would write"):
            refuse_links(root, path)
    with pytest.raises(StoreError, match="a is a link"):
        refuse_links_below(root)


@pytest.mark.parametrize("write", [publish_file, replace_file])
@pytest.mark.parametrize("place", ["tmp", "folder", "folder/file"])
def test_a_durable_file_goes_through_no_link(tmp_path: Path, outside: Path, write: object, place: str) -> None:
    root = tmp_path / "root"
    (root / place).parent.mkdir(parents=True)
    (root / place).symlink_to(outside if place.endswith("file") else outside.parent)
    with pytest.raises(StoreError, match=f"{root / place} is a link"):
        write(root / "folder" / "file", b"new", root / "tmp")  # type: ignore[operator]
    assert [path.name for path in outside.parent.iterdir()] == ["file"]
    assert outside.read_text() == "mine"


def test_an_unfinished_file_has_a_name_of_its_own_and_is_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / f"{'u' * 230}.safetensors"
    with unfinished(path) as first, unfinished(path) as second:
        assert first != second
        assert first.parent == path.parent
        first.write_text("a")
        first.rename(path)
    assert list(tmp_path.iterdir()) == [path]
