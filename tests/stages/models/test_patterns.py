"""Matching names by expressions: as Python's `re` on what both know, and in no time on what `re` does not end on."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.stages.models.patterns import matches

PARTS = st.sampled_from(
    ["a", "b", ".", r"\.", "[ab]", "[^a]", "(a|b)", "(?:ab)", "a*", "b+", "a?", ".*", "b{1,2}", "$", "|"]
)


@given(st.lists(PARTS, max_size=6).map("".join), st.text("ab.", max_size=8))
def test_it_agrees_with_python(expression: str, name: str) -> None:
    assert matches(expression, name) == (re.match(expression, name) is not None)


@pytest.mark.parametrize("expression", ["(a+)+$", "(a|a)*$", "(.*a){20}$", "(?:.*.*.*.*.*.*)b$"])
def test_an_expression_that_explodes_elsewhere_ends(expression: str) -> None:
    assert not matches(expression, "a" * 200 + "!")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("[", "missing ]"),
        ("a)|(b", "unexpected )"),
        ("a(?!b)", "neither look-around"),
        (r"(a)\1", "neither look-around"),
        ("(?:a{1000}){1000}", "invalid repetition size"),
        ("a" * 1001, "at most 1,000 characters"),
    ],
)
def test_what_cannot_be_read_says_why(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        matches(expression, "a")
