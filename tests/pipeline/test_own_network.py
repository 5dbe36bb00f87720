"""Workflows with a network and tensors of the user's own: every stage, keys, and what is refused before it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import DataError, UnsupportedModel, UsageError, WorkflowError
from layerwise.pipeline.cluster.shipping import cargo
from layerwise.pipeline.display import Display
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.workflow import load_workflow
from layerwise.results.frontier import frontier_table

CODE = """
import torch
from layerwise.testing.networks import small_cnn
from beside import images

def network():
    return small_cnn()

def calibration():
    return images(0, 40)

def heldout():
    inputs, _ = images(1, 16)
    with torch.no_grad():
        return inputs, small_cnn()(inputs).argmax(1)
"""

BESIDE = """
import torch

def images(seed, n):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 10
"""

FLOW = """
version: 1
model: {python: own:network, trust: true}
data:
  calibration: {python: own.py:calibration}
  heldout: {python: own.py:heldout}
stages:
  stats: {uses: calibrate, with: {targets: ["re:"]}}
  levels:
    uses: compress
    needs: [stats]
    with:
      menu:
        - {method: rtn, bits: [4], group_size: -1}
        - {method: gptq, bits: [2, 8], group_size: -1}
        - {method: magnitude, sparsity: 0.5}
  profile: {uses: profile, needs: [levels]}
  search: {uses: allocate, needs: [levels, profile], with: {solver: ilp, budgets: {bytes: [30%, 70%]}}}
  best: {uses: apply, needs: [search, levels], with: {pick: knee}}
  score: {uses: evaluate, needs: [search, levels, best]}
"""


class Quiet(Display):
    """Keeps what it is told."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name, text in (("own.py", CODE), ("beside.py", BESIDE), ("flow.yaml", FLOW)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(place: Path) -> Callable[..., Run]:
    def run_it(*sets: str) -> Run:
        return Run(load_workflow(place / "flow.yaml", sets=sets), place / "results", Quiet())

    return run_it


def test_a_classifier_goes_through_every_stage_to_a_frontier_of_accuracy(run: Callable[..., Run]) -> None:
    made = run()
    made.execute("inline")
    metrics = {(row["candidate"], row["metric"]): row["value"] for row in made.store.rows("metrics")}
    # The held-out labels are what the dense network says.
    assert metrics["dense", "accuracy"] == 1
    assert metrics["dense", "kl"] == 0
    assert {metric for _, metric in metrics} == {"accuracy", "cross_entropy", "kl", "agreement"}
    models = {candidate.removesuffix("@model") for candidate, _ in metrics if candidate.endswith("@model")}
    for candidate in models:  # what was written is what was searched
        for metric in ("accuracy", "kl", "cross_entropy"):
            assert metrics[f"{candidate}@model", metric] == pytest.approx(metrics[candidate, metric], abs=1e-6)
    table = frontier_table(made.store, over="bytes", loss="heldout_accuracy", dominated=True)
    assert table["heldout_accuracy"].notna().all()
    front = table[table["on_front"]]
    assert front["heldout_accuracy"].is_monotonic_increasing
    assert front["bytes"].is_monotonic_increasing
    statuses = {row["unit"]: row["status"] for row in made.store.rows("units")}
    assert set(statuses.values()) == {"ok"}
    fallen = [row for row in made.store.rows("levels") if row["status"] != "ok"]
    assert not fallen, "also convolutions in groups have Hessians"

    again = run()
    assert again.id == made.id
    assert all(plan.artifact is not None for plan in again.plan()), "nothing is made twice"


@pytest.mark.parametrize(
    ("file", "before", "after", "changes"),
    [
        ("own.py", "return small_cnn()", "return small_cnn().double().float()", True),  # the code
        ("beside.py", "% 10", "% 9", True),  # the labels, from what the code imports
        ("own.py", "import torch\n", "import torch  # as before\n", False),
    ],
)
def test_a_changed_function_is_a_new_key_and_a_comment_is_none(
    run: Callable[..., Run], place: Path, file: str, before: str, after: str, changes: bool
) -> None:
    first = run()
    path = place / file
    path.write_text(path.read_text().replace(before, after, 1))
    assert (run().id != first.id) == changes


