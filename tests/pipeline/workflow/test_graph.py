"""The drawings of a graph."""

from __future__ import annotations

from typing import Any

from layerwise.pipeline.workflow.graph import draw_mermaid, draw_text

BODY = """\
stages:
  stats: {uses: calibrate}
  levels: {uses: compress, needs: [stats], with: {menu: [{method: wanda}]}}
  search: {uses: allocate, needs: [levels], foreach: [ilp, evolve], with: {solver: "${{ item }}"}}
  best: {uses: pick, needs: [search@ilp]}
  score: {uses: evaluate, needs: [search, best]}
"""


def test_the_text_drawing_shows_what_flows(desk: Any) -> None:
    assert draw_text(desk.load(BODY)) == (
        "stats (calibrate) -> statistics\n"
        "levels (compress) -> database\n"
        "  <- statistics from stats\n"
        "search@ilp (allocate) -> allocations\n"
        "  <- database from levels\n"
        "search@evolve (allocate) -> allocations\n"
        "  <- database from levels\n"
        "best (pick) -> model\n"
        "  <- allocations from search@ilp\n"
        "score (evaluate) -> metrics\n"
        "  <- allocations from search@ilp\n"
        "  <- allocations from search@evolve\n"
        "  <- models (model) from best"
    )


def test_the_mermaid_drawing_has_every_node_and_every_arrow(desk: Any) -> None:
    built = desk.load(BODY)
    lines = draw_mermaid(built).splitlines()
    assert lines[0] == "flowchart LR"
    assert lines[1:7] == [f'  n{i}["{node.id}<br/><i>{node.stage.name}</i>"]' for i, node in enumerate(built.nodes)]
    assert '  n1 -- "database" --> n3' in lines
    assert len(lines) == 1 + 6 + sum(len(sources) for node in built.nodes for sources in node.inputs.values())
