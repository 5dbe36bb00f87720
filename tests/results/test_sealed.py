"""A sealed document comes back as it was, or not at all."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.results.sealed import SEAL, Damaged, sealed, unsealed

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(st.text().filter(lambda name: name != SEAL), values, max_size=4)


@given(documents, st.sampled_from([None, 1]))
def test_what_was_sealed_comes_back_and_any_program_can_read_it(document: dict[str, Any], indent: int | None) -> None:
    data = sealed(document, indent)
    assert unsealed(data) == document
    assert json.loads(data) == {**document, SEAL: json.loads(data)[SEAL]}


@given(documents, st.data())
def test_a_flipped_bit_or_a_lost_end_is_noticed_or_changes_nothing(document: dict[str, Any], data: Any) -> None:
    written = sealed(document)
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, 8 * len(written) - 1))
        spoiled = bytearray(written)
        spoiled[place // 8] ^= 1 << place % 8
    else:
        spoiled = bytearray(written[: data.draw(st.integers(0, len(written) - 1))])
    try:
        found = unsealed(bytes(spoiled))
    except Damaged:
        return
    assert repr(found) == repr(document)  # 1 is not 1.0 here


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"7", b'{"a": 1}', b"\xff", b'{"a": 1, "sha256": null}', b"[" * 10**5]
)
def test_what_was_never_sealed_is_damaged(data: bytes) -> None:
    with pytest.raises(Damaged):
        unsealed(data)
