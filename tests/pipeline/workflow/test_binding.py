"""Which stage feeds which input, and in which order they run."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.pipeline.workflow.binding import Reference, Wiring, bind, run_order
from layerwise.pipeline.workflow.report import Report
from layerwise.pipeline.workflow.yaml12 import Place
from layerwise.stages.contract import Params, Port, Stage

BODY = """\
stages:
  stats: {uses: calibrate}
  levels: {uses: compress, needs: [stats], with: {menu: [{method: wanda}]}}
  search: {uses: allocate, needs: [levels]}
"""


def test_inputs_are_bound_by_type_in_whatever_order_they_are_named(desk: Any) -> None:
    for needs in ("[levels, stats]", "[stats, levels]"):
        workflow = desk.load(BODY.replace("needs: [levels]", f"needs: {needs}"))
        assert dict(workflow.nodes[2].inputs) == {"database": ("levels",), "statistics": ("stats",)}


def test_inputs_say_which_where_the_type_leaves_a_choice(desk: Any) -> None:
    body = BODY + "  a: {uses: pick, needs: search}\n  b: {uses: pick, needs: search}\n"
    workflow = desk.load(body + "  both: {uses: merge, inputs: {right: a, left: b}}\n")
    assert dict(workflow.nodes[-1].inputs) == {"right": ("a",), "left": ("b",)}
    workflow = desk.load(body + "  both: {uses: merge, needs: [a, b], inputs: {right: a}}\n")
    assert dict(workflow.nodes[-1].inputs) == {"right": ("a",), "left": ("b",)}
    workflow = desk.load(body + "  score: {uses: evaluate, inputs: {models: [b, a]}}\n")
    assert dict(workflow.nodes[-1].inputs) == {"models": ("b", "a")}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x: {uses: allocate}", "10:3: stages.x: needs an input of type 'database'; add 'levels' to needs"),
        (
            "x: {uses: allocate, needs: [search, levels]}",
            "10:31: stages.x.needs.0: 'search' gives an allocations, which 'allocate' cannot take "
            "(it takes: database, statistics)",
        ),
        (
            "x: {uses: allocate, needs: [lvels]}",
            "10:31: stages.x.needs.0: unknown stage id 'lvels' (did you mean 'levels'?)",
        ),
        (
            "x: {uses: allocate, needs: lvels}",
            "10:30: stages.x.needs: unknown stage id 'lvels' (did you mean 'levels'?)",
        ),
        ("x: {uses: pick, needs: [search, search]}", "10:35: stages.x.needs.1: 'search' is listed twice"),
        (
            "x: {uses: pick, needs: [search, also]}\n  also: {uses: allocate, needs: levels}",
            "10:35: stages.x.needs.1: 'search' and 'also' both give an allocations, but input 'allocations' takes one; "
            "ambiguous, say which with inputs: allocations: search",
        ),
        (
            "a: {uses: pick, needs: search}\n  x: {uses: merge, needs: [a], inputs: {left: a}}",
            "11:3: stages.x: needs an input of type 'model' as 'right'; add 'a' to inputs: right",
        ),
        (
            "a: {uses: pick, needs: search}\n  x: {uses: merge, needs: [a]}",
            "11:28: stages.x.needs.0: a model from 'a' is ambiguous, say which with inputs: left: a or right: a",
        ),
        (
            "x: {uses: pick, inputs: {allocation: search}}",
            "10:40: stages.x.inputs.allocation: 'pick' has no such input (did you mean 'allocations'?)",
        ),
        (
            "x: {uses: pick, inputs: {allocations: levels}}",
            "10:41: stages.x.inputs.allocations: takes an allocations, but 'levels' gives a database",
        ),
        (
            "x: {uses: pick, inputs: {allocations: serch}}",
            "10:41: stages.x.inputs.allocations: unknown stage id 'serch' (did you mean 'search'?)",
        ),
        (
            "x: {uses: pick, needs: [also], inputs: {allocations: search}}\n  also: {uses: allocate, needs: levels}",
            "10:27: stages.x.needs.0: 'also' gives an allocations, but inputs already says what goes to 'allocations'",
        ),
    ],
)
def test_a_wrong_connection_is_one_message_at_its_place(desk: Any, line: str, message: str) -> None:
    assert desk.mistakes(f"{BODY}  {line}\n") == [message]


def test_a_missing_input_that_no_stage_gives_names_the_stage_that_would(desk: Any) -> None:
    assert desk.mistakes("stages: {search: {uses: allocate}, score: {uses: evaluate}}\n") == [
        "6:10: stages.search: needs an input of type 'database' (from a `compress` stage); add it to needs",
        "6:36: stages.score: needs an input of type 'model' (from a `pick` or `merge` stage); add it to needs",
    ]


def test_an_unknown_producer_is_not_also_a_missing_input(desk: Any) -> None:
    assert desk.mistakes("stages: {a: {uses: calibrat}, levels: {uses: allocate, needs: [a]}}\n") == [
        "6:20: stages.a.uses: unknown stage 'calibrat' (did you mean 'calibrate'?)"
    ]


def test_a_circle_is_reported_once_with_all_its_stages(desk: Any) -> None:
    # After the circle only; it is in no circle itself.
    body = BODY.replace("stats: {uses: calibrate}", "stats: {uses: calibrate, needs: [search]}")
    wrong = desk.mistakes(body + "  best: {uses: pick, needs: search}\n")
    assert [text for text in wrong if "circle" in text] == [
        "7:36: stages.stats.needs.0: stages need each other in a circle: stats -> search -> levels -> stats"
    ]
    assert "7:36: stages.stats.needs.0: 'search' gives an allocations, which 'calibrate' cannot take" in wrong[0]


def test_a_stage_that_needs_itself_is_a_circle(desk: Any) -> None:
    wrong = desk.mistakes("stages:\n  a: {uses: merge, needs: [a]}\n")
    assert "7:28: stages.a.needs.0: stages need each other in a circle: a -> a" in wrong


def test_stages_run_in_the_order_of_the_file_as_far_as_their_needs_allow(desk: Any) -> None:
    body = """\
    stages:
      score: {uses: evaluate, needs: [best]}
      other: {uses: calibrate}
      best: {uses: pick, needs: search}
      search: {uses: allocate, needs: levels}
      levels: {uses: compress, needs: stats, with: {menu: [{method: wanda}]}}
      stats: {uses: calibrate}
    """
    order = [node.id for node in desk.load(body).nodes]
    assert order == ["other", "stats", "levels", "search", "best", "score"]


HERE = Place("f")
MIX = Stage("mix", Params, lambda context, params: None, "mix", {"mixes": Port("mix", many=True, optional=True)})


@given(st.integers(1, 7).flatmap(lambda n: st.lists(st.sets(st.integers(0, n - 1)), min_size=n, max_size=n)))
def test_either_the_order_is_complete_and_sound_or_a_circle_is_reported(needs: list[set[int]]) -> None:
    wirings = [
        Wiring(
            f"s{i}", f"s{i}", MIX, HERE, tuple(Reference(f"s{j}", HERE, ("stages", f"s{i}")) for j in sorted(sources))
        )
        for i, sources in enumerate(needs)
    ]
    report = Report()
    inputs = bind(wirings, report, lambda kind: [])
    assert not report.mistakes
    assert {id_: set(ports.get("mixes", ())) for id_, ports in inputs.items()} == {
        f"s{i}": {f"s{j}" for j in sources} for i, sources in enumerate(needs)
    }
    order = run_order(wirings, report)
    reach = [set(sources) for sources in needs]  # Warshall's closure, as an oracle for circles
    for k in range(len(needs)):
        for i in range(len(needs)):
            if k in reach[i]:
                reach[i] |= reach[k]
    cyclic = any(i in reach[i] for i in range(len(needs)))
    assert cyclic == bool(report.mistakes)
    assert cyclic == (len(order) < len(needs))
    for position, id_ in enumerate(order):
        assert {f"s{j}" for j in needs[int(id_[1:])]} <= set(order[:position])
