"""What the README tells people to type works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from layerwise.pipeline.workflow import load_workflow

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_solver_example_runs_and_prints_an_optimum(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (block for block in blocks("python") if "layerwise.solvers" in block)
    exec(compile(example, "README.md", "exec"), {})
    loss, gap, *_ = capsys.readouterr().out.split()
    assert float(loss) > 0
    assert float(gap) <= 1e-9


def test_the_workflow_is_without_mistakes(tmp_path: Path) -> None:
    workflow, *fragments = blocks("yaml")
    (tmp_path / "flow.yaml").write_text(workflow, encoding="utf-8")
    for text in ("my_calibration.txt", "my_heldout.txt"):
        (tmp_path / text).write_text("some text", encoding="utf-8")
    nodes = load_workflow(tmp_path / "flow.yaml").nodes
    assert len(nodes) == len(re.findall("uses:", workflow))
    for fragment in fragments:  # stages of the sections below, into the same workflow
        whole = yaml.safe_load(workflow)
        whole["stages"] |= yaml.safe_load(fragment)
        (tmp_path / "more.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
        assert {node.id for node in load_workflow(tmp_path / "more.yaml").nodes} == set(whole["stages"])
