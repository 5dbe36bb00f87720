"""The results folder: what the store needs of its disk, tried in a scratch folder inside it by its own calls."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerwise.pipeline.doctor import child
from layerwise.pipeline.doctor.check import Finding, State, Surroundings, gigabytes, ok, problem, warning

LEAST_DISK_BYTES, LITTLE_DISK_BYTES = 200 * 10**6, 5 * 10**9

_MOUNTS = Path("/proc/mounts")

_NETWORK_FILE_SYSTEMS = {
    *("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs"),
    *("fuse.ceph", "fuse.cephfs", "fuse.gcsfuse", "fuse.glusterfs", "fuse.juicefs", "fuse.rclone", "fuse.s3fs"),
    *("fuse.goofys", "fuse.mount-s3", "fuse.sshfs", "fuse.vmhgfs-fuse"),
}

_TRY_LOCK = """
import fcntl, sys
with open(sys.argv[1], "a+") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print('"free"')
    except BlockingIOError:
        print('"held"')
"""


def place(surroundings: Surroundings) -> Finding:
    """Where the checks below look."""
    folder, results = surroundings.place, surroundings.results.absolute()
    if not folder.is_dir():
        return problem(f"{folder} is no folder", "choose another by --results")
    if not os.access(folder, os.W_OK | os.X_OK):
        return problem(f"{folder} cannot be written to", "choose another by --results")
    return ok(str(folder) if folder == results else f"{results} is not there yet; looking at {folder}")


def file_system(surroundings: Surroundings) -> Finding:
    """Whether the folder is on this machine."""
    try:
        mount, kind = _mount_of(surroundings.place.resolve())
    except (OSError, ValueError, LookupError):
        return ok("kind not known on this system")
    if kind in _NETWORK_FILE_SYSTEMS:
        return warning(
            f"{kind} at {mount}, over the network: locks may not reach other machines",
            "run the same workflow on one machine at a time, or choose a local folder by --results",
        )
    return ok(f"{kind} at {mount}")


def disk_space(surroundings: Surroundings) -> Finding:
    """Free space for the user."""
    free = shutil.disk_usage(surroundings.place).free
    found = f"{gigabytes(free)} free in {surroundings.place}"
    if free < LITTLE_DISK_BYTES:
        state: State = "problem" if free < LEAST_DISK_BYTES else "warning"
        return Finding(state, found, "free some, or choose another disk by --results")
    return ok(found)


def exclusive_create(surroundings: Surroundings) -> Finding:
    """A file is created once, and a hard link refuses to replace one."""
    from layerwise.results.durable import publish_file

    with _scratch(surroundings) as folder:
        first, second = folder / "first", folder / "second"
        created = [publish_file(path, path.name.encode(), folder / "tmp") for path in (first, second, first)]
        if created != [True, True, False]:
            return problem("a file was created twice under one name", "choose a folder on another disk by --results")
        try:
            first.hardlink_to(second)
        except FileExistsError:
            return ok("by hard link")
        except OSError as error:  # `publish_file` works without
            return warning(f"no hard links ({error.strerror}); a rename serves", "write from one machine at a time")
        return problem("a hard link replaced a file", "choose a folder on another disk by --results")


def rename(surroundings: Surroundings) -> Finding:
    """A file takes the place of another, and a folder does not."""
    from layerwise.results.durable import publish_folder, replace_file

    with _scratch(surroundings) as folder:
        file, target = folder / "file", folder / "target"
        for content in (b"old", b"new"):
            replace_file(file, content, folder / "tmp")
        moved = []
        for name in ("first", "second"):
            (folder / name).mkdir()
            (folder / name / "content").write_text(name)
            moved.append(publish_folder(folder / name, target))
        if file.read_bytes() != b"new":
            return problem("a rename did not replace a file", "choose a folder on another disk by --results")
        if moved != [True, False] or (target / "content").read_text() != "first":
            return problem("a rename replaced a folder", "choose a folder on another disk by --results")
    return ok("replaces a file, never a folder")


def flush(surroundings: Surroundings) -> Finding:
    """Files and folders can be flushed to the device."""
    from layerwise.results.durable import sync_folder

    with _scratch(surroundings) as folder:
        try:
            with (folder / "file").open("xb") as file:
                file.write(b"1")
                file.flush()
                os.fsync(file.fileno())
            sync_folder(folder)
        except OSError as error:
            return problem(f"fsync fails: {error.strerror}", "choose a folder on another disk by --results")
    return ok("fsync of file and folder")


def lock(surroundings: Surroundings) -> Finding:
    """A lock keeps another process out for as long as it is held."""
    from layerwise.pipeline.artifacts import locked

    with _scratch(surroundings) as folder:
        path = folder / "lock"
        try:
            with locked(path, lambda _: None):
                during = child.ask(_TRY_LOCK, str(path))
        except OSError as error:
            return problem(f"flock fails: {error.strerror}", "choose a folder on another disk by --results")
        after = child.ask(_TRY_LOCK, str(path))
    for answer in (during, after):
        if answer.failure:
            return problem(f"another process cannot try the lock: {answer.failure}")
    if during.value != "held":
        return problem("two processes got the same lock", "choose a folder on another disk by --results")
    if after.value != "free":
        return problem("a lock was not given back", "choose a folder on another disk by --results")
    return ok("flock keeps another process out")


@contextmanager
def _scratch(surroundings: Surroundings) -> Iterator[Path]:
    folder = tempfile.mkdtemp(prefix=".layerwise-doctor-", dir=surroundings.place)
    try:
        yield Path(folder)
    finally:  # a TemporaryDirectory would also try at the end of the process, and hang it together with the disk
        shutil.rmtree(folder, ignore_errors=True)


def _mount_of(path: Path) -> tuple[Path, str]:
    """The mount that a path is on, and its type; of those at one place the last one counts."""
    found: dict[Path, str] = {}
    for line in _MOUNTS.read_text(errors="surrogateescape").splitlines():
        _, mount, kind, *_ = line.split(" ")
        found[Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mount))] = kind
    mounts = [folder for folder in (path, *path.parents) if folder in found]
    return mounts[0], found[mounts[0]]
