"""`tests/example_package`, a package that adds one of everything, works once it is installed, without a line of ours.

Installed means here what an installer leaves: the package and its metadata, side by side on the path.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = Path(__file__).with_name("example_package")
METADATA = "import sys; from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel(sys.argv[1])"

Call = Callable[..., "subprocess.CompletedProcess[str]"]


def started(*command: object, cwd: Path, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A program that ended, with the checkout and some folders on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The project's folder, the one that it is installed in, and one with its workflow, a tiny model and texts."""
    from layerwise.testing.models import tiny_model, tiny_texts

    root = tmp_path_factory.mktemp("example")
    project, installed, work = (root / name for name in ("project", "installed", "work"))
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (installed, work):
        folder.mkdir()
    done = started("-c", METADATA, installed, cwd=project)
    assert done.returncode == 0, done.stderr
    shutil.move(project / "layerwise_example", installed)
    shutil.copy(project / "flow.yaml", work)
    tiny_model(work / "model")
    tiny_texts(work)
    return SimpleNamespace(project=project, installed=installed, work=work, results=work / "results")


@pytest.fixture(scope="module")
def layerwise(place: SimpleNamespace) -> Call:
    """The command, where the package is installed."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        return started("-m", "layerwise", *arguments, cwd=place.work, path=(place.installed,))

    return call


@pytest.fixture(scope="module")
def finished(layerwise: Call) -> str:
    """What the workflow's run told, once it went through."""
    done = layerwise("run", "flow.yaml", "--results", "results", "--executor", "inline")
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_package_keeps_the_promises_of_all_that_it_adds(place: SimpleNamespace) -> None:
    done = started("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=place.project, path=(place.installed,))
    assert done.returncode == 0, done.stdout + done.stderr


def test_where_it_is_not_installed_its_names_are_unknown(place: SimpleNamespace) -> None:
    done = started("-m", "layerwise", "validate", "flow.yaml", cwd=place.work)
    assert done.returncode == 2
    for name in ("ternary", "sizes", "exchange"):
        assert f"'{name}'" in done.stderr


def test_its_names_are_validated_like_ours(layerwise: Call, place: SimpleNamespace) -> None:
    done = layerwise("validate", "flow.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (0, "flow.yaml: 9 stages, no errors\n", "")
    text = (place.work / "flow.yaml").read_text()
    (place.work / "wrong.yaml").write_text(text.replace("group_size: [-1, 16]", "group_size: [16, 16]"))
    done = layerwise("validate", "wrong.yaml")
    assert done.returncode == 2
    assert "group_size: must be different numbers of at least 1, or -1" in done.stderr


def test_the_schema_lists_what_it_adds(layerwise: Call) -> None:
    schema = json.loads(layerwise("schema").stdout)
    found = [choice["const"] for definition in schema["definitions"].values() for choice in methods(definition)]
    assert {"ternary", "gptq"} <= set(found)
    assert "input weights that share one scale, -1 for the whole row; or a list" in json.dumps(schema)
    stage_names = {choice.get("const") for choice in uses(schema)}
    assert {"sizes", "compress"} <= stage_names
    described = json.loads(layerwise("schema", "--stage", "allocate").stdout)
    assert "exchange" in json.dumps(described)
    assert "climb" in json.dumps(described)


def methods(definition: dict[str, Any]) -> list[dict[str, Any]]:
    """What `method:` may be in an entry of a menu."""
    method = definition.get("properties", {}).get("method", {})
    return [choice for choice in (method, *method.get("anyOf", [])) if "const" in choice]


def uses(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of `uses:`."""
    (found,) = [
        definition["properties"]["uses"]["anyOf"]
        for definition in schema["definitions"].values()
        if "uses" in definition.get("properties", {})
    ]
    return list(found)


def test_the_workflow_runs_through_and_gathers_the_statistic_that_the_method_needs(
    finished: str, place: SimpleNamespace
) -> None:
    assert "repacked: done in" in finished
    (run,) = (place.results / "runs").iterdir()
    index = json.loads((run / "stages" / "statistics" / "statistics.json").read_text())
    assert index["gathered"] == ["input_range"]


def test_the_table_of_sizes_counts_what_is_stored(finished: str, place: SimpleNamespace) -> None:
    (table,) = (place.results / "runs").glob("*/stages/table/sizes.csv")
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    attention, mlp = [(32, 32)] * 4, [(40, 32), (40, 32), (32, 40)]
    bytes_of_row = sum(out * -(-columns // 5) + 2 * out for out, columns in attention + mlp)
    found = {(row["block"], row["level"]): (int(row["units"]), float(row["KiB"])) for row in rows}
    assert found["0", "ternary-row"] == found["1", "ternary-row"] == (7, pytest.approx(bytes_of_row / 1024))
    assert {level for _, level in found} == {"dense", "ternary-row", "ternary-g16", "rtn-4b-g16", "rtn-8b-g16"}


def test_the_frontier_has_candidates_of_its_solver_and_of_its_search(finished: str, layerwise: Call) -> None:
    for solver in ("exchange", "climb"):
        options = ["--over", "effective_bits", "--solver", solver, "--all", "--format", "csv"]
        done = layerwise("frontier", "--results", "results", *options)
        assert done.returncode == 0, done.stderr
        rows = list(csv.DictReader(io.StringIO(done.stdout)))
        assert {row["solver"] for row in rows} == {solver}
        assert {float(row["effective_bits"]) <= budget for row, budget in zip(rows, (4, 6), strict=True)} == {True}
