"""Artifacts: whole or absent, never silently wrong; digests that are never stale; locks that are held."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import CorruptArtifact
from layerwise.pipeline.artifacts import MANIFEST, ArtifactStore, FileDigests, canonical, digest_of, locked
from layerwise.results.sealed import sealed

KEY = "ab" * 32
MATERIAL = {"uses": "compress", "with": {"bits": [3, 4]}}

documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


def publish(root: Path, key: str = KEY, **contents: bytes) -> ArtifactStore:
    """A store with one artifact of some files; `__` in a name stands for a folder."""
    store = ArtifactStore(root)
    out = store.work(key) / "out"
    for name, data in (contents or {"a.json": b"[1, 2]", "units__b.bin": bytes(1000)}).items():
        path = out / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    store.publish(key, out, MATERIAL)
    return store


def rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def test_what_was_published_is_found_by_any_process_that_comes_later(tmp_path: Path) -> None:
    assert ArtifactStore(tmp_path).find(KEY) is None
    publish(tmp_path)
    found = ArtifactStore(tmp_path).find(KEY)
    assert found is not None
    assert (found.key, found.folder, found.material) == (KEY, tmp_path / "artifacts" / "ab" / KEY, MATERIAL)
    assert (found.folder / "units" / "b.bin").read_bytes() == bytes(1000)
    assert json.loads((found.folder / MANIFEST).read_bytes())["files"]["a.json"] == {
        "size": 6,
        "sha256": hashlib.sha256(b"[1, 2]").hexdigest(),
    }


def test_the_digest_says_what_is_in_it_and_not_who_made_it(tmp_path: Path) -> None:
    digests = {
        ArtifactStore(tmp_path).find(key).digest  # type: ignore[union-attr]  # just published
        for key, data in (("11" * 32, b"same"), ("22" * 32, b"same"), ("33" * 32, b"else"))
        if publish(tmp_path, key, a=data)
    }
    assert len(digests) == 2


def test_published_files_are_read_only_and_who_comes_second_changes_nothing(tmp_path: Path) -> None:
    publish(tmp_path, a=b"first")
    store = publish(tmp_path, a=b"other")
    path = store.folder(KEY) / "a"
    assert path.read_bytes() == b"first"
    assert path.stat().st_mode & 0o222 == 0
    assert not (store.work(KEY) / "out").exists()


def spoil_truncated(folder: Path) -> None:
    rewrite(folder / "units" / "b.bin", bytes(999))


def spoil_same_size(folder: Path) -> None:
    rewrite(folder / "units" / "b.bin", bytes(500) + b"\x01" + bytes(499))


def spoil_missing(folder: Path) -> None:
    (folder / "units" / "b.bin").unlink()


def spoil_with_time_put_back(folder: Path) -> None:
    path = folder / "units" / "b.bin"
    before = path.stat()
    rewrite(path, bytes(999) + b"\x01")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_truncated, r"units/b\.bin has 999 bytes, 1,000 were written"),
        (spoil_same_size, r"units/b\.bin is not what was written: its checksum differs"),
        (spoil_with_time_put_back, r"units/b\.bin is not what was written: its checksum differs"),
        (spoil_missing, r"units/b\.bin is missing"),
    ],
)
@pytest.mark.parametrize("seen_before", [True, False])
def test_a_spoiled_file_is_noticed_and_named(tmp_path: Path, spoil: Any, message: str, seen_before: bool) -> None:
    store = publish(tmp_path)
    assert store.find(KEY)
    time.sleep(0.02)  # file systems tell times apart that are a tick of the kernel away
    spoil(store.folder(KEY))
    with pytest.raises(CorruptArtifact, match=message):
        (store if seen_before else ArtifactStore(tmp_path)).find(KEY)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", "null", "7"),
        '{"files": {}}',
        '{"files": [], "material": {}}',
        '{"files": {"a": 1}, "material": {}}',
        '{"files": {"a": {"size": 6}}, "material": {}}',
        *(sealed(manifest).decode() for manifest in ({"files": {"a": 1}, "material": {}}, {"files": {}})),
    ],
)
def test_a_damaged_manifest_is_a_damaged_artifact(tmp_path: Path, text: str) -> None:
    store = publish(tmp_path)
    rewrite(store.folder(KEY) / MANIFEST, text.encode())
    with pytest.raises(CorruptArtifact, match=r"manifest\.json cannot be read"):
        store.find(KEY)


def test_a_digit_changed_in_a_manifest_is_noticed(tmp_path: Path) -> None:
    store = publish(tmp_path)
    path = store.folder(KEY) / MANIFEST
    rewrite(path, path.read_bytes().replace(b"3,", b"5,"))
    with pytest.raises(CorruptArtifact, match="its checksum differs"):
        store.find(KEY)


def test_a_file_of_an_item_that_changed_before_it_was_published_is_refused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    out, items = store.work(KEY) / "out", store.work(KEY) / "items"
    for folder in (out, items):
        folder.mkdir(parents=True)
    (items / "part").write_bytes(b"written")
    made = {items / "part": hashlib.sha256(b"written").hexdigest()}
    (out / "part").hardlink_to(items / "part")
    rewrite(items / "part", b"rotten!")
    with pytest.raises(CorruptArtifact, match="part is not what was written") as caught:
        store.publish(KEY, out, MATERIAL, made)
    assert caught.value.hint
    rewrite(items / "part", b"written")
    assert store.publish(KEY, out, MATERIAL, made)


def test_a_folder_without_a_manifest_is_a_damaged_artifact(tmp_path: Path) -> None:
    store = publish(tmp_path)
    (store.folder(KEY) / MANIFEST).unlink()
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        store.find(KEY)


def test_a_quarantined_artifact_is_gone_from_its_place_as_often_as_needed(tmp_path: Path) -> None:
    places = [publish(tmp_path).quarantine(KEY) for _ in range(2)]
    assert len(set(places)) == 2
    assert all((place / "a.json").is_file() for place in places)
    assert ArtifactStore(tmp_path).find(KEY) is None


def test_files_are_hashed_once_as_long_as_they_do_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    hashed: list[str] = []
    real = hashlib.file_digest

    def file_digest(stream: Any, name: str) -> Any:
        hashed.append(stream.name)
        return real(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    digests = FileDigests(tmp_path)
    assert digests.sha256(path) == digests.sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert len(hashed) == 1
    digests.save()
    later = FileDigests(tmp_path)
    assert later.sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert len(hashed) == 1
    time.sleep(0.02)
    path.write_bytes(b"two")
    assert later.sha256(path) == digests.sha256(path) == hashlib.sha256(b"two").hexdigest()
    assert len(hashed) == 3
    path.unlink()
    path.write_bytes(b"six")
    assert later.sha256(path) == hashlib.sha256(b"six").hexdigest()


@pytest.mark.parametrize("memory", ["", "{", "[]", "null", '{"1:2": 3}', sealed({"1:2": 3}).decode()])
def test_a_lost_or_damaged_memory_of_digests_costs_only_time(tmp_path: Path, memory: str) -> None:
    (tmp_path / "digests.json").write_text(memory)
    path = tmp_path / "file"
    path.write_bytes(b"one")
    digests = FileDigests(tmp_path)
    assert digests.sha256(path) == hashlib.sha256(b"one").hexdigest()
    digests.save()
    assert FileDigests(tmp_path).sha256(path) == digests.sha256(path)


@given(documents)
def test_a_document_keeps_its_digest_through_a_file(document: Any) -> None:
    assert digest_of(json.loads(json.dumps(document))) == digest_of(document)


@given(st.dictionaries(st.text(), documents, max_size=4))
def test_the_order_of_keys_does_not_matter(document: dict[str, Any]) -> None:
    assert canonical(dict(reversed(document.items()))) == canonical(document)


def hold(path: Path, held: Event, release: Event) -> None:
    with locked(path, lambda pid: None):
        held.set()
        release.wait(60)


def test_a_lock_is_waited_for_and_names_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "lock", held, release))
    holder.start()
    assert held.wait(60)
    told: list[int | None] = []

    def waiting(pid: int | None) -> None:
        told.append(pid)
        release.set()

    with locked(tmp_path / "lock", waiting):
        assert told == [holder.pid]
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    holder.join(60)
    assert holder.exitcode == 0


def test_a_killed_holder_gives_the_lock_back(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "lock", held, release))
    holder.start()
    assert held.wait(60)
    holder.kill()
    holder.join(60)
    with locked(tmp_path / "lock", lambda pid: pytest.fail("nobody holds it")):
        pass


def test_claims_of_different_keys_do_not_wait_for_each_other(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)

    def waiting(pid: int | None) -> None:
        pytest.fail(f"waits for {pid}")

    with store.claim("11" * 32, waiting), store.claim("22" * 32, waiting):
        pass
