"""Workflows of repairs: models that are compared are of one another."""

from __future__ import annotations

from pathlib import Path

from layerwise.pipeline.workflow import load_workflow

WORKFLOWS = Path(__file__).parents[2] / "workflows"


def test_every_repair_is_of_one_model_and_is_compared_with_it() -> None:
    nodes = {node.id: node for node in load_workflow(WORKFLOWS / "recover.yaml").nodes}
    repaired = {name for name, node in nodes.items() if node.stage.name == "recover"}
    assert len(repaired) > 3
    assert {nodes[name].inputs["model"] for name in repaired} == {("best",)}
    assert set(nodes["score"].inputs["models"]) == {"best", *repaired}
    assert nodes["compressed-statistics"].inputs == {"model": ("best",)}
    assert nodes["compressed-statistics"].params.statistics == ["hessian"], "what the repairs behind it need"
    assert nodes["adapters"].inputs["statistics"] == ("compressed-statistics",)


def test_what_is_pruned_is_trained_quantized_and_repaired_in_turn() -> None:
    nodes = {node.id: node for node in load_workflow(WORKFLOWS / "prune_finetune.yaml").nodes}
    assert nodes["trained"].inputs["model"] == ("pruned",)
    assert nodes["trained-statistics"].inputs == {"model": ("trained",)}
    assert nodes["repaired"].inputs["model"] == ("quantized",)
    assert set(nodes["score"].inputs["models"]) == {"pruned", "trained", "quantized", "repaired"}