def test_what_stands_beside_a_function_is_that_of_its_folder_as_it_is_now(run: Callable[..., Run], place: Path) -> None:
    first = run().sources.data_digests
    beside = place / "beside.py"
    beside.write_text(beside.read_text().replace("manual_seed(seed)", "manual_seed(seed + 7)"))
    second = run().sources.data_digests
    assert all(first[name] != second[name] for name in ("calibration", "heldout"))


def test_code_that_a_workflow_names_is_not_run_without_trust(run: Callable[..., Run], place: Path) -> None:
    (place / "own.py").write_text("raise SystemExit('this code was run')")
    (place / "flow.yaml").write_text(FLOW.replace(", trust: true", ""))
    with pytest.raises(WorkflowError, match=r"flow.yaml:3:8: model: own:network is code, .* not run; add trust: true"):
        load_workflow(place / "flow.yaml")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("data.heldout={text: own.py}", "a network of your own takes tensors: give {python: file.py:function}"),
        ("data.heldout={python: missing.py:heldout}", "file not found: .*missing.py"),
        ("data.heldout={python: own}", "'own' names no function"),
        ("data.heldout={python: own.py:calibration}", "reads the same text .* as 'calibration'"),
        ("stages.best.with.packed=true", "apply takes language models only, with these parameters"),
        ("  out: {uses: export, needs: [best]}", "export takes language models only"),
        ("  faster: {uses: latency, needs: [levels]}", "latency takes language models only"),
        (
            "  turned: {uses: transform, with: {transforms: [{method: rotation}]}}",
            "transform takes language models only",
        ),
    ],
)
def test_what_cannot_be_is_told_before_any_code_is_run(place: Path, change: str, found: str) -> None:
    (place / "own.py").write_text("raise SystemExit('this code was run')")
    stage = change if change.startswith(" ") else ""
    (place / "flow.yaml").write_text(f"{FLOW}{stage}\n")
    with pytest.raises(WorkflowError, match=found):
        load_workflow(place / "flow.yaml", sets=[] if stage else [change])


@pytest.mark.parametrize(
    ("code", "error", "found"),
    [
        ("def network():\n    return 3", UnsupportedModel, "gives a int, and not a torch.nn.Module"),
        ("def network():\n    raise KeyError('weights')", UsageError, r"own.py:network fails: KeyError: 'weights'"),
        ("def calibration():\n    return [[1.0], [float('nan')]]", DataError, "inputs that are NaN or Inf"),
        ("def calibration():\n    return 1, 2, 3", DataError, "gives 3 things"),
        ("def calibration():\n    return images(0, 4)[0], [1.5] * 4", DataError, "labels of shape"),
        ("import no_such_module", UsageError, "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_functions_that_give_something_else_are_refused(
    run: Callable[..., Run], place: Path, code: str, error: Any, found: str
) -> None:
    (place / "own.py").write_text(f"{CODE}\n{code}\n")
    with pytest.raises(error, match=found):
        run()


def test_labels_are_needed_for_accuracy_and_must_be_classes(run: Callable[..., Run], place: Path) -> None:
    path = place / "own.py"
    path.write_text(f"{CODE}\ndef heldout():\n    return images(1, 16)[0]\n")
    with pytest.raises(DataError, match="accuracy cannot be measured: the data has no labels"):
        run().execute("inline")
    run("stages.score.with.metrics=[kl, agreement]").execute("inline")
    path.write_text(f"{CODE}\ndef heldout():\n    return images(1, 16)[0], [10] * 16\n")
    with pytest.raises(DataError, match="a label is 10, but the network has 10 classes, from 0 on"):
        run().execute("inline")


def test_a_network_of_the_users_own_is_not_shipped_to_a_cluster(place: Path) -> None:
    with pytest.raises(UsageError, match="its code is not shipped"):
        cargo(load_workflow(place / "flow.yaml"))
