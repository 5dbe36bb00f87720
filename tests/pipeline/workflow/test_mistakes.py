"""pydantic's findings in words, and at their places. Counting lines: the head of the file has 5."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from layerwise.pipeline.workflow.mistakes import validate
from layerwise.pipeline.workflow.report import Report
from layerwise.pipeline.workflow.yaml12 import load_text


def said(model: Any, text: str) -> list[str]:
    """What is wrong with the text as parameters of a model."""
    report = Report()
    made = validate(model, load_text(text, "f"), ("with",), report)
    assert (made is None) == bool(report.mistakes)
    return [str(mistake).removeprefix("f:") for mistake in sorted(report.mistakes, key=lambda p: (p.line, p.column))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{populaton: 3}", "1:2: with.populaton: unknown key (did you mean 'population'?)"),
        ("{xyz: 3}", "1:2: with.xyz: unknown key (known: solver, budgets, population, seed, workers)"),
        ("{xyz: 3, seed: 1}", "1:2: with.xyz: unknown key (known: solver, budgets, population, workers)"),
        ("{solver: anealing}", "1:10: with.solver: 'anealing' is not one of evolve, ilp, dp"),
        ("{solver: evolv}", "1:10: with.solver: 'evolv' is not one of evolve, ilp, dp (did you mean 'evolve'?)"),
        ("{solver: 3}", "1:10: with.solver: must be one of evolve, ilp, dp, got the whole number 3"),
        ("{population: 0}", "1:14: with.population: must be greater than 0, got 0"),
        ("{population: many}", "1:14: with.population: must be a whole number, got text 'many'"),
        ("{population: '3'}", "1:14: with.population: must be a whole number, got text '3'"),
        ("{population: 2.5}", "1:14: with.population: must be a whole number, got the number 2.5"),
        ("{population: true}", "1:14: with.population: must be a whole number, got true"),
        ("{population: }", "1:13: with.population: must be a whole number, got nothing"),
        ("{population: [1]}", "1:14: with.population: must be a whole number, got a list"),
        ("{budgets: [1]}", "1:11: with.budgets: must be a map, got a list"),
        ("{budgets: {bits: few}}", "1:18: with.budgets.bits: must be a number or a list, got text 'few'"),
        ("{budgets: {bits: [3, few]}}", "1:22: with.budgets.bits.1: must be a number, got text 'few'"),
        ("{workers: all}", "1:11: with.workers: must be a whole number or one of auto, got text 'all'"),
        ("{seed: 13}", "1:8: with.seed: 13 brings bad luck"),
        ("3", "1:1: with: must be a map, got the whole number 3"),
    ],
)
def test_a_mistake_is_said_in_words_at_its_place(fakes: SimpleNamespace, text: str, message: str) -> None:
    assert said(fakes.SearchParams, text) == [message]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("{menu: [{bits: 3}]}", ["1:9: with.menu.0.method: this key is required"]),
        (
            "{menu: [{method: gtpq}]}",
            ["1:18: with.menu.0.method: 'gtpq' is not one of gptq, sparsegpt, wanda (did you mean 'gptq'?)"],
        ),
        (
            "{menu: [{method: gptq, bits: [3], damp_procent: 1}]}",
            ["1:35: with.menu.0.damp_procent: unknown key (did you mean 'damp_percent'?)"],
        ),
        (
            "{menu: [{method: gptq, bits: [3], percdamp: 0.1, xyz: 1}]}",
            ["1:50: with.menu.0.xyz: unknown key"],
        ),
        (
            "{menu: [{method: gptq, bits: [3, x], percdamp: 2}]}",
            [
                "1:34: with.menu.0.bits.1: must be a whole number, got text 'x'",
                "1:48: with.menu.0.percdamp: must be less than 1, got 2",
            ],
        ),
        ("{menu: [3]}", ["1:9: with.menu.0: must be a map, got the whole number 3"]),
        ("{menu: []}", ["1:8: with.menu: must have at least 1 entry, has 0"]),
        ("{menus: []}", ["1:2: with.menus: unknown key (did you mean 'menu'?)"]),
        ("{}", ["1:1: with.menu: this key is required"]),
    ],
)
def test_of_a_labelled_union_only_the_chosen_branch_speaks(
    fakes: SimpleNamespace, text: str, messages: list[str]
) -> None:
    assert said(fakes.MenuParams, text) == messages


def test_of_a_plain_union_the_branch_that_was_meant_speaks(fakes: SimpleNamespace) -> None:
    menu = "menu: [{method: wanda}], "
    assert said(fakes.MenuParams, f"{{{menu} first: {{method: wanda, paterns: [a]}}}}") == [
        "1:51: with.first.paterns: unknown key (did you mean 'patterns'?)"
    ]
    assert said(fakes.MenuParams, f"{{{menu} first: {{method: gptq, bits: x}}}}") == [
        "1:56: with.first.bits: must be a list, got text 'x'"
    ]
    assert said(fakes.MenuParams, f"{{{menu} first: {{method: wonda}}}}") == [
        "1:44: with.first.method: 'wonda' is not one of gptq, sparsegpt, wanda (did you mean 'wanda'?)"
    ]
    assert said(fakes.MenuParams, f"{{{menu} first: 3}}") == ["1:35: with.first: must be a map, got the whole number 3"]


def test_positions_inside_block_style_lists_are_exact(fakes: SimpleNamespace) -> None:
    text = "menu:\n  - method: gptq\n    bits:\n      - 2\n      - three\n  - method: sparsegpt\n    patterns: 2:4\n"
    assert said(fakes.MenuParams, text) == [
        "5:9: with.menu.0.bits.1: must be a whole number, got text 'three'",
        "7:15: with.menu.1.patterns: must be a list, got text '2:4'",
    ]


def test_whole_numbers_may_be_written_with_an_exponent_and_lists_serve_as_tuples(fakes: SimpleNamespace) -> None:
    report = Report()
    search = validate(fakes.SearchParams, load_text("{population: 1e3}", "f"), (), report)
    assert search.population == 1000
    assert type(search.population) is int
    menu = validate(
        fakes.MenuParams,
        load_text("menu: [{method: sparsegpt, patterns: [2:4]}, {method: gptq, bits: 3}]", "f"),
        (),
        report,
    )
    assert menu.menu[0].patterns == ("2:4",)
    assert menu.menu[1].bits == [3]
    assert not report.mistakes


def test_a_value_whose_expression_failed_makes_no_second_mistake(fakes: SimpleNamespace) -> None:
    report = Report()
    tree = load_text("{population: '${{ params.x }}', seeds: '${{ params.y }}'}", "f")
    assert validate(fakes.SearchParams, tree, (), report) is None
    assert [str(mistake) for mistake in report.mistakes] == ["f:1:33: seeds: unknown key (did you mean 'seed'?)"]
