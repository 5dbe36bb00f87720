"""What an import must not load: each case in a fresh interpreter, asked of Python's own list of modules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH_AND_RAY = {"torch", "ray", "transformers"}
HEAVY = TORCH_AND_RAY | {"pandas", "pyarrow", "pulp", "highspy", "optuna", "matplotlib", "scipy", "datasets"}


def loaded_by(statement: str) -> set[str]:
    """The top-level names of the modules that a statement loads."""
    script = f"import json, sys\n{statement}\nprint(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import layerwise, layerwise.errors, layerwise.stages, layerwise.stages.contract", HEAVY | {"numpy"}),
        ("import layerwise.pipeline.cli", HEAVY | {"numpy"}),
        ("import layerwise.solvers", TORCH_AND_RAY | {"pandas", "pyarrow", "matplotlib", "yaml"}),
        ("import layerwise.results.store, layerwise.results.frontier, layerwise.results.plot", TORCH_AND_RAY),
        ("import layerwise.pipeline.runs.run, layerwise.pipeline.workflow", TORCH_AND_RAY | {"matplotlib"}),
        (
            "from layerwise import stages\nfor name in stages.stage_names(): stages.find_stage(name)",
            TORCH_AND_RAY | {"matplotlib"},
        ),
    ],
)
def test_an_import_loads_nothing_that_it_does_not_need(statement: str, unwanted: set[str]) -> None:
    assert not loaded_by(statement) & unwanted


def test_the_front_door_does_nothing_but_say_its_version() -> None:
    assert not loaded_by("import layerwise") & {"pydantic", "typer", "rich", "numpy", "yaml", *HEAVY}


@pytest.mark.parametrize("name", ["pipeline", "stages", "solvers", "kernels", "results", "workflows"])
def test_every_folder_is_reached_through_the_package_and_stands_at_the_top(name: str) -> None:
    assert (ROOT / "layerwise" / name).is_symlink()
    assert (ROOT / "layerwise" / name).resolve() == ROOT / name


def test_kernels_is_no_package_because_its_name_is_taken_by_another_project() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_module_is_imported_by_its_bare_name() -> None:
    folders = ("pipeline", "stages", "solvers", "kernels", "results")
    starts = tuple(
        f"{word} {folder}{end}" for word in ("from", "import") for folder in folders for end in (".", " ", "\n")
    )
    bare = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in (*folders, "tests", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.lstrip().startswith(starts)
    ]
    assert not bare


def test_the_imports_run_one_way() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
