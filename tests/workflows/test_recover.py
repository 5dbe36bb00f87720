"""`workflows/recover.yaml`: one compressed model, repaired in several ways, all of them compared with it."""

from __future__ import annotations

from pathlib import Path

from layerwise.pipeline.workflow import load_workflow

WORKFLOW = Path(__file__).parents[2] / "workflows" / "recover.yaml"


def test_every_repair_is_of_one_model_and_is_compared_with_it() -> None:
    nodes = {node.id: node for node in load_workflow(WORKFLOW).nodes}
    repaired = {name for name, node in nodes.items() if node.stage.name == "recover"}
    assert len(repaired) > 3
    assert {nodes[name].inputs["model"] for name in repaired} == {("best",)}
    assert set(nodes["score"].inputs["models"]) == {"best", *repaired}
    assert nodes["compressed-statistics"].inputs == {"model": ("best",)}
    assert nodes["compressed-statistics"].params.statistics == ["hessian"], "what the repairs behind it need"
    assert nodes["adapters"].inputs["statistics"] == ("compressed-statistics",)
