"""Mistakes that show only when the parameters of several stages are read together are found before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerwise.errors import WorkflowError
from layerwise.pipeline.workflow import load_workflow

WORKFLOW = """\
version: 1
model: .
data:
  calibration: {text: text.txt, sequence_length: 8}
stages:
  stats: {uses: calibrate}
  levels: {uses: compress, needs: [stats], with: {menu: [{method: rtn, bits: [2, 4]}]}}
  profile: {uses: profile, needs: [levels], with: {metrics: [output_error]}}
  search:
    uses: allocate
    needs: [levels, profile]
    with: {solver: ilp, loss: output_error, budgets: {bits: 3}}
"""


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    (tmp_path / "flow.yaml").write_text(WORKFLOW, encoding="utf-8")
    return tmp_path / "flow.yaml"


def test_a_workflow_without_mistakes_passes(workflow: Path) -> None:
    assert len(load_workflow(workflow).nodes) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.search.with.budgets.bits=1.5", "1.5 bits per weight is out of reach: the menu has 2 or more"),
        ("stages.search.with.loss=kl", "the profile does not measure kl, only output_error"),
        ("stages.search.needs=[levels]", "ilp needs a profile: add a `profile` stage to needs"),
        ("stages.search.with={solver: dp, loss: output_error, budgets: {bits: 3, bytes: 9}}", "dp takes one budget"),
        (
            "stages.search.with={loss: output_error, budgets: {bits: 3}, survivors_per_selection: [4, 1], "
            "tokens_per_selection: [8]}",
            "2 rounds, but tokens_per_selection has 1",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_runs(workflow: Path, override: str, message: str) -> None:
    with pytest.raises(WorkflowError) as caught:
        load_workflow(workflow, sets=[override])
    assert message in str(caught.value)


@pytest.mark.parametrize("amount", ["-5%", "abc", "120%", "-5", "0", ".nan"])
def test_an_amount_that_is_none_is_told_at_its_place_without_a_pattern(workflow: Path, amount: str) -> None:
    with pytest.raises(WorkflowError) as caught:
        load_workflow(workflow, sets=[f"stages.search.with.budgets.ms={amount}"])
    (mistake,) = caught.value.mistakes
    found = amount.removeprefix(".") if amount in ("-5", "0", ".nan") else f"text '{amount}'"
    said = f"stages.search.with.budgets.ms: must be a number above 0, or 0% to 100%, got {found}"
    assert mistake.text == said


def test_the_place_of_the_mistake_is_that_of_the_value(workflow: Path) -> None:
    workflow.write_text(WORKFLOW.replace("bits: 3", "bits: 1"), encoding="utf-8")
    with pytest.raises(WorkflowError) as caught:
        load_workflow(workflow)
    (mistake,) = caught.value.mistakes
    line = WORKFLOW.splitlines()[mistake.line - 1]
    assert line[mistake.column - 1 :].startswith("3}")


def test_a_level_that_may_be_wider_than_the_menu_says_leaves_the_upper_end_open(workflow: Path) -> None:
    menu = "stages.levels.with.menu=[{method: rtn, bits: [2, 4]}, {method: dense}]"
    assert load_workflow(workflow, sets=[menu, "stages.search.with.budgets.bits=12"])


@pytest.mark.parametrize(
    ("budget", "amount"),
    [
        ("bytes=600KB", 600_000),
        ("bytes=2GiB", 2 << 30),
        ("bytes=[1.5MB, 40%]", [1_500_000, "40%"]),
        ("parameters=1.5M", 1_500_000),
    ],
)
def test_a_budget_may_have_a_unit(workflow: Path, budget: str, amount: object) -> None:
    resource = budget.partition("=")[0]
    sets = [f"stages.search.with.budgets={{{budget.replace('=', ': ')}}}"]
    search = next(node for node in load_workflow(workflow, sets=sets).nodes if node.id == "search")
    assert search.params.model_dump()["budgets"] == {resource: amount}


@pytest.mark.parametrize("budget", ["bytes: 600XB", "bits: 3MB", "bytes: [1, 5 apples]", "parameters: 2GiB"])
def test_a_unit_that_is_none_of_the_resource_is_told(workflow: Path, budget: str) -> None:
    with pytest.raises(WorkflowError, match=r"stages\.search\.with\.budgets.*must be"):
        load_workflow(workflow, sets=[f"stages.search.with.budgets={{{budget}}}"])
