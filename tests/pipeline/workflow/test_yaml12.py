"""The YAML loader: YAML 1.2's scalars, places, and mistakes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import UsageError, WorkflowError
from layerwise.pipeline.workflow.yaml12 import Place, dump, load_file, load_text, load_value


def plain(text: str) -> object:
    return load_text(text, "f.yaml").plain()


def mistakes(text: str) -> list[str]:
    with pytest.raises(WorkflowError) as caught:
        load_text(text, "f.yaml")
    return [str(mistake) for mistake in caught.value.mistakes]


@pytest.mark.parametrize(
    ("written", "value"),
    [  # YAML 1.2.2, section 10.3.2
        ("2:4", "2:4"),
        ("190:20:30", "190:20:30"),
        ("1e-4", 1e-4),
        ("5e6", 5e6),
        ("+12.", 12.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("017", 17),
        ("0o17", 15),
        ("0xFF", 255),
        ("-3", -3),
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("NO", "NO"),
        ("on", "on"),
        ("off", "off"),
        ("True", True),
        ("FALSE", False),
        ("tRUE", "tRUE"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("Null", None),
        ("", None),
        ("=", "="),
        ("'3'", "3"),
        ('"true"', "true"),
        ("!!str 3", "3"),
        ("!!int 3", 3),
        ("!!float 3", 3.0),
        ("re:model\\..*", "re:model\\..*"),
    ],
)
def test_scalars_follow_the_core_schema(written: str, value: object) -> None:
    loaded = plain(f"key: {written}\n")
    assert loaded == {"key": value}
    assert type(loaded["key"]) is type(value)


def test_not_a_number_is_a_float() -> None:
    assert math.isnan(plain("[.nan]")[0])


def test_keys_are_text_as_written() -> None:
    assert plain("1: a\ntrue: b\nnull: c\n2:4: d") == {"1": "a", "true": "b", "null": "c", "2:4": "d"}


def test_anchors_and_merge_keys_work_and_own_keys_win() -> None:
    text = """
    base: &base {a: 1, b: 2}
    more: &more {b: 3, c: 4}
    one: {<<: *base, b: 9}
    two: {<<: [*base, *more], d: *base}
    """
    loaded = plain(text)
    assert loaded["one"] == {"a": 1, "b": 9}
    assert loaded["two"] == {"a": 1, "b": 2, "c": 4, "d": {"a": 1, "b": 2}}


def test_places_of_keys_and_values_count_from_one() -> None:
    tree = load_text("a:\n  - x: 1\n    longer: [2,  3]\n", "f.yaml")
    assert tree.place_of(("a",), of_key=True) == Place("f.yaml", 1, 1)
    assert tree.place_of(("a",)) == Place("f.yaml", 2, 3)
    assert tree.place_of(("a", 0, "longer"), of_key=True) == Place("f.yaml", 3, 5)
    assert tree.place_of(("a", 0, "longer", 1)) == Place("f.yaml", 3, 18)


def test_the_place_of_a_missing_key_is_the_innermost_key_that_is_there() -> None:
    tree = load_text("a:\n  b: {c: 1}\n", "f.yaml")
    assert tree.place_of(("a", "b", "d")) == Place("f.yaml", 2, 3)
    assert tree.place_of(("z",)) == Place("f.yaml", 1, 1)


def test_every_key_given_twice_is_reported_with_its_place() -> None:
    assert mistakes("a: 1\nb: {c: 1, c: 2}\na: 3\n") == [
        "f.yaml:2:11: b.c: this key is given twice (first on line 2)",
        "f.yaml:3:1: a: this key is given twice (first on line 1)",
    ]


def test_a_merged_key_may_be_overridden_without_being_a_duplicate() -> None:
    assert plain("x: &x {a: 1}\ny: {a: 2, <<: *x}")["y"] == {"a": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml:1:1: the file is empty"),
        ("# only a comment\n", "f.yaml:1:1: the file is empty"),
        ("a: [1, 2\nb: 3\n", "f.yaml:2:2: while parsing a flow sequence, expected ',' or ']', but got ':'"),
        ("a:\n\t- b\n", "f.yaml:2:1: while scanning for the next token, found character '\\t'"),
        ("a: !!python/object/apply:os.system [ls]", "f.yaml:1:4: the tag '!!python/object/apply:os.system'"),
        ("a: !!set {b}", "f.yaml:1:4: the tag '!!set' is not supported"),
        ("a: !custom 3", "f.yaml:1:4: the tag '!custom' is not supported"),
        ("a: !!int b", "f.yaml:1:4: 'b' is not what its tag !!int promises"),
        ("a: *b", "f.yaml:1:4: found undefined alias 'b'"),
        ("a: &a [*a]", "f.yaml:1:4: an alias may not contain itself"),
        ("? [a]\n: b", "f.yaml:1:3: a key must be text"),
        ("a: {<<: 3}", "f.yaml:1:9: '<<' takes in maps only"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2:1: expected a single document"),
        ("a: b\x07", "f.yaml:1:5: the character U+0007 may not stand in YAML"),
        ("[" * 1500, "f.yaml:1:51: nested too deeply"),
        ("a: " + "1" * 5000, "f.yaml:1:4: a whole number of 5000 digits is too long"),
    ],
)
def test_what_is_not_readable_is_one_message_with_a_place(text: str, message: str) -> None:
    (found,) = mistakes(text)
    assert found.startswith(message)


def test_an_unquoted_expression_in_a_flow_map_is_explained() -> None:
    (found,) = mistakes("a: {b: ${{ item }}}")
    assert 'an expression needs quotes: "${{ item }}"' in found


def test_aliases_that_unfold_without_end_are_refused() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    (found,) = mistakes(bomb)
    assert "aliases unfold to more than" in found


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"flow\.yaml: no such file"):
        load_file(tmp_path / "flow.yaml")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load_file(tmp_path)


def test_a_file_that_is_not_utf8_names_the_byte_and_its_place(tmp_path: Path) -> None:
    path = tmp_path / "flow.yaml"
    path.write_bytes("a: ü\nbö: ".encode() + b"\xff\n")
    with pytest.raises(WorkflowError) as caught:
        load_file(path)
    assert str(caught.value.mistakes[0]) == f"{path}:2:5: the file is not UTF-8 (byte 0xff)"


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "flow.yaml"
    path.write_bytes(b"\xef\xbb\xbfversion: 1\n")
    tree = load_file(path)
    assert tree.plain() == {"version": 1}
    assert tree.place_of(("version",), of_key=True) == Place(str(path), 1, 1)


def test_the_value_of_an_option_stands_at_the_option() -> None:
    place = Place("f.yaml", option="-s a=[1, {b: x}]")
    tree = load_value("[1, {b: x}]", place)
    assert tree.plain() == [1, {"b": "x"}]
    assert {node.place for _, node in tree.walk()} == {place}
    assert str(place.mistake("wrong")) == "-s a=[1, {b: x}]: wrong"
    assert load_value("", place).plain() is None


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
scalars = st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False) | texts
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)


@given(documents)
def test_what_is_dumped_is_read_back_unchanged(data: object) -> None:
    loaded = plain(dump({"top": data}))
    assert loaded == {"top": data}
    assert repr(loaded) == repr({"top": data})  # 1, 1.0 and True are equal, but not the same


@given(st.text(alphabet="ab:-?[]{}#&*!|>'\"%@`,\n\t 0.~<=$\x00\ud800é", max_size=40))
def test_any_text_is_either_read_or_refused_with_a_place(text: str) -> None:
    try:
        load_text(text, "f.yaml")
    except WorkflowError as error:
        assert all(mistake.line >= 1 and mistake.column >= 1 for mistake in error.mistakes)
