"""What is built from the checkout is complete, and works where the checkout is not."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "stages", "solvers", "kernels", "results", "testing", "workflows")


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> zipfile.ZipFile:
    """What is in it."""
    return zipfile.ZipFile(wheel_file)


def test_the_wheel_holds_every_module_and_every_data_file_once(wheel: zipfile.ZipFile) -> None:
    packed = wheel.namelist()
    assert len(packed) == len(set(packed))
    suffixes = {".py", ".yaml", ".json", ".safetensors", ".txt"}
    expected = {
        f"layerwise/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }
    assert "layerwise/workflows/quickstart.yaml" in expected
    assert expected <= set(packed)
    assert {"layerwise/__init__.py", "layerwise/__main__.py", "layerwise/errors.py", "layerwise/py.typed"} <= set(
        packed
    )


def test_the_wheel_puts_nothing_but_layerwise_on_the_path(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"layerwise"}
    (points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "layerwise = layerwise.pipeline.cli:main" in wheel.read(points).decode()


def test_the_unpacked_wheel_works_without_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    unpacked, elsewhere = tmp_path / "unpacked", tmp_path / "elsewhere"
    wheel.extractall(unpacked)
    elsewhere.mkdir()
    script = """
import sys
from pathlib import Path
import numpy as np
import layerwise
from layerwise.solvers import Problem, ilp
problem = Problem(costs={"bits": np.array([[2.0, 4.0]])}, budgets={"bits": 3.0}, losses=np.array([[1.0, 0.0]]))
print(ilp(problem).choice.tolist(), sorted({"torch", "ray"} & set(sys.modules)))
import layerwise.kernels.packing, layerwise.results.store, layerwise.stages.levels.database
from layerwise.pipeline.workflow import load_workflow
print(Path(layerwise.__file__).parent, layerwise.__version__)
print(all(Path(module.__file__).is_relative_to(sys.path[0]) for name, module in sys.modules.items()
          if name.startswith("layerwise") and getattr(module, "__file__", None)))
"""
    # An editable install is found by a hook on the path; this one comes first.
    program = f"import sys; sys.path.insert(0, {str(unpacked)!r})\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=elsewhere,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    chosen, place, ours = done.stdout.splitlines()
    assert chosen == "[0] []"
    assert place.startswith(str(unpacked / "layerwise"))
    assert ours == "True"


def test_the_shipped_workflow_is_without_mistakes_wherever_it_was_unpacked(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    from layerwise.pipeline.workflow import load_workflow

    wheel.extractall(tmp_path)
    workflow = load_workflow(tmp_path / "layerwise" / "workflows" / "quickstart.yaml")
    assert workflow.model.path == tmp_path / "layerwise" / "workflows" / "demo" / "model"
