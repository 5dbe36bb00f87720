"""The files of the tables: each says in its name which rows it holds and what its bytes are, and each is kept twice.

`tables/<table>/run=<run id>/<rows>.<checksum>.parquet` is what everybody reads; `copies/` holds the same file under the
same path. The checksum is the beginning of the content's SHA-256, compared at every reading. So a file that changed is
not read, one that was deleted is missed, and either is read from, and by whoever may write put back from, its copy.
What lies in a table's folder and is no such file is passed over. Each of these is said once, as a warning.

Files of layerwise before the checksums stand as `<rows>.parquet`, without a copy: they are read if they can be.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from layerwise.results.durable import make_folder, publish_file, replace_file
from layerwise.results.links import refuse_links
from layerwise.results.schema import COMMON, TABLES, arrow_schema
from layerwise.results.told import warn_once

_NAME = re.compile(
    r"(?P<rows>(?P<key>[^-]{1,16})-(?P<first>\d{9,18})-(?P<last>\d{9,18})(-a\d{1,9})?)(\.(?P<checksum>[0-9a-f]{16}))?\.parquet"
)


@dataclass(frozen=True)
class Damage:
    """Something about a file of a table that is not as it should be.

    Args:
        path: the file.
        what: what is wrong, in a few words.
        lost: whether rows are missing because of it.
    """

    path: Path
    what: str
    lost: bool = False

    def __str__(self) -> str:
        return f"{self.path} {self.what}"


@dataclass
class RowFiles:
    """The files below a results folder.

    Args:
        root: the results folder.
        mends: whether what is damaged or missing is put back from its copy where it is met.
    """

    root: Path
    mends: bool = False
    _sound: dict[Path, tuple[int, ...]] = field(default_factory=dict)  # as they were when they were found so

    def add(self, table: str, run: str, rows: str, data: bytes) -> bool:
        """Write a file and its copy, the file durably; False if these rows are there already.

        Args:
            table: the table.
            run: the run's id.
            rows: which rows, `<key>-<first seq>-<last seq>`; the same words always mean the same rows.
            data: the content.
        Raises:
            DiskFull: the file system took no more.
        """
        place = f"{table}/run={run}"
        if any(self._sound_at(place, name) for name in self._names(place) if _rows(name) == rows):
            return False
        for tree in ("tables", "copies"):  # what holds them, but damaged
            for path in (self.root / tree / place).glob(f"{rows}.*parquet"):
                self._set_aside(path)
        name = f"{rows}.{_checksum(data)}.parquet"
        publish_file(self.root / "tables" / place / name, data, self.root / "tmp")
        self._copy(self.root / "copies" / place / name, data)
        return True

    def sound(self, table: str, run: str | None = None, keys: Collection[str] | None = None) -> list[Path]:
        """The files of a table to read, in order, none of them damaged; what is wrong is said.

        Args:
            table: the table.
            run: only those of this run.
            keys: only those that may hold rows of these stage keys.
        """
        starts = None if keys is None else {key[:16] for key in keys}
        found = []
        for place in self._places(table, run):
            for name in sorted(self._names(place)):
                known = _NAME.fullmatch(name)
                if known and starts is not None and known["key"] not in starts:
                    continue
                path = self._sound_at(place, name)
                if path is not None:
                    found.append(path)
        return found

    def count(self, table: str, key: str) -> int:
        """How many rows of a stage key are there, going by the names of files that are not damaged."""
        seqs: set[int] = set()
        for path in self.sound(table, keys=[key]):
            known = _NAME.fullmatch(path.name)
            if known:
                seqs.update(range(int(known["first"]), int(known["last"]) + 1))
        return len(seqs)

    def mend(self, run: str) -> None:
        """Put back what is damaged or missing of a run's files and their copies, as far as one of two is left."""
        for table in TABLES:
            place = f"{table}/run={run}"
            for name in sorted(self._names(place)):
                path = self._sound_at(place, name)
                copy = self.root / "copies" / place / name
                if path is not None and _promised(name) and not self._is_sound(copy):
                    self._copy(copy, path.read_bytes())

    def damages(self) -> Iterator[Damage]:
        """Everything that is wrong, every file and every copy read."""
        return (damage for damage in self.verdicts() if damage is not None)

    def verdicts(self) -> Iterator[Damage | None]:
        """For every file what is wrong with it or with its copy, None if nothing is; everything is read."""
        for table in TABLES:
            for place in self._places(table, None):
                for name in sorted(self._names(place)):
                    damages = list(self._damages_at(place, name))
                    yield from damages if damages else (None,)

    def _damages_at(self, place: str, name: str) -> Iterator[Damage]:
        path, copy = (self.root / tree / place / name for tree in ("tables", "copies"))
        if not _promised(name):
            found = _odd(path)
            if found is not None or not _rows(name):
                yield Damage(path, found or "is no file of layerwise, but its rows are read")
            return
        wrong = {each: _wrong(each) for each in (path, copy)}
        if any(wrong.values()):
            for each, what in wrong.items():
                if what is not None:
                    lost = all(wrong.values()) and not self._elsewhere(place, name)
                    yield Damage(each, what, lost)

    def _elsewhere(self, place: str, name: str) -> bool:
        """Whether the rows of a damaged file stand in another one, written since."""
        others = {other for other in self._names(place) if other != name and _rows(other) == _rows(name)}
        return any(
            _wrong(self.root / tree / place / other) is None for other in others for tree in ("tables", "copies")
        )

    def _places(self, table: str, run: str | None) -> list[str]:
        if run is not None:
            return [f"{table}/run={run}"]
        names = {
            path.name
            for tree in ("tables", "copies")
            for path in (self.root / tree / table).glob("run=*")
            if path.is_dir()
        }
        return [f"{table}/{name}" for name in sorted(names)]

    def _names(self, place: str) -> set[str]:
        """Names of files, of which either may be missing. Those that start with `.` or `_` are nobody's rows, by the
        convention of all readers."""
        names = {path.name for path in (self.root / "tables" / place).glob("*.parquet")}
        copies = {path.name for path in (self.root / "copies" / place).glob("*.parquet")}
        known = names | {name for name in copies if _promised(name)}
        return {name for name in known if not name.startswith((".", "_"))}

    def _sound_at(self, place: str, name: str) -> Path | None:
        """Where the content of a file of ours stands undamaged; None if nowhere."""
        path, copy = (self.root / tree / place / name for tree in ("tables", "copies"))
        if not _promised(name):
            return self._readable(place, name)
        if self._is_sound(path):
            return path
        what = _wrong(path)
        if not self._is_sound(copy):
            if not self._elsewhere(place, name):
                _tell(path, f"{what}, and its copy too: its rows are missing", hint=True)
            return None
        if not self.mends:
            _tell(path, f"{what}: its copy is read")
            return copy
        if path.exists() and not path.is_file():
            self._set_aside(path)  # a folder, say
        replace_file(path, copy.read_bytes(), self.root / "tmp")
        _tell(path, f"{what}: it was put back from its copy")
        return path

    def _is_sound(self, path: Path) -> bool:
        with suppress(OSError):
            found = path.stat()
            now = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            if self._sound.get(path) == now:
                return True
            if _wrong(path) is None:
                self._sound[path] = now
                return True
        return False

    def _readable(self, place: str, name: str) -> Path | None:
        path = self.root / "tables" / place / name
        with suppress(OSError):
            found = path.stat()
            now = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            if self._sound.get(path) == now:
                return path
            what = _odd(path)
            if what is None:
                self._sound[path] = now
                return path
            _tell(path, f"{what}: it is passed over")
        return None

    def _copy(self, path: Path, data: bytes) -> None:
        """Not flushed, which would take as long as the file itself: what a power cut takes of it is put back later."""
        replace_file(path, data, self.root / "tmp", durable=False)

    def _set_aside(self, path: Path) -> None:
        target = self.root / "quarantine" / f"{path.name}-{secrets.token_hex(4)}"
        for folder in (target.parent, path.parent):
            refuse_links(self.root, folder)
        make_folder(target.parent)
        with suppress(FileNotFoundError):
            path.rename(target)


def _rows(name: str) -> str | None:
    known = _NAME.fullmatch(name)
    return None if known is None else known["rows"]


def _promised(name: str) -> str | None:
    """The checksum in a name."""
    known = _NAME.fullmatch(name)
    return None if known is None else known["checksum"]


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _wrong(path: Path) -> str | None:
    """What is wrong with a file whose name holds its checksum; None if nothing is."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "is no file"
        return None if _checksum(path.read_bytes()) == _promised(path.name) else "is damaged, its checksum differs"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _odd(path: Path) -> str | None:
    """Why a file without a checksum cannot be read as rows of its table; None if it can."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = path.parents[1].name
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "is no file"
        found = pq.ParquetFile(path, page_checksum_verification=True).read()
        if not set(COMMON) <= set(found.column_names):
            return "holds no rows of layerwise"
        known = [column for column in arrow_schema(table) if column.name in found.column_names]
        found.select([column.name for column in known]).cast(pa.schema(known))
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        return f"cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def _tell(path: Path, what: str, hint: bool = False) -> None:
    warn_once(f"{path} {what}{'; running its workflow again makes them anew' if hint else ''}")
