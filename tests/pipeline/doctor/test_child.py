"""A process of its own: what it says, or how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerwise.pipeline.doctor import child
from layerwise.pipeline.doctor.child import Answer, ask


@pytest.mark.parametrize(
    ("script", "value", "failure"),
    [
        ("print('noise'); print('[1]')", [1], ""),
        ("import layerwise; print('1')", 1, ""),
        ("import no_such_thing", None, "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("print('no json')", None, "ended with code 0 and no answer"),
        ("raise SystemExit(7)", None, "ended with code 7 and no answer"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", None, "ended by a signal: Killed"),
    ],
)
def test_what_a_child_says_or_how_it_ended(script: str, value: Any, failure: str) -> None:
    assert ask(script) == Answer(value, failure)


def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "CHILD_SECONDS", 0.5)
    assert ask("import time; time.sleep(1000)").failure == "no answer within 0.5 s"


def test_a_folder_that_happens_to_be_here_cannot_pose_as_a_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "colorsys.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert ask("import colorsys; print('1')").value == 1
