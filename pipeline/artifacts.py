"""Artifacts: immutable folders addressed by the hash of what made them.

An artifact stands in `artifacts/<first 2 digits>/<key>/`, with `manifest.json` beside its files: their sizes and
SHA-256, the material of the key, and a seal (`layerwise.results.sealed`). The folder is finished elsewhere and renamed
into place, so it exists whole or not at all. Where an artifact is used its sizes are compared, and its checksums unless
the file is the very one that was checked before (same inode, size and time of change): cheap for a folder of gigabytes,
and no flipped byte goes unseen. A damaged artifact is moved to `quarantine/` and made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise.errors import CorruptArtifact
from layerwise.results.durable import make_folder, publish_folder, replace_file
from layerwise.results.links import open_plain, refuse_links, refuse_links_below
from layerwise.results.sealed import canonical, digest_of, sealed, unsealed

__all__ = ["MANIFEST", "Artifact", "ArtifactStore", "FileDigests", "canonical", "digest_of", "file_sha256", "locked"]

MANIFEST = "manifest.json"
CHUNK = 1 << 20


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as it is now, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A stage's output.

    Args:
        key: the hash of what made it.
        folder: where it stands.
        digest: the hash of what is in it; two keys may give the same.
        material: what the key was made from.
        rows: how many rows of each results table were written with it.
    """

    key: str
    folder: Path
    digest: str
    material: Mapping[str, Any]
    rows: Mapping[str, int] = field(default_factory=dict)


class ArtifactStore:
    """The artifacts of a results folder.

    Args:
        root: the results folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tmp = root / "tmp"
        self.digests = FileDigests(root)

    def folder(self, key: str) -> Path:
        """Where the artifact of a key stands, or would."""
        return self.root / "artifacts" / key[:2] / key

    def work(self, key: str) -> Path:
        """Where an unfinished artifact keeps its finished items."""
        return self.root / "work" / key

    def find(self, key: str, believing: bool = True) -> Artifact | None:
        """The artifact of a key, checked; None if there is none.

        Args:
            key: the artifact's.
            believing: that a file which has not been touched since it was last read holds what it held then.
        Raises:
            CorruptArtifact: a file is missing, cut short or changed.
        """
        folder = self.folder(key)
        if not folder.is_dir():
            return None
        try:
            manifest = unsealed((folder / MANIFEST).read_bytes())
            files = {name: (int(file["size"]), str(file["sha256"])) for name, file in manifest["files"].items()}
            material, rows = dict(manifest["material"]), dict(manifest["rows"])
            artifact = Artifact(key, folder, digest_of(manifest["files"]), material, rows)
            if any(Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name for name in files):
                raise ValueError("it names files outside of its folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtifact(f"{folder / MANIFEST} cannot be read: {error}") from error
        for name, (size, sha256) in files.items():
            self._check(folder / name, size, sha256, self.digests.sha256 if believing else file_sha256)
        return artifact

    def _check(self, path: Path, recorded: int, sha256: str, digest: Callable[[Path], str]) -> None:
        if not path.is_file():
            raise CorruptArtifact(f"{path} is missing")
        size = path.stat().st_size
        if size != recorded:
            raise CorruptArtifact(f"{path} has {size:,} bytes, {recorded:,} were written")
        if digest(path) != sha256:
            raise CorruptArtifact(f"{path} is not what was written: its checksum differs")

    def publish(
        self,
        key: str,
        folder: Path,
        material: Mapping[str, Any],
        items: Mapping[Path, str] | None = None,
        rows: Mapping[str, int] | None = None,
    ) -> Artifact:
        """Make a finished folder the artifact of a key; if somebody else was first, theirs stays.

        Args:
            key: the artifact's.
            folder: what is to be in it.
            material: what the key was made from.
            items: SHA-256 of files that items left, by path; those that are linked into the folder must still have it.
            rows: how many rows of each results table were written with it.
        Raises:
            DiskFull: the file system took no more.
            CorruptArtifact: a file of an item has changed since it was written.
            StoreError: there is a link in the folder, or on the way to where it goes.
        """
        refuse_links_below(folder)
        refuse_links(self.root, self.folder(key))
        linked = {_inode(path): sha256 for path, sha256 in (items or {}).items() if path.exists()}
        files: dict[str, dict[str, Any]] = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            path.chmod(0o444)
            name = path.relative_to(folder).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": self.digests.sha256(path)}
            if linked.get(_inode(path), files[name]["sha256"]) != files[name]["sha256"]:
                raise CorruptArtifact(
                    f"{path} is not what was written: its checksum differs", hint="run again: it is made anew"
                )
        manifest = {"key": key, "files": files, "material": material, "rows": dict(rows or {})}
        replace_file(folder / MANIFEST, sealed(manifest, indent=1), self.tmp)
        publish_folder(folder, self.folder(key))
        self.digests.save()
        return Artifact(key, self.folder(key), digest_of(files), material, dict(rows or {}))

    def discard_work(self, key: str) -> None:
        """Remove what a published artifact was made with; a process killed right after publishing left it behind."""
        refuse_links(self.root, self.work(key))
        shutil.rmtree(self.work(key), ignore_errors=True)  # another run may be at it too

    def quarantine(self, key: str) -> Path:
        """Move a damaged artifact out of the way; says where to."""
        target = self.root / "quarantine" / f"{key}-{secrets.token_hex(4)}"
        for path in (target, self.folder(key)):
            refuse_links(self.root, path.parent)
        make_folder(target.parent)
        with suppress(FileNotFoundError):  # somebody else was faster
            self.folder(key).rename(target)
        return target

    @contextmanager
    def claim(self, key: str, waiting: Callable[[int | None], None]) -> Iterator[None]:
        """Hold the right to make the artifact of a key; look for the artifact only then.

        Args:
            key: the artifact's.
            waiting: called once, with the process id of the holder, before waiting for it.
        """
        with locked(self.root / "claims" / key, waiting, root=self.root):
            yield


def _inode(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


@contextmanager
def locked(path: Path, waiting: Callable[[int | None], None], *, root: Path | None = None) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel takes it back if this process dies.

    Args:
        path: the lock file, made if missing; it holds the process id of the holder.
        waiting: called once, with that id if it can be read, before waiting for another process.
        root: the results folder, below which no link may lead to the file; the file's own folder if left out.
    Raises:
        StoreError: the file or its folder is a link, or no file.
    """
    refuse_links(path.parent if root is None else root, path)
    make_folder(path.parent)
    with os.fdopen(open_plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            waiting(int(holder) if holder.isdigit() else None)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class FileDigests:
    """SHA-256 of files, remembered as long as their inode, size and time of change stay.

    Args:
        root: the results folder; the memory is a file in it, and losing it costs only time.
    """

    def __init__(self, root: Path) -> None:
        self.file, self.tmp = root / "digests.json", root / "tmp"
        self._fresh = False
        try:
            self._known: dict[str, list[Any]] = unsealed(self.file.read_bytes())
        except (OSError, ValueError):
            self._known = {}

    def sha256(self, path: Path) -> str:
        """64 hex digits."""
        stat = path.stat()
        identity = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        place = f"{stat.st_dev}:{stat.st_ino}"
        known = self._known.get(place)
        if isinstance(known, list) and known[:-1] == identity:
            return str(known[-1])
        digest = file_sha256(path)
        self._known[place] = [*identity, digest]
        self._fresh = True
        return digest

    def save(self) -> None:
        """Keep the memory for the next process."""
        if self._fresh:
            replace_file(self.file, sealed(self._known), self.tmp)
            self._fresh = False
