"""The graph of a workflow: which stage feeds which, in what order they run, and how it looks.

`load_workflow` has already bound the inputs and refused circles, so a `Graph` is always sound.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerwise.pipeline.workflow.load import Node, Workflow


@dataclass(frozen=True)
class Graph:
    """Stage instances and the artifacts that flow between them.

    Args:
        nodes: producers first, otherwise in the order of the file.
    """

    nodes: tuple[Node, ...]

    def node(self, id_: str) -> Node:
        """The node of an id; KeyError if there is none."""
        return {node.id: node for node in self.nodes}[id_]

    def producers(self, id_: str) -> tuple[str, ...]:
        """The nodes that feed a node, each once, in the order of its inputs."""
        return tuple(dict.fromkeys(source for sources in self.node(id_).inputs.values() for source in sources))

    def consumers(self, id_: str) -> tuple[str, ...]:
        """The nodes that a node feeds, in running order."""
        return tuple(node.id for node in self.nodes if id_ in self.producers(node.id))

    def needed_by(self, *ids: str) -> frozenset[str]:
        """Some nodes and everything that they need, directly or not."""
        found: set[str] = set(ids)
        for node in reversed(self.nodes):  # a consumer comes before its producers
            if node.id in found:
                found.update(self.producers(node.id))
        return frozenset(found)


def build_graph(workflow: Workflow) -> Graph:
    """The graph of a workflow."""
    return Graph(workflow.nodes)


def draw_text(graph: Graph) -> str:
    """The graph as indented text: each node with what it gives, below it what it takes and from where."""
    lines = []
    for node in graph.nodes:
        lines.append(f"{node.id} ({node.stage.name}) -> {node.stage.gives}")
        for port, sources in node.inputs.items():
            kind = node.stage.takes[port].type
            label = kind if port == kind else f"{port} ({kind})"
            lines += [f"  <- {label} from {source}" for source in sources]
    return "\n".join(lines)


def draw_mermaid(graph: Graph) -> str:
    """The graph as a Mermaid flow chart, which GitHub and many editors draw."""
    number = {node.id: f"n{index}" for index, node in enumerate(graph.nodes)}
    lines = ["flowchart LR"]
    lines += [f'  {number[node.id]}["{node.id}<br/><i>{node.stage.name}</i>"]' for node in graph.nodes]
    for node in graph.nodes:
        for port, sources in node.inputs.items():
            lines += [
                f'  {number[source]} -- "{node.stage.takes[port].type}" --> {number[node.id]}' for source in sources
            ]
    return "\n".join(lines)
