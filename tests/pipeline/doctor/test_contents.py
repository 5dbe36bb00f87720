"""Every file of a results folder is read, nothing is believed, and what is wrong is named, file by file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.pipeline.artifacts import FileDigests
from layerwise.pipeline.doctor import read_all

KINDS = {
    "tables/units/*/*.parquet": ("tables", "warning"),
    "copies/stages/*/*.parquet": ("tables", "warning"),
    "artifacts/*/*/numbers.json": ("artifacts", "problem"),
    "artifacts/*/*/manifest.json": ("artifacts", "problem"),
    "work/*/journal/*/*.json": ("unfinished stages", "problem"),
    "runs/*/attempts/*.json": ("records", "warning"),
    "runs/*/workflow.yaml": ("records", "warning"),
    "digests.json": ("records", "warning"),
    "layerwise-store.json": ("records", "warning"),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.fixture
def results(workshop: Any) -> Path:
    """Of a run of four stages, and of one that broke in the middle of its first."""
    workshop.run()
    workshop.switch("n-3", "break")
    with pytest.raises(ValueError, match="a mistake of ours"):
        workshop.run("stages.numbers.with.scale=2")
    workshop.switch("n-3", None)
    return Path(workshop.results)


def test_every_kind_of_file_is_read_and_named(
    workshop: Any, results: Path, monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., Any]
) -> None:
    def believe(*_: object) -> str:
        raise AssertionError("what was found once was believed")

    assert {finding.state for _, finding in read_all(results)} == {"ok"}
    for pattern, (kind, state) in KINDS.items():
        victim = next(results.glob(pattern))
        was = victim.read_bytes()
        flip(victim)
        with monkeypatch.context() as patch:
            patch.setattr(FileDigests, "sha256", believe)
            found = {name: finding for name, finding in read_all(results) if finding.state != "ok"}
        assert list(found) == [kind], pattern
        assert found[kind].state == state, pattern
        assert str(victim) in found[kind].found, pattern
        victim.write_bytes(was)
    flip(next(results.glob("artifacts/*/*/numbers.json")))
    assert in_process("doctor", "--results", results, "--read-all").code == 1
    workshop.run()
    assert all(finding.state == "ok" for _, finding in read_all(results))
