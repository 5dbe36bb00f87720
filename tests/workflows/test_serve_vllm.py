"""`workflows/serve_vllm.yaml`: the budget is counted in the format that is written."""

from __future__ import annotations

from pathlib import Path

from layerwise.pipeline.workflow import load_workflow

WORKFLOW = Path(__file__).parents[2] / "workflows" / "serve_vllm.yaml"


def test_bytes_are_budgeted_in_the_format_that_is_exported_with_fused_layers_alike() -> None:
    nodes = {node.id: node for node in load_workflow(WORKFLOW).nodes}
    search, out = nodes["search"].params, nodes["out"].params
    assert search.format == out.format == "compressed_tensors"
    assert (search.any_bits, search.asymmetric) == (out.any_bits, out.asymmetric)
    assert search.tie == "fused"
    assert set(search.budgets) == {"bytes"}
