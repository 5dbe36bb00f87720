"""A few of the broken files of `benchmarks/mutated_workflows.py`; its table has ten thousand."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_every_broken_file_is_valid_or_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    from mutated_workflows import outcomes

    found = list(outcomes(200, seed=1, folder=tmp_path))
    assert [made for made in found if made.answer not in ("valid", "mistakes")] == []
    assert {made.answer for made in found} == {"valid", "mistakes"}
