"""A real workflow, killed at random: it ends as if nothing had been, and does nothing twice that was finished.

The tiny workflow runs in processes forked from one that has torch loaded, because loading it takes longer than the
workflow. A moment is chosen by how many files the run has made so far, so that it falls into the middle on any machine.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from layerwise.results.store import Store

SEEDS = range(2)

FINISHED = re.compile(r"work/\w+/journal/.*\.json|artifacts/\w+/\w+/manifest\.json|tables/.*\.parquet")
"""What a run has made once and for all."""


def finished(results: Path) -> set[str]:
    """Every finished file of a run; it may be at work meanwhile."""
    found = set()
    for folder, _, names in os.walk(results):
        for name in names:
            path = os.path.relpath(Path(folder, name), results)
            if FINISHED.fullmatch(path):
                found.add(path)
    return found


@dataclass(frozen=True)
class Journal:
    """The answers of an unfinished stage at the moment of a kill."""

    key: str
    files: dict[Path, tuple[int, int]]  # inode and time of change


def journals(results: Path) -> list[Journal]:
    return [
        Journal(work.name, {path: _identity(path) for path in sorted((work / "journal").rglob("*.json"))})
        for work in sorted((results / "work").glob("*"))
    ]


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def wait_for_files(results: Path, number: int, running: Callable[[], bool]) -> None:
    """Until a run has made so many files more, or has ended."""
    seen = finished(results)
    target = len(seen) + number
    while len(seen) < target and running():
        seen |= finished(results)  # a journal goes away with its stage; its files count all the same
        time.sleep(0.002)


def alive(pid: int) -> Callable[[], bool]:
    """Whether a process of the fork server has not ended yet."""

    def running() -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"

    return running


def check_nothing_twice(results: Path, kills: Sequence[list[Journal]]) -> None:
    """No finished stage was run again, and no finished item."""
    rows = Store.open(results).rows("stages")
    made = [row["stage_key"] for row in rows if row["status"] == "ok" and row["cache"] != "hit"]
    assert len(made) == len(set(made))
    first_seen: dict[str, int] = {}
    for row in rows:
        if row["status"] == "ok":
            first_seen.setdefault(row["stage_key"], row["attempt"])
    assert all(row["cache"] == "hit" for row in rows if row["attempt"] > first_seen[row["stage_key"]])
    for journal in (journal for left in kills for journal in left if journal.files):
        later = [row for row in rows if row["stage_key"] == journal.key and row["cache"] != "hit"]
        for row in later:  # none if the kill came between the artifact and its row
            assert row["cache"] == "partial"
            assert row["items_cached"] >= len(journal.files)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_killed_three_times_ends_with_the_same_frontier_and_repeats_nothing(
    forks: Any,
    tiny_workflow: Path,
    undisturbed: Path,
    same_outcome: Callable[[Path], None],
    tmp_path: Path,
    seed: int,
) -> None:
    results, log = tmp_path / "results", tmp_path / "log"
    moments, total = random.Random(seed), len(finished(undisturbed))
    kills: list[list[Journal]] = []
    for _ in range(3):
        pid = forks.run(tiny_workflow, results, log)
        wait_for_files(results, moments.randrange(0, total // 4), alive(pid))
        time.sleep(moments.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
        assert forks.status() == -signal.SIGKILL
        kept = {path: identity for journal in journals(results) for path, identity in journal.files.items()}
        for journal in kills[-1] if kills else []:
            for path, identity in journal.files.items():
                assert kept.get(path, identity) == identity, f"{path} was written twice"
        kills.append(journals(results))
    forks.run(tiny_workflow, results, log)
    assert forks.status() == 0, log.read_text()
    same_outcome(results)
    check_nothing_twice(results, kills)
    assert Store.open(results).rows("runs")[-1]["status"] == "ok"
    assert not any((results / "work").glob("*/journal"))


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(
    forks: Any, tiny_workflow: Path, same_outcome: Callable[[Path], None], tmp_path: Path
) -> None:
    moments, killed, number = random.Random(100), 0, 0
    while killed < 100:
        number += 1
        results, log = tmp_path / f"results-{number}", tmp_path / "log"
        kills: list[list[Journal]] = []
        status = -1
        while status != 0:
            pid = forks.run(tiny_workflow, results, log)
            wait_for_files(results, moments.randrange(0, 30), alive(pid))
            time.sleep(moments.random() * 0.02)
            os.kill(pid, signal.SIGKILL)
            status = forks.status()
            if status:
                killed += 1
                kills.append(journals(results))
        same_outcome(results)
        check_nothing_twice(results, kills)


def descendants(pid: int) -> list[Any]:
    import psutil

    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def workers(pid: int) -> list[Any]:
    """The Ray workers below a driver, the busy ones first."""
    import psutil

    found = []
    for process in descendants(pid):
        with suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and "Agent" not in title:
                found.append(("IDLE" in title, process))
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A temporary folder for Ray, with a short name; a killed driver leaves its session there."""
    folder = Path(tempfile.mkdtemp(prefix="lw", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
def test_on_ray_a_killed_driver_and_a_killed_worker_change_nothing(
    tiny_workflow: Path, same_outcome: Callable[[Path], None], tmp_path: Path, ray_folder: Path
) -> None:
    import psutil

    results = tmp_path / "results"
    command = [
        sys.executable,
        "-m",
        "layerwise",
        "run",
        str(tiny_workflow),
        "--results",
        str(results),
        "--executor",
        "ray",
    ]
    environment = os.environ | {"TMPDIR": str(ray_folder)}
    ours: list[Any] = []
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        wait_for_files(results, 8, lambda: driver.poll() is None)
        assert driver.poll() is None, (tmp_path / "log").read_text()
        ours += descendants(driver.pid)
        driver.kill()
        driver.wait()
        kills = [journals(results)]

        driver = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while not (victims := workers(driver.pid)) and driver.poll() is None:
            time.sleep(0.05)
        wait_for_files(results, 2, lambda: driver.poll() is None)
        victims = workers(driver.pid) or victims
        ours += descendants(driver.pid)
        for victim in victims[:1]:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        assert victims, "no worker was seen"
        assert driver.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    same_outcome(results)
    check_nothing_twice(results, kills)
    _, left = psutil.wait_procs(ours, timeout=60)
    for process in left:  # started by this test, and of no use to anybody
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert not left
