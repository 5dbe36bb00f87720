"""`workflows/latency_budget.yaml` from end to end, with short windows: that it works, not how long anything takes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from layerwise.pipeline.cli import app
from layerwise.pipeline.display import open_display
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.workflow import load_workflow
from layerwise.results.frontier import frontier_table
from layerwise.results.store import Store

PROJECT = Path(__file__).parents[2]
WORKFLOW = PROJECT / "workflows" / "latency_budget.yaml"
SHORT = [
    *(f"stages.{stage}.with.{setting}" for stage in ("times", "speed")
      for setting in ("window_ms=0.5", "samples=3", "spread=1000", "retries=0")),
    "stages.speed.with.tolerance=1000",
    "stages.profile.with.tokens=256",
    "data.calibration.tokens=1024",
    "data.heldout.tokens=512",
    "params.tokens=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(load_workflow(WORKFLOW, sets=SHORT), tmp_path_factory.mktemp("results"), open_display())
    made.execute("inline")
    return made


def test_allocations_keep_both_budgets_and_stand_on_a_frontier_of_milliseconds(run: Run) -> None:
    table = frontier_table(run.store, run.id, over="ms", dominated=True)
    assert len(table) == 4
    assert table["ms"].notna().all()
    assert table["ms"].is_monotonic_increasing
    for row in table.itertuples():
        bytes_share, ms_share = row.budget.split(",")
        assert bytes_share.startswith("bytes=") and ms_share.startswith("ms=")
    assert table["on_front"].any()


def test_every_allocation_was_run_on_packed_weights_and_timed(run: Run) -> None:
    said = json.loads((run.folder / "stages" / "speed" / "speed.json").read_text())
    allocations = json.loads((run.folder / "stages" / "search" / "allocations.json").read_text())
    assert set(said) == {"dense", *(row["candidate"] for row in allocations)}
    assert {found["status"] for found in said.values()} == {"ok"}


def test_the_store_tells_times_by_level(run: Run) -> None:
    rows = run.store.rows("latency")
    assert {row["status"] for row in rows} == {"measured", "no_kernel", "fitted"}
    assert len({row["unit"] for row in rows}) == 42 + 1


def test_what_was_measured_is_found_again_on_the_same_machine(run: Run) -> None:
    again = Run(load_workflow(WORKFLOW, sets=SHORT), run.store.root, open_display())
    assert again.id == run.id
    assert all(plan.artifact for plan in again.plan())


def test_the_best_allocation_is_there_in_packed_form(run: Run) -> None:
    files = {file.name for file in (run.folder / "stages" / "best").iterdir()}
    assert {"packed.json", "packed.safetensors", "model.json", "units"} <= files


def test_the_command_line_shows_milliseconds_beside_the_sizes(run: Run) -> None:
    results = ["--results", str(run.store.root), "--format", "json"]
    front = CliRunner().invoke(app, ["frontier", run.id, "--over", "ms", "--all", *results])
    assert front.exit_code == 0, front.output
    rows = json.loads(front.stdout)
    assert all(row["ms"] > 0 for row in rows)
    shown = json.loads(CliRunner().invoke(app, ["show", rows[0]["candidate"], *results]).stdout)
    assert shown["allocation"]["ms"] == rows[0]["ms"]
    assert {"latency_ms", "predicted_latency_ms", "latency_error"} <= {row["metric"] for row in shown["metrics"]}


def test_the_example_of_the_readme_loads_the_packed_model_of_the_newest_of_several_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "load_packed" in code)
    shutil.copytree(run.store.root, tmp_path / "layerwise-results", symlinks=True)
    (tmp_path / "workflows").symlink_to(WORKFLOW.parent)
    store = Store.open(tmp_path / "layerwise-results")
    (store.root / "runs" / "latency-budget-00000000" / "stages").mkdir(parents=True)
    for id_, attempt in (("latency-budget-00000000", 1), (run.id, 2)):  # the second, resumed, is the newest
        facts = {"name": "latency-budget", "status": "ok"}
        store.append("runs", [facts], run_id=id_, attempt=attempt, first_seq=0)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["stages"].parent.name == run.id
    assert sum(parameter.numel() for parameter in names["model"].parameters()) > 0
