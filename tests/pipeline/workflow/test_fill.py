"""A stage learns what the stages behind it need, before anything is checked, keyed or shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from layerwise.errors import UsageError, WorkflowError
from layerwise.pipeline.workflow import Workflow, load_workflow
from layerwise.pipeline.workflow.yaml12 import dump
from layerwise.stages.contract import Params, Port, Stage


class GatherParams(Params):
    """What to gather; what nobody says is learnt."""

    gather: list[str] = Field(default_factory=list)


class NeedParams(Params):
    """What of it is needed."""

    needs_of_it: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class FillingStage(Stage):
    """A stage with the hook."""

    fill: Callable[[Any, Sequence[Any]], Any] | None = None


def union(params: GatherParams, following: Sequence[Params]) -> GatherParams:
    wanted = [word for other in following for word in (getattr(other, "needs_of_it", None) or other.gather)]  # type: ignore[attr-defined]
    if "the moon" in wanted:
        raise UsageError("nobody gathers the moon", hint="ask for less")
    return params.model_copy(update={"gather": list(dict.fromkeys([*params.gather, *wanted]))})


def nothing(context: Any, params: Any) -> None: ...


def check(params: NeedParams, feeding: Mapping[str, Sequence[GatherParams]]) -> list[tuple[tuple[str], str]]:
    missing = set(params.needs_of_it) - set(feeding["statistics"][0].gather)
    return [(("needs_of_it",), f"not gathered: {sorted(missing)}")] if missing else []


STAGES: dict[str, Stage] = {
    "gather": FillingStage(
        "gather", GatherParams, nothing, "statistics", {"base": Port("statistics", optional=True)}, fill=union
    ),
    "need": Stage("need", NeedParams, nothing, "result", {"statistics": Port("statistics")}, check=check),
    "end": Stage("end", NeedParams, nothing, "end", {"results": Port("result", many=True)}),
}
HEAD = "version: 1\nmodel: model\nstages:\n"


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Workflow]:
    (tmp_path / "model").mkdir()

    def call(body: str, stages: Mapping[str, Stage] = STAGES) -> Workflow:
        (tmp_path / "flow.yaml").write_text(HEAD + body)
        return load_workflow(tmp_path / "flow.yaml", find_stage=stages)

    return call


def gathered(workflow: Workflow) -> dict[str, list[str]]:
    return {node.id: node.params.gather for node in workflow.nodes if isinstance(node.params, GatherParams)}


def test_a_stage_gets_the_parameters_of_those_that_take_its_artifact_and_of_no_others(load: Any) -> None:
    workflow = load(
        "  stats: {uses: gather, with: {gather: [mean]}}\n"
        "  late: {uses: end, needs: [hard], with: {needs_of_it: [nothing]}}\n"
        "  hard: {uses: need, needs: [stats], with: {needs_of_it: [hessian, mean]}}\n"
        "  easy: {uses: need, needs: [stats], with: {needs_of_it: [norm]}}\n"
    )
    assert gathered(workflow) == {"stats": ["mean", "hessian", "norm"]}
    assert workflow.resolved()["stages"]["stats"]["with"] == {"gather": ["mean", "hessian", "norm"]}


def test_a_workflow_that_is_read_again_as_it_was_resolved_means_the_same(load: Any, tmp_path: Path) -> None:
    first = load("  stats: {uses: gather}\n  hard: {uses: need, needs: [stats], with: {needs_of_it: [hessian]}}\n")
    (tmp_path / "again.yaml").write_text(dump(first.resolved()))
    assert load_workflow(tmp_path / "again.yaml", find_stage=STAGES).resolved() == first.resolved()


def test_instances_of_a_foreach_are_filled_one_by_one(load: Any) -> None:
    workflow = load(
        "  stats: {uses: gather, foreach: [x, y], with: {gather: ['${{ item }}']}}\n"
        "  hard: {uses: need, needs: [stats], foreach: '${{ needs.stats }}', with: {needs_of_it: ['${{ item }}1']}}\n"
        "  more: {uses: need, needs: [stats@x], with: {needs_of_it: [z]}}\n"
    )
    assert gathered(workflow) == {"stats@x": ["x", "x1", "z"], "stats@y": ["y", "y1"]}


def test_a_stage_between_two_hands_on_what_the_one_behind_it_needs(load: Any) -> None:
    workflow = load(
        "  first: {uses: gather}\n  second: {uses: gather, needs: [first]}\n"
        "  hard: {uses: need, needs: [second], with: {needs_of_it: [hessian]}}\n"
    )
    assert gathered(workflow) == {"first": ["hessian"], "second": ["hessian"]}


def test_what_cannot_be_given_is_a_mistake_of_the_workflow_with_its_place(load: Any) -> None:
    body = "  stats: {uses: gather}\n  hard: {uses: need, needs: [stats], with: {needs_of_it: [the moon]}}\n"
    with pytest.raises(WorkflowError) as caught:
        load(body)
    assert str(caught.value).splitlines()[0].endswith(":4:3: stages.stats: nobody gathers the moon (ask for less)")


def test_a_mistake_elsewhere_is_told_alone(load: Any) -> None:
    with pytest.raises(WorkflowError) as caught:
        load("  stats: {uses: gather}\n  hard: {uses: need, needs: [stats], with: {needs_of_it: 3}}\n")
    (mistake,) = caught.value.mistakes
    assert "must be a list" in str(mistake)


def test_without_the_hook_nothing_is_filled(load: Any) -> None:
    plain = {**STAGES, "gather": replace(STAGES["gather"], fill=None)}  # type: ignore[call-arg]
    body = "  stats: {uses: gather}\n  hard: {uses: need, needs: [stats], with: {needs_of_it: [hessian]}}\n"
    with pytest.raises(WorkflowError, match="not gathered"):
        load(body, plain)
