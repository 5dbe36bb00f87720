"""Views and units: which numbers of a tensor a view means, and which units a workflow's words mean."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import UnsupportedModel
from layerwise.stages.models.network import BEGIN, Uncovered, Unit, View, select_units

# --- views ---


@st.composite
def places(draw: st.DrawFn) -> tuple[tuple[int, ...], View, Any]:
    """A stored shape, a view of it, and which place of the tensor entry (i, j) of the matrix is, told in words."""
    out, into = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    transposed = draw(st.booleans())
    kernel = () if transposed else tuple(draw(st.lists(st.integers(1, 3), max_size=2)))  # a convolution's
    before, after = (draw(st.integers(0, 3)), draw(st.integers(0, 3))) if draw(st.booleans()) else (0, 0)
    stacked = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    index = tuple(draw(st.integers(0, length - 1)) for length in stacked)
    first, second = (into, out) if transposed else (out, into)
    rows = (before, before + first) if before + after or draw(st.booleans()) else None
    shape = (*stacked, before + first + after, second, *kernel)
    view = View("t", index, rows, transposed)

    def place(i: int, j: int) -> tuple[int, ...]:
        row, column = (j, i) if transposed else (i, j // int(np.prod(kernel)))
        inside = () if transposed else tuple(int(k) for k in np.unravel_index(j % int(np.prod(kernel)), kernel))
        return (*index, before + row, column, *(inside if kernel else ()))

    return shape, view, (out, into * int(np.prod(kernel)), place)


@given(places(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_view_reads_and_writes_its_own_entries_and_no_others(case: Any, dtype: torch.dtype) -> None:
    shape, view, (out, into, place) = case
    stored = torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)  # up to 256 entries differ in bfloat16
    before = stored.clone()
    matrix = view.read(stored)
    assert matrix.shape == (out, into)
    for i in range(out):
        for j in range(into):
            assert matrix[i, j] == stored[place(i, j)]

    view.write(stored, matrix.clone())
    assert torch.equal(stored, before), "what was read, written back, changes nothing"
    new = -1.0 - torch.arange(out * into, dtype=torch.float32).reshape(out, into)
    view.write(stored, new)
    assert torch.equal(view.read(stored), new.to(dtype))
    mine = {place(i, j) for i in range(out) for j in range(into)}
    others = [at for at in np.ndindex(*shape) if at not in mine]
    assert all(stored[at] == before[at] for at in others)
    assert View.from_json(json.loads(json.dumps(view.as_json()))) == view


def test_a_view_that_is_read_is_no_copy() -> None:
    stored = torch.zeros(3, 6, 4)
    view = View("t", (1,), (2, 5))
    view.read(stored)[1, 2] = 7
    assert stored[1, 3, 2] == 7
    assert not view.whole
    assert View("t", transposed=True).whole


# --- choosing units ---


def linear(name: str, kind: str, block: int | None = 0, **rest: Any) -> Unit:
    unit = Unit(name, kind, "linear", block, (4, 6), (block or 0,), View(f"{name}.weight"))
    return replace(unit, **rest)


UNITS = [
    linear("model.embed_tokens", "model.embed_tokens", None, role="embedding", positions=(BEGIN,), multiplied=False),
    *(
        linear(f"model.layers.{block}.{kind}", kind, block)
        for block in (0, 1, 10)
        for kind in ("self_attn.q_proj", "mlp.down_proj")
    ),
    linear("model.layers.10.mlp.experts.3.down_proj", "mlp.experts.down_proj", 10, role="expert"),
    linear("lm_head", "lm_head", None, role="head", positions=(11,)),
]
TIED = [*UNITS[1:-1], replace(UNITS[-1], positions=(BEGIN, 11))]
POSITIONS = Uncovered("model.embed_positions.weight", None, 2048, "it stands outside of the blocks")
BLOCKS = [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        ([], [], BLOCKS),
        (["blocks"], [], BLOCKS),
        (["blocks", "head"], [], [*BLOCKS, 8]),
        (["embedding", "head"], [], [0, 8]),
        (["mlp.down_proj"], [], [2, 4, 6]),
        (["down_proj"], [], [2, 4, 6, 7]),  # the last part of a kind
        (["experts.down_proj"], [], [7]),
        (["q_proj", "lm_head"], [], [1, 3, 5, 8]),
        (["model.layers.1.mlp.down_proj"], [], [4]),
        (["re:model\\.layers\\.1\\."], [], [3, 4]),
        (["re:.*q_proj", "mlp.down_proj"], ["re:.*\\.10\\."], [1, 2, 3, 4]),
        ([], ["q_proj", "experts.down_proj"], [2, 4, 6]),
    ],
)
def test_units_are_chosen_by_what_they_are_by_name_kind_or_pattern(
    targets: list[str], ignore: list[str], expected: list[int]
) -> None:
    assert select_units(UNITS, targets, ignore) == [UNITS[number] for number in expected]


@pytest.mark.parametrize("word", ["head", "embedding", "lm_head"])
def test_a_tied_embedding_is_one_unit_by_either_word(word: str) -> None:
    assert select_units(TIED, [word], []) == [TIED[-1]]


@pytest.mark.parametrize(
    ("targets", "ignore", "complaint"),
    [
        (["downproj"], [], r"targets: 'downproj' names no unit \(did you mean '[a-z.]*down_proj'\?\)"),
        (["block"], [], r"targets: 'block' names no unit \(did you mean 'blocks'\?\)"),
        (["proj"], [], "targets: 'proj' names no unit"),  # not a whole part of a name
        (["re:layers"], [], "targets: 're:layers' names no unit"),  # a pattern matches from the start
        ([], ["up_proj"], "ignore: 'up_proj' names no unit"),
        (
            ["embed_positions"],
            [],
            r"model\.embed_positions\.weight \(2,048 weights\) can be no unit: it stands outside",
        ),
        (["model.embed_positions.weight"], [], "can be no unit"),
        (["q_proj"], ["self_attn.q_proj"], r"no unit is left: targets \['q_proj'\], ignore \['self_attn.q_proj'\]"),
    ],
)
def test_a_word_that_means_nothing_is_answered_with_what_is_near(
    targets: list[str], ignore: list[str], complaint: str
) -> None:
    with pytest.raises(UnsupportedModel, match=complaint):
        select_units(UNITS, targets, ignore, [POSITIONS])


def test_a_model_without_units_is_refused_with_a_reason() -> None:
    with pytest.raises(UnsupportedModel, match=re.escape("targets: 'blocks' names no unit")):
        select_units([], [], [])


def test_a_unit_comes_back_from_json() -> None:
    parent = Unit("model.layers.0.mlp", "mlp", "mlp", 0, (0, 0), (0,), parent="model.layers.0")
    part = replace(UNITS[7], view=View("e", (3,), (1, 2), True), group="g", parent=parent.name, share=0.25)
    for unit in (*UNITS, *TIED, parent, part):
        assert Unit.from_json(json.loads(json.dumps(unit.as_json()))) == unit
