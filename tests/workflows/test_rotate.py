"""`workflows/rotate.yaml`: two branches of one graph, which differ in the model only."""

from __future__ import annotations

from pathlib import Path

from layerwise.pipeline.workflow import load_workflow

WORKFLOW = Path(__file__).parents[2] / "workflows" / "rotate.yaml"


def test_the_rotated_branch_is_the_other_one_with_the_rotated_model() -> None:
    nodes = {node.id: node for node in load_workflow(WORKFLOW).nodes}
    assert nodes["rotated_statistics"].inputs == {"model": ("rotated",)}
    assert nodes["rotated_score"].inputs["models"] == ("rotated",)
    for stage in ("statistics", "levels", "profile", "search", "score"):
        plain, rotated = nodes[stage], nodes[f"rotated_{stage}"]
        assert plain.params == rotated.params
        sources = {port: tuple(f"rotated_{name}" for name in names) for port, names in plain.inputs.items()}
        assert sources == {port: names for port, names in rotated.inputs.items() if names != ("rotated",)}
