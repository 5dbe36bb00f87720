"""Passages that two texts share, against a search for each of them."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from layerwise.stages.data import overlap as module
from layerwise.stages.data.overlap import overlap


@given(
    text=st.text(alphabet="ab \n", max_size=60),
    other=st.text(alphabet="ab \n", max_size=80),
    passage=st.integers(1, 9),
    block=st.integers(1, 20),
)
def test_exactly_the_passages_that_a_search_finds(text: str, other: str, passage: int, block: int) -> None:
    mine, theirs = " ".join(text.split()), " ".join(other.split())
    length = min(passage, len(mine))
    parts = [mine[start : start + length] for start in range(0, len(mine) - length + 1, length)] if length else []
    before, module.BLOCK = module.BLOCK, block
    try:
        found = overlap(text, other, passage)
    finally:
        module.BLOCK = before
    assert found.shared == sum(part in theirs for part in parts)
    assert found.first == next((part for part in parts if part in theirs), "")


def test_a_passage_is_found_wherever_it_stands_and_however_it_is_broken() -> None:
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefgh", k=letters.randint(1, 9))) for _ in range(4000)]
    text, other = words[:2000], words[2000:]
    assert overlap(" ".join(text), " ".join(other)).shared == 0
    assert overlap(" ".join(text), "\r\n".join(text)).share == 1
    mixed = overlap(" ".join(text), "\n".join([*other, *text[700:900], *other]))
    assert 2 <= mixed.shared <= 5
    assert mixed.first in " ".join(text[700:900])
