"""`${{ }}`: look-ups that keep types, and what is wrong with them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.pipeline.workflow.expressions import Unknown, aligned_stage, resolve, unresolved
from layerwise.pipeline.workflow.report import Report
from layerwise.pipeline.workflow.yaml12 import Place, Tree, load_text, plant

HERE = Place("f", 1, 1)
PARAMS = {"bits": 3, "rate": 0.5, "on": True, "name": "ilp", "list": [1, {"a": "b"}], "empty": {}, "null": None}


def resolved(text: str, item: Any = None) -> tuple[Any, list[str]]:
    """The value of a scalar, and what was wrong."""
    report = Report()
    names = {"params": plant(PARAMS, HERE)} | ({} if item is None else {"item": item})
    tree = resolve(Tree(text, HERE), names, ("key",), report)
    return tree.plain(), [mistake.text for mistake in report.mistakes]


@pytest.mark.parametrize("name", PARAMS)
def test_a_scalar_that_is_only_an_expression_keeps_the_type(name: str) -> None:
    value, wrong = resolved(f"${{{{ params.{name} }}}}")
    assert value == PARAMS[name]
    assert type(value) is type(PARAMS[name])
    assert not wrong


def test_dots_lead_into_maps_and_lists() -> None:
    assert resolved("${{params.list.1.a}}") == ("b", [])
    assert resolved("${{ item.size }}", plant({"size": 7}, HERE)) == (7, [])


def test_inside_longer_text_values_are_written_out() -> None:
    text = "x${{ params.bits }}-${{ params.rate }}-${{ params.on }}-${{ params.null }}-${{ params.name }}"
    assert resolved(text) == ("x3-0.5-true-null-ilp", [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${{ params.nam }}", "unknown name 'params.nam': 'params' has no 'nam' (did you mean 'name'?)"),
        ("${{ params.empty.x }}", "unknown name 'params.empty.x': 'params.empty' has no 'x' (it is empty)"),
        ("${{ params.list.7 }}", "unknown name 'params.list.7': 'params.list' is a list of 2, counted from 0"),
        ("${{ params.bits.x }}", "'params.bits' is the whole number 3 and has nothing inside"),
        ("${{ parms.bits }}", "unknown name 'parms' in 'parms.bits' (did you mean 'params'?)"),
        ("${{ item }}", "'item' is known only inside a stage with foreach"),
        ("${{ needs.search }}", "needs can stand only alone after 'foreach:'"),
        ("${{ params.bits + 1 }}", "'params.bits + 1' is not a look-up"),
        ("${{ }}", "'' is not a look-up"),
        ("${{ params.bits", "opened with '${{' but not closed"),
        ("a ${{ params.list }}", "params.list is a list and cannot stand inside text"),
        ("a ${{ params.empty }}", "params.empty is a map and cannot stand inside text"),
    ],
)
def test_a_wrong_expression_is_explained_and_stays(text: str, message: str) -> None:
    value, wrong = resolved(text)
    assert value == text
    assert len(wrong) == 1
    assert wrong[0].startswith("key: ")
    assert message in wrong[0]


def test_a_name_that_is_wrong_elsewhere_makes_no_further_mistake() -> None:
    assert resolved("${{ item.x }} ", Unknown()) == ("${{ item.x }} ", [])


def test_a_value_keeps_the_place_where_it_was_written() -> None:
    tree = load_text("params:\n  budgets: [3, 4]\nuse: ${{ params.budgets }}\n", "f")
    used = resolve(tree.entries["use"], {"params": tree.entries["params"]}, ("use",), Report())
    assert used.place == Place("f", 2, 12)
    assert used.place_of((1,)) == Place("f", 2, 16)
    assert used.key == Place("f", 3, 1)


def test_foreach_may_follow_a_stage() -> None:
    assert aligned_stage(Tree("${{ needs.search }}", HERE)) == "search"
    assert aligned_stage(Tree("${{ params.search }}", HERE)) is None
    assert aligned_stage(plant(["${{ needs.search }}"], HERE)) is None


@given(st.text(alphabet="${} abc.params", max_size=30))
def test_any_text_is_either_resolved_or_reported(text: str) -> None:
    report = Report()
    tree = resolve(Tree(text, HERE), {"params": plant({"a": "b"}, HERE)}, ("key",), report)
    assert unresolved(tree) == bool(report.mistakes)
