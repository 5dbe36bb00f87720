"""How the graph of a workflow looks: which stage feeds which, producers first."""

from __future__ import annotations

from layerwise.pipeline.workflow.load import Workflow


def draw_text(workflow: Workflow) -> str:
    """The graph as indented text: each node with what it gives, below it what it takes and from where."""
    lines = []
    for node in workflow.nodes:
        lines.append(f"{node.id} ({node.stage.name}) -> {node.stage.gives}")
        for port, sources in node.inputs.items():
            kind = node.stage.takes[port].type
            label = kind if port == kind else f"{port} ({kind})"
            lines += [f"  <- {label} from {source}" for source in sources]
    return "\n".join(lines)


def draw_mermaid(workflow: Workflow) -> str:
    """The graph as a Mermaid flow chart, which GitHub and many editors draw."""
    number = {node.id: f"n{index}" for index, node in enumerate(workflow.nodes)}
    lines = ["flowchart LR"]
    lines += [f'  {number[node.id]}["{node.id}<br/><i>{node.stage.name}</i>"]' for node in workflow.nodes]
    for node in workflow.nodes:
        for port, sources in node.inputs.items():
            lines += [
                f'  {number[source]} -- "{node.stage.takes[port].type}" --> {number[node.id]}' for source in sources
            ]
    return "\n".join(lines)
