"""The plan: what each stage finds in the cache, and the words for why it must be made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from layerwise.pipeline.runs import plan as plan_module
from layerwise.pipeline.runs.plan import _as_json, _differences
from layerwise.pipeline.source import source_digest

STAGES = ["numbers", "parity", "sum", "aside"]


def test_a_changed_parameter_reruns_what_depends_on_it_and_is_named(workshop: Any) -> None:
    workshop.run()
    workshop.traces()
    run, display = workshop.run("stages.numbers.with.scale=2")
    assert display.started["numbers"] == "changed: with.scale (1 -> 2)"
    assert display.started["parity"].startswith("changed: inputs.numbers")
    assert display.started["sum"].startswith("changed: inputs.numbers")
    assert display.of("cached") == ["aside"]
    assert workshop.output(run, "sum") == 0


def test_the_reason_compares_with_the_newest_artifact_whatever_its_run_is_called(workshop: Any) -> None:
    for scale in range(2, 7):
        _, display = workshop.run(f"stages.numbers.with.scale={scale}")
        before = "not there yet" if scale == 2 else f"changed: with.scale ({scale - 1} -> {scale})"
        assert display.started["numbers"] == before


def test_a_plan_says_what_would_run_and_runs_nothing(workshop: Any) -> None:
    run, _ = workshop.prepare()
    assert [(plan.node.id, plan.reason) for plan in run.plan()] == [
        ("numbers", "not there yet"),
        ("parity", "waits for numbers"),
        ("sum", "waits for parity"),
        ("aside", "not there yet"),
    ]
    assert not workshop.traces()
    workshop.run()
    again, _ = workshop.prepare("stages.aside.with.items=3")
    assert [plan.reason for plan in again.plan()] == ["", "", "", "changed: with.items (2 -> 3)"]
    assert all(plan.artifact for plan in again.plan()[:3])


def test_changed_code_and_changed_versions_rerun_a_stage_and_are_named(
    workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.run()
    monkeypatch.setattr(plan_module, "source_digest", lambda *starts: "5" * 64)
    _, display = workshop.run()
    assert display.started == dict.fromkeys(STAGES, "changed: source")
    versions = {"torch": "9.1", "transformers": "5.14"}
    monkeypatch.setattr(plan_module, "installed_version", lambda name: versions[name])
    workshop.run()
    versions["torch"] = "9.2"
    _, display = workshop.run()
    assert display.started == dict.fromkeys(STAGES, "changed: versions.torch (9.1 -> 9.2)")


def test_parameters_may_name_modules_that_count_as_code_of_their_stage(
    workshop: Any, fake_stages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Named(fake_stages.CountParams):
        def sources(self) -> list[str]:
            return ["layerwise.stages.compress.rtn"]

    plain = {plan.node.id: plan.key for plan in workshop.prepare()[0].plan()}
    monkeypatch.setitem(fake_stages.STAGES, "count", replace(fake_stages.COUNT, params=Named))
    named = {plan.node.id: plan for plan in workshop.prepare()[0].plan()}
    assert named["numbers"].key != plain["numbers"]
    assert named["numbers"].material["source"] == source_digest(fake_stages.count, "layerwise.stages.compress.rtn")


@pytest.mark.parametrize(
    ("left", "right", "found"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"with": {"bits": [3, 4]}}, {"with": {"bits": [2, 3, 4]}}, ["with.bits ([3, 4] -> [2, 3, 4])"]),
        ({"with": {"x": 1}}, {"with": {"y": 1}}, ["with.x (1 -> None)", "with.y (None -> 1)"]),
        ({"model": "a" * 64}, {"model": "b" * 64}, ["model"]),
        ({"a": {"b": 1}, "c": 2}, {"a": 3, "c": 4}, ["a ({'b': 1} -> 3)", "c (2 -> 4)"]),
    ],
)
def test_differences_name_the_path_and_short_values(left: Any, right: Any, found: list[str]) -> None:
    assert _differences(left, right) == found


def test_a_tuple_is_the_list_that_it_was_written_as(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.run()
    run, _ = workshop.prepare("stages.numbers.with.scale=3")
    given = plan_module.key_material
    monkeypatch.setattr(plan_module, "key_material", lambda *args: {**given(*args), "inputs": {"x": (4, 1)}})
    explained = run.plan()[0].reason
    assert explained == "changed: inputs.x (None -> [4, 1]), with.scale (1 -> 3)"
    assert _differences({"x": [4, 1]}, _as_json({"x": (4, 1)})) == []
