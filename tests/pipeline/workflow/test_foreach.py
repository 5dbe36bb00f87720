"""`foreach`: one entry, many instances, and what feeds what. The head of a file has 5 lines."""

from __future__ import annotations

from typing import Any

import pytest

BODY = """\
stages:
  stats: {uses: calibrate}
  levels: {uses: compress, needs: [stats], with: {menu: [{method: wanda}]}}
"""


def inputs(workflow: Any) -> dict[str, Any]:
    """What feeds each node, stats and levels left out."""
    return {node.id: dict(node.inputs) for node in workflow.nodes if node.id not in ("stats", "levels")}


def test_a_stage_runs_once_per_item_and_a_consumer_receives_all(desk: Any) -> None:
    workflow = desk.load(
        BODY
        + "  search: {uses: allocate, needs: [levels], foreach: [ilp, evolve], with: {solver: '${{ item }}'}}\n"
        + "  best: {uses: pick, foreach: '${{ needs.search }}'}\n"
        + "  score: {uses: evaluate, needs: [search, best]}\n"
    )
    assert inputs(workflow) == {
        "search@ilp": {"database": ("levels",)},
        "search@evolve": {"database": ("levels",)},
        "best@ilp": {"allocations": ("search@ilp",)},
        "best@evolve": {"allocations": ("search@evolve",)},
        "score": {"allocations": ("search@ilp", "search@evolve"), "models": ("best@ilp", "best@evolve")},
    }


def test_stages_on_the_same_axis_are_aligned_however_far_apart(desk: Any) -> None:
    workflow = desk.load(
        BODY
        + "  search: {uses: allocate, needs: [levels], foreach: [1, 2], with: {seed: '${{ item }}'}}\n"
        + "  best: {uses: pick, foreach: '${{ needs.search }}', needs: search, with: {pick: 'rank:${{ item }}'}}\n"
        + "  score: {uses: evaluate, foreach: '${{ needs.best }}', needs: [best, search]}\n"
    )
    assert inputs(workflow)["score@2"] == {"allocations": ("search@2",), "models": ("best@2",)}
    assert [node.params.pick for node in workflow.nodes if node.id.startswith("best")] == ["rank:1", "rank:2"]


def test_one_instance_can_be_named(desk: Any) -> None:
    workflow = desk.load(
        BODY
        + "  search: {uses: allocate, needs: [levels], foreach: [ilp, evolve], with: {solver: '${{ item }}'}}\n"
        + "  best: {uses: pick, needs: [search@evolve]}\n"
    )
    assert inputs(workflow)["best"] == {"allocations": ("search@evolve",)}


@pytest.mark.parametrize(
    ("items", "ids"),
    [
        ("[3, 3.0, 2:4, 1e-4, true, re:x]", ["3", "3.0", "2:4", "0.0001", "true", "re:x"]),
        ("[{name: a, x: 1}, {x: 2}, [1]]", ["a", "1", "2"]),
        ("['a b/c', '']", ["a-b-c", "1"]),
    ],
)
def test_instances_are_named_after_their_items(desk: Any, items: str, ids: list[str]) -> None:
    workflow = desk.load(f"stages:\n  stats: {{uses: calibrate, foreach: {items}}}\n")
    assert [node.id for node in workflow.nodes] == [f"stats@{id_}" for id_ in ids]


def test_an_item_may_be_a_map_and_come_from_a_parameter(desk: Any) -> None:
    body = """\
    params: {runs: [{name: small, shards: 2}, {name: large, shards: 9}]}
    stages:
      stats: {uses: calibrate, foreach: "${{ params.runs }}", with: {shards: "${{ item.shards }}"}}
    """
    assert [(node.id, node.params.shards) for node in desk.load(body).nodes] == [("stats@small", 2), ("stats@large", 9)]
    assert [node.id for node in desk.load(body, params={"runs": "[{shards: 1}]"}).nodes] == ["stats@0"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            BODY
            + "  search: {uses: allocate, needs: [levels], foreach: [1]}\n"
            + "  best: {uses: pick, needs: [search]}\n",
            "10:30: stages.best.needs.0: input 'allocations' takes one allocations, but 'search' is a foreach "
            "(search@1); name one of them, or write foreach: ${{ needs.search }}",
        ),
        (
            "stages: {a: {uses: calibrate, foreach: []}}\n",
            "6:40: stages.a.foreach: must be a list, ${{ params.x }} or ${{ needs.x }}, got an empty list",
        ),
        (
            "stages: {a: {uses: calibrate, foreach: 3}}\n",
            "6:40: stages.a.foreach: must be a list, ${{ params.x }} or ${{ needs.x }}, got the whole number 3",
        ),
        (
            "stages: {a: {uses: calibrate, foreach: [1, 1]}}\n",
            "6:44: stages.a.foreach.1: '1' is listed twice; stage ids must differ",
        ),
        (
            "stages: {a: {uses: calibrate, foreach: '${{ needs.b }}'}, bb: {uses: calibrate}}\n",
            "6:40: stages.a.foreach: unknown stage id 'b' (did you mean 'bb'?)",
        ),
        (
            BODY + "  best: {uses: pick, foreach: '${{ needs.levels }}'}\n",
            "9:31: stages.best.foreach: 'levels' has no foreach, so there is nothing to follow",
        ),
        (
            "stages: {a: {uses: calibrate, with: {shards: '${{ item }}'}}}\n",
            "6:46: stages.a.with.shards: 'item' is known only inside a stage with foreach",
        ),
        (
            "stages: {a: {uses: calibrate, foreach: [1], with: {shards: '${{ item.x }}'}}}\n",
            "6:60: stages.a.with.shards: unknown name 'item.x': 'item' is the whole number 1 and has nothing inside",
        ),
        (
            "stages: {a: {uses: calibrate, foreach: [1, 0], with: {shards: '${{ item }}'}}}\n",
            "6:44: stages.a.with.shards: must be at least 1, got 0",
        ),
        (
            "stages: {a: {uses: calibrate, foreach: [b]}, a@b: {uses: calibrate}}\n",
            "6:46: stages.a@b: there are two stages 'a@b'; rename one",
        ),
    ],
)
def test_a_mistake_in_a_foreach_has_its_place(desk: Any, body: str, message: str) -> None:
    assert message in desk.mistakes(body)


def test_stages_that_follow_each_other_are_reported_and_not_followed_forever(desk: Any) -> None:
    wrong = desk.mistakes(
        "stages:\n  a: {uses: pick, foreach: '${{ needs.b }}'}\n  b: {uses: pick, foreach: '${{ needs.a }}'}\n"
    )
    assert "8:28: stages.b.foreach: foreach follows itself in a circle: a -> b -> a" in wrong


def test_a_mistake_common_to_all_instances_is_reported_once(desk: Any) -> None:
    assert desk.mistakes("stages:\n  a: {uses: calibrate, foreach: [1, 2, 3], with: {shards: 0}}\n") == [
        "7:59: stages.a.with.shards: must be at least 1, got 0"
    ]


def test_an_unknown_list_leaves_the_rest_of_the_stage_checked(desk: Any) -> None:
    body = "stages:\n  a: {uses: calibrate, foreach: '${{ params.x }}', with: {data: '${{ item }}', shards: 0}}\n"
    wrong = desk.mistakes(body)
    assert len(wrong) == 2
    assert wrong[1] == "7:88: stages.a.with.shards: must be at least 1, got 0"
