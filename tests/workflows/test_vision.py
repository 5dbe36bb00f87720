"""`workflows/vision.yaml`: a CNN and a vision transformer, trained here on handwritten digits, to a frontier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from layerwise.pipeline.display import Display
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.workflow import load_workflow
from layerwise.results.frontier import frontier_table
from layerwise.testing.networks import Cnn, Vit

pytest.importorskip("sklearn", reason="scikit-learn has the digits; it is installed for development")

WORKFLOW = Path(__file__).parents[2] / "workflows" / "vision.yaml"
EPOCHS = 15
"""Enough to read nine digits out of ten."""

OWN = """
from safetensors.torch import load_file
from layerwise.testing.networks import {kind}

def network():
    made = {kind}()
    made.load_state_dict(load_file({weights!r}))
    return made
"""


class Quiet(Display):
    """Keeps what it is told."""


@pytest.mark.parametrize("kind", [Cnn, Vit])
def test_a_frontier_of_accuracy_over_bytes_with_ilp_at_or_below_uniform_at_every_budget(
    kind: Any, tmp_path: Path
) -> None:
    from layerwise.workflows.vision.digits import accuracy, train

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = train(kind(), EPOCHS)
    dense = accuracy(network)
    assert dense > 0.9
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    code = OWN.format(kind=kind.__name__, weights=str(tmp_path / "weights.safetensors"))
    (tmp_path / "own.py").write_text(code, encoding="utf-8")

    workflow = load_workflow(WORKFLOW, sets=[f"model.python={tmp_path / 'own.py'}:network"])
    run = Run(workflow, tmp_path / "results", Quiet())
    run.execute("inline")
    table = frontier_table(run.store, over="bytes", loss="heldout_accuracy", dominated=True)
    metrics = {(row["candidate"], row["metric"]): row["value"] for row in run.store.rows("metrics")}
    assert metrics["dense", "accuracy"] == pytest.approx(dense)
    by_budget = table.set_index(["solver", "budget"])
    budgets = table["budget"].unique()
    assert len(budgets) == 4
    for budget in budgets:
        uniform, ilp = by_budget.loc["uniform", budget], by_budget.loc["ilp", budget]
        assert ilp["kl"] <= uniform["kl"], budget
        assert ilp["heldout_kl"] <= uniform["heldout_kl"], budget
    front = table[table["on_front"]]
    assert front["bytes"].is_monotonic_increasing
    assert front["heldout_accuracy"].is_monotonic_increasing
    # With a fifth of the way from the least to the greatest bytes nothing of note is lost.
    assert by_budget.loc["ilp", "bytes=20%"]["heldout_accuracy"] > dense - 0.02


@pytest.mark.parametrize(("name", "share"), [("cnn", 0.98), ("vit", 0.96)])
def test_the_networks_of_the_example_read_the_digits(name: str, share: float) -> None:
    from layerwise.workflows.vision import digits

    assert digits.accuracy(getattr(digits, name)().eval()) == pytest.approx(share, abs=0.005)
