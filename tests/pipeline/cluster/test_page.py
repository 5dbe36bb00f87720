"""What docs/cluster.md tells people to type works, as it stands there, and what it quotes is what layerwise says."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import layerwise

PACKAGE = Path(layerwise.__file__ or "").parent


def test_every_block_of_commands_is_run_here_except_for_the_few_that_say_so(cluster_page: Any) -> None:
    fences = re.findall(r"^```(.+)$", cluster_page.text, re.MULTILINE)
    assert set(fences) == {"bash", "bash head", "bash illustrative"}
    shown = "".join(cluster_page.blocks("bash illustrative")).split("\n")
    assert {line.split()[0] for line in shown if line} == {"ssh", "kubectl"}  # which there is nobody to answer
    assert fences.count("bash head") == 1  # which starts the head of these tests


@pytest.mark.ray
def test_the_commands_of_the_page_work_in_their_order(
    cluster_page: Any, head: Any, tiny_workflow: Path, tmp_path: Path
) -> None:
    """In a folder with a `flow.yaml` that a cluster works on for some seconds, with the head's token at home."""
    project, home, programs = tmp_path / "project", tmp_path / "home", tmp_path / "bin"
    shutil.copytree(tiny_workflow.parent, project)
    text = (project / "flow.yaml").read_text()
    (project / "flow.yaml").write_text(text.replace("generations: 3", "generations: 6"))
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(head.token)
    (home / ".ray" / "auth_token").chmod(0o600)
    programs.mkdir()
    (programs / "layerwise").write_text(f'#!/bin/sh\nexec {sys.executable} -m layerwise "$@"\n')
    (programs / "layerwise").chmod(0o755)
    env = {name: value for name, value in head.env().items() if name != "RAY_AUTH_TOKEN"}
    env |= {"HOME": str(home), "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    blocks = cluster_page.blocks("bash")
    assert len(blocks) >= 6
    script = "".join(blocks).replace("http://127.0.0.1:8265", head.dashboard)
    done = subprocess.run(
        ["bash", "-exc", script], cwd=project, env=env, text=True, capture_output=True, timeout=400, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "Pareto frontier" in done.stdout
    assert ": stopped; to go on: layerwise resume flow-" in done.stderr
    assert "job: lw-flow-" in done.stdout
    assert "warning: everybody who reaches the dashboard can read the values of HF_HUB_OFFLINE" in done.stderr
    assert (project / "rayjob.yaml").is_file()
    assert head.token not in done.stdout + done.stderr


def test_the_messages_that_the_page_explains_are_those_of_the_program(cluster_page: Any) -> None:
    said = "\n".join(texts_of(path) for path in sorted((PACKAGE / "pipeline").rglob("*.py")))
    quoted = re.findall(r"^\| `([^`]+)` \|", cluster_page.text.partition("## When it does not work")[2], re.MULTILINE)
    assert len(quoted) >= 10
    for message in quoted:
        for piece in re.split(r"\.\.\.|, |: |:$", message):  # some messages are put together from such pieces
            assert piece.strip() in said, message


def texts_of(path: Path) -> str:
    """Every text of a module, one a line, with `{}` for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.BinOp | ast.Constant):
            found.append("".join(str(n.value) for n in ast.walk(node) if isinstance(n, ast.Constant)))
    return "\n".join(found)


def test_the_page_states_the_limits_that_hold(cluster_page: Any) -> None:
    from layerwise.pipeline.cluster.driver import OLDEST_PYTHON
    from layerwise.pipeline.cluster.shipping import SHIP_LIMIT_BYTES
    from layerwise.pipeline.doctor.versions import OLDEST_RAY

    assert f"up to {SHIP_LIMIT_BYTES // 2**20} MiB together" in cluster_page.text
    assert f"version {OLDEST_RAY[0]}.{OLDEST_RAY[1]} or later" in cluster_page.text
    assert f"Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or later" in cluster_page.text
