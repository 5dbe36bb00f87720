"""A results folder in which somebody has planted a link, wherever a run would write: nothing is written outside."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import StoreError

TRANSIENT = ["work", "work/{key}", "work/{key}/out", "work/{key}/items", "work/{key}/items/tokens.partial"]
TRANSIENT += ["work/{key}/journal", "runs/{run}/progress.tmp", "runs/{run}/progress.json", "quarantine"]
"""What is gone after a run, or not always written."""

REFUSED = ["runs", "runs/{run}", "runs/{run}/lock", "runs/{run}/log", "runs/{run}/log/0001.log", "runs/{run}/attempts"]
REFUSED += ["runs/{run}/stages", "runs/{run}/workflow.yaml", "runs/{run}/progress.json", "tables", "tables/runs"]
REFUSED += ["tmp", "claims", "artifacts", "work", "work/{key}", "work/{key}/out", "work/{key}/items"]
REFUSED += ["work/{key}/items/tokens.partial", "digests.json"]
"""Where a link must be named, and not only be harmless."""


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_wherever_a_link_is_planted_a_run_writes_nothing_outside(workshop: Any, tmp_path: Path) -> None:
    run, _ = workshop.run()
    (claim, *_) = (run.store.root / "claims").iterdir()
    names = {"run": run.id, "key": claim.name}
    written = sorted(path for path in run.store.root.rglob("*") if not path.is_symlink())
    seen = {part for path in written for part in path.parts if len(part) == 64 and part != claim.name}
    written = [path for path in written if not seen & set(path.parts)]  # of one stage's artifact, not of all
    one_of_each = {path.parent: path for path in written if path.is_file()}.values()
    files = {path.relative_to(run.store.root).as_posix() for path in one_of_each}
    places = files | {path.relative_to(run.store.root).as_posix() for path in written if path.is_dir()}
    places |= {place.format(**names) for place in [*TRANSIENT, *REFUSED]}
    assert len(places) > 25
    named = set()
    for number, place in enumerate(sorted(places)):
        outside, results = tmp_path / f"outside-{number}", tmp_path / f"results-{number}"
        outside.mkdir()
        (outside / "file").write_text("mine")
        (results / place).parent.mkdir(parents=True, exist_ok=True)
        is_file = place in files or place.endswith((".json", ".partial", ".tmp", "lock", ".log"))
        (results / place).symlink_to(outside / "file" if is_file else outside)
        before = contents(outside)
        try:
            workshop.run(results=results)
        except StoreError as error:
            assert str(results / place) in str(error)
            named |= {place} if f"{results / place} is a link" in str(error) else set()
        assert contents(outside) == before, place
        shutil.rmtree(results)
    assert {place.format(**names) for place in REFUSED} <= named


@pytest.mark.parametrize("place", ["submit.lock", "submissions"])
def test_submitting_writes_through_no_link(
    fake_cluster: Any,
    empty_home: Path,
    tiny_workflow: Path,
    tmp_path: Path,
    in_process: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    from layerwise.pipeline.cluster import jobs
    from layerwise.pipeline.display import SilentDisplay
    from layerwise.pipeline.runs.run import Run
    from layerwise.pipeline.workflow import load_workflow

    monkeypatch.setenv("RAY_AUTH_TOKEN", fake_cluster.token)
    monkeypatch.setattr(jobs, "installed_version", lambda _: "2.60.0")
    run = Run(load_workflow(tiny_workflow), tmp_path / "results", SilentDisplay())
    run.keep_workflow()
    (tmp_path / "outside").mkdir()
    (run.folder / place).symlink_to(tmp_path / "outside")
    outcome = in_process("submit", tiny_workflow, "--address", fake_cluster.address, "--results", tmp_path / "results")
    assert outcome.code == 4
    assert f"{run.folder / place} is a link" in outcome.err
    assert not list((tmp_path / "outside").iterdir())
    assert fake_cluster.jobs == {}


def test_a_log_that_is_a_link_is_not_printed(workshop: Any, tmp_path: Path, in_process: Callable[..., Any]) -> None:
    run, _ = workshop.run()
    log = run.folder / "log" / "0001.log"
    log.unlink()
    (tmp_path / "secret").write_text("2026 - my secret\n")
    log.symlink_to(tmp_path / "secret")
    for command in (["logs", run.id], ["logs", "-f", run.id]):
        outcome = in_process(*command, "--results", run.store.root)
        assert outcome.code == 4
        assert "my secret" not in outcome.out
        assert f"{log} is a link" in outcome.err
