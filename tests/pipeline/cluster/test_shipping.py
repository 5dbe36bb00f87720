"""What is sent with a submission: the whole package and no more, and a workflow that means the same elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import layerwise
from layerwise.errors import UsageError
from layerwise.pipeline.cluster import shipping
from layerwise.pipeline.cluster.shipping import START, cargo, named_paths, stage_job, stage_package
from layerwise.pipeline.display import SilentDisplay
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.workflow import load_workflow

PACKAGE = Path(layerwise.__file__ or "").parent


def tree(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


def everything_below(folder: Path) -> set[str]:
    """As `tree`, through symlinks, by another way."""
    return {
        Path(top, name).relative_to(folder).as_posix()
        for top, _, names in os.walk(folder, followlinks=True)
        for name in names
        if "__pycache__" not in top and not name.startswith(".")
    }


def test_the_package_is_shipped_whole_without_links_and_without_tests(tmp_path: Path) -> None:
    staged = stage_package(tmp_path)
    assert staged == tmp_path / "layerwise"
    assert not [path for path in staged.rglob("*") if path.is_symlink()]
    assert tree(staged) == everything_below(PACKAGE)
    assert {"__init__.py", "pipeline/cluster/driver.py", "kernels/packing.py", "stages/compress/gptq.py"} <= tree(
        staged
    )
    assert not {name for name in tree(staged) if "tests" in name or name.endswith((".pyc", ".so"))}


def test_what_was_shipped_imports_without_the_checkout(tmp_path: Path) -> None:
    staged = stage_package(tmp_path)
    imports = "from layerwise.pipeline.cluster import driver"
    script = f"import sys; sys.path.insert(0, sys.argv[1]); {imports}; print(driver.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd="/", capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{staged / 'pipeline' / 'cluster' / 'driver.py'}\n", done.stderr


def test_a_package_that_is_in_no_folder_cannot_be_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "layerwise", SimpleNamespace(__file__=str(tmp_path / "a.zip" / "__init__.py")))
    with pytest.raises(UsageError, match="cannot be shipped"):
        stage_package(tmp_path)


def test_the_shipped_workflow_gives_the_same_run_from_its_own_files(tiny_workflow: Path, tmp_path: Path) -> None:
    workflow = load_workflow(tiny_workflow)
    (tmp_path / "staged").mkdir()
    job = stage_job(tmp_path / "staged", workflow, cargo(workflow))
    here, there = Run(workflow, tmp_path / "a", SilentDisplay()), load_workflow(job / "workflow.yaml")
    assert all(path.is_relative_to(job) for path in named_paths(there))
    assert not {path.name for path in job.iterdir()} & {"results", "kernels", "layerwise", "model"}
    shipped = Run(there, tmp_path / "b", SilentDisplay(), here.resolved)
    assert shipped.id == here.id
    assert [plan.key for plan in shipped.plan()] == [plan.key for plan in here.plan()]
    assert shipped.resolved == here.resolved


def test_what_is_not_shipped_keeps_its_place(tiny_workflow: Path, tmp_path: Path) -> None:
    workflow = load_workflow(tiny_workflow)
    job = stage_job(tmp_path, workflow, None)
    assert {path.name for path in job.iterdir()} == {"workflow.yaml", "start.sh"}
    assert named_paths(load_workflow(job / "workflow.yaml")) == named_paths(workflow)
    assert named_paths(workflow) == [
        tiny_workflow.parent / name for name in ("model", "calibration.txt", "heldout.txt")
    ]


def test_the_cargo_is_what_the_digests_are_taken_of(tiny_workflow: Path, tmp_path: Path, workshop: Any) -> None:
    load = cargo(load_workflow(tiny_workflow))
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in load.files} == names | {"calibration.txt", "heldout.txt"}
    assert load.size_bytes == sum(path.stat().st_size for path in load.files)
    assert load.fits


def test_texts_of_one_name_from_two_folders_do_not_collide(desk: Any) -> None:
    desk.write("other text", "else/calibration.txt")
    workflow = desk.load("stages: {stats: {uses: calibrate}}", sets=["data.heldout.text=else/calibration.txt"])
    assert sorted(cargo(workflow).files.values()) == ["files/text-0.txt", "files/text-1.txt"]


def test_too_large_a_cargo_does_not_fit(tiny_workflow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = cargo(load_workflow(tiny_workflow))
    monkeypatch.setattr(shipping, "SHIP_LIMIT_BYTES", load.size_bytes)
    assert load.fits
    monkeypatch.setattr(shipping, "SHIP_LIMIT_BYTES", load.size_bytes - 1)
    assert not load.fits


# --- the Python that a job gets ---


@pytest.fixture
def start(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine on whose PATH no `python` has Ray; `start.sh` is in `tmp_path`."""
    (tmp_path / "start.sh").write_text(START)
    for name in ("python", "python3"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(PACKAGE.parent)}


def test_a_job_gets_the_python_whose_ray_started_it(start: dict[str, str], tmp_path: Path) -> None:
    script = "import ray, subprocess, sys; sys.exit(subprocess.call(['sh', 'start.sh', '/nowhere', 'run', '1', 'x']))"
    done = subprocess.run(
        [sys.executable, "-c", script], env=start, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the results folder /nowhere is not visible on "), done.stderr


def test_where_no_python_has_ray_the_job_says_so(start: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", "sh start.sh; exit $?"], env=start, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python here has Ray; tried:")
    assert done.stderr.rstrip().endswith("first on the PATH of the cluster's machines")
