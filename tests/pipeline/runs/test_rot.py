"""A bit flipped or a file cut short anywhere in a results folder: repaired, named or harmless, never another result.

Half of the damages hit the folder of a finished run, half that of a run that was killed in its middle. After each the
frontier is printed, the workflow is run again, and the frontier is printed once more. Where a finished run is hit, a
budget is added every other time, so that stages read the artifacts of those before them.

    harmless    nothing was said, and everything is as it was
    repaired    the damage was said, and after the run everything is as it was
    named       the damage was said, and something else than the results is lost (a log, the record of an attempt)
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BUDGETS = "params.budgets=[3, 4, 5, 6]"


@dataclass
class Folders:
    """Results to damage.

    Args:
        workflow: its file.
        finished: the results of a run that went through.
        killed: those of runs killed in the middle of their first, second, third and fourth stage.
        frontier: that of the finished run.
        more: the frontier of the workflow with one budget more.
    """

    workflow: Path
    finished: Path
    killed: list[Path]
    frontier: str
    more: str
    verdicts: Counter[str] = field(default_factory=Counter)


def ask(forks: Any, log: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output, warnings included, of a command."""
    log.write_text("")
    forks.start(list(arguments), log)
    code = forks.status()
    return code, log.read_text()


def rerun(forks: Any, log: Path, workflow: Path, results: Path, *sets: str) -> tuple[int, str]:
    log.write_text("")
    forks.run(workflow, results, log, *sets)
    return forks.status(), log.read_text()


def frontier_of(text: str) -> str:
    """The rows of a frontier in CSV, without the warnings around them."""
    return "\n".join(line for line in text.splitlines() if line.startswith(("stage,", "search@")))


def frontier(forks: Any, log: Path, results: Path) -> tuple[int, str]:
    return ask(forks, log, "frontier", "--results", str(results), "--all", "--format", "csv")


@pytest.fixture(scope="module")
def folders(forks: Any, tiny_workflow: Path, undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    base = tmp_path_factory.mktemp("rot")
    log = base / "log"
    killed = []
    for number in range(4):
        results = base / f"killed-{number}"
        pid = forks.run(tiny_workflow, results, log)
        while not in_stage(number, results):
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        assert forks.status() == -signal.SIGKILL
        killed.append(results)
    _, text = frontier(forks, log, undisturbed)
    more = base / "more"
    shutil.copytree(undisturbed, more, symlinks=True)
    assert rerun(forks, log, tiny_workflow, more, BUDGETS)[0] == 0
    _, longer = frontier(forks, log, more)
    return Folders(tiny_workflow, undisturbed, killed, frontier_of(text), frontier_of(longer))


def in_stage(number: int, results: Path) -> bool:
    """Whether so many stages are done, and the next has an answer; what it looks at comes and goes."""
    try:
        done = len(list(results.glob("artifacts/*/*"))) >= number
        return done and any(results.glob("work/*/journal/*/*.json"))
    except FileNotFoundError:
        return False


def damage(path: Path, moments: random.Random) -> str:
    """Flip one bit of a file, or cut it short."""
    data = bytearray(path.read_bytes())
    path.chmod(0o644)
    if moments.random() < 0.25:
        length = moments.randrange(len(data))
        path.write_bytes(data[:length])
        return f"cut to {length} of {len(data)} bytes"
    bit = moments.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"bit {bit} of {8 * len(data)} flipped"


def victim(results: Path, moments: random.Random) -> Path:
    """A file: first its kind, then one of them, so that few large and many small kinds are hit alike."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(path for path in results.rglob("*") if path.is_file() and path.stat().st_size):
        parts = path.relative_to(results).parts
        kinds.setdefault("/".join([parts[0], *parts[3:-1]]) + path.suffix, []).append(path)
    return moments.choice(kinds[moments.choice(sorted(kinds))])


def hurt(forks: Any, folders: Folders, number: int, folder: Path) -> None:
    """One damage, and what became of it."""
    moments, log, results = random.Random(number), folder / "log", folder / "results"
    finished = number % 2 == 0
    source = folders.finished if finished else folders.killed[number // 2 % len(folders.killed)]
    shutil.copytree(source, results, symlinks=True)
    sets = (BUDGETS,) if finished and number % 4 == 0 else ()
    path = victim(results, moments)
    what = f"{number}: {path.relative_to(results)}, {damage(path, moments)}"
    first, before = frontier(forks, log, results)
    code, during = rerun(forks, log, folders.workflow, results, *sets)
    last, after = frontier(forks, log, results)
    told = before + during + after
    assert "Traceback" not in told, f"{what}\n{told}"
    said = path.name in told or "damaged" in told or "checksum" in told or path.parent.name in told
    if finished:
        assert first == 0 or said, f"{what}\n{before}"
        assert frontier_of(before) == folders.frontier or said, f"silently wrong before the run: {what}\n{before}"
    right = folders.more if sets else folders.frontier
    if code == 0 and frontier_of(after) == right:
        folders.verdicts["repaired" if said else "harmless"] += 1
        return
    assert said, f"silently wrong: {what}\n{told}"
    assert code != 0 or last != 0, f"the results are others after a run that went through: {what}\n{told}"
    folders.verdicts["named"] += 1


def many(forks: Any, folders: Folders, numbers: range, tmp_path: Path) -> None:
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        hurt(forks, folders, number, folder)
        shutil.rmtree(folder)


def test_no_damage_changes_a_result_without_a_word(forks: Any, folders: Folders, tmp_path: Path) -> None:
    many(forks, folders, range(4), tmp_path)
    assert folders.verdicts.total() == 4


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(1, 11))
def test_a_thousand_damages_are_repaired_named_or_harmless(
    forks: Any, folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str], hundred: int
) -> None:
    before = folders.verdicts.copy()
    many(forks, folders, range(100 * hundred, 100 * hundred + 100), tmp_path)
    with capsys.disabled():
        print(f"\n100 damages: {dict(folders.verdicts - before)}, 0 silently wrong, 0 tracebacks", flush=True)
