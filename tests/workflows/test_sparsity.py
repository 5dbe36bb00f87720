"""`workflows/sparsity.yaml`: one budget for all, and a level that meets it exactly when every layer is pruned alike."""

from __future__ import annotations

from pathlib import Path

from layerwise.pipeline.workflow import load_workflow
from layerwise.stages.compress.pruning import lost

WORKFLOW = Path(__file__).parents[2] / "workflows" / "sparsity.yaml"


def test_every_target_is_a_level_and_every_solver_gets_all_of_them() -> None:
    nodes = {node.id: node for node in load_workflow(WORKFLOW).nodes}
    (pruning,) = [entry for entry in nodes["levels"].params.menu if entry.method == "sparsegpt"]
    searches = [node for node in nodes.values() if node.stage.name == "allocate"]
    assert {node.params.solver for node in searches} == {"uniform", "branch", "evolve"}
    for node in searches:
        (densities,) = node.params.budgets.values()
        for density in densities:
            (share,) = [share for share in pruning.sparsity if abs(1 - density - share) < 1e-12]
            for weights in (128 * 128, 128 * 384):  # of the demo model's units
                assert weights - lost(weights, share) <= density * weights + 1e-6
    assert set(nodes["score"].inputs["allocations"]) == {node.id for node in searches}
