"""Text into sequences: what is cut where, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import DataError
from layerwise.stages.contract import TextSource
from layerwise.stages.data.text import cut, encode


def source(length: int, tokens: int | None = None) -> TextSource:
    return TextSource("story", (), length, tokens)


@given(total=st.integers(1, 200), length=st.integers(1, 30), data=st.data())
def test_sequences_are_distinct_slices_spread_over_the_text(total: int, length: int, data: Any) -> None:
    ids = np.arange(total, dtype=np.int32)  # a token is its own position
    available = total // length
    if available == 0:
        with pytest.raises(DataError):
            cut(ids, source(length))
        return
    wanted = data.draw(st.integers(1, available))
    sequences = cut(ids, source(length, wanted * length))
    assert sequences.dtype == np.int32
    assert sequences.shape == (wanted, length)
    assert (np.diff(sequences, axis=1) == 1).all()
    starts = sequences[:, 0]
    assert (starts % length == 0).all()
    gaps = np.diff(starts) // length
    assert wanted == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    left = available - starts[-1] // length  # the last stands for as much text as the others
    assert available // wanted <= left <= -(-available // wanted)


def test_all_tokens_are_used_when_none_are_asked_for() -> None:
    assert cut(np.arange(10, dtype=np.int32), source(3)).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_fewer_tokens_than_a_sequence_are_refused_with_both_numbers() -> None:
    with pytest.raises(DataError, match=r"data\.story: 3 tokens asked for, fewer than one sequence of 4"):
        cut(np.arange(10, dtype=np.int32), source(4, tokens=3))


def test_a_text_shorter_than_one_sequence_is_refused_with_both_lengths() -> None:
    with pytest.raises(DataError, match=r"data\.story: the text has 7 tokens, fewer than one sequence of 8"):
        cut(np.arange(7, dtype=np.int32), source(8))


def test_more_tokens_than_there_are_is_refused_with_both_numbers() -> None:
    with pytest.raises(DataError, match=r"data.story: 24 tokens asked for, but the text has 20 \(2 sequences of 8\)"):
        cut(np.arange(20, dtype=np.int32), source(8, tokens=24))


def test_files_are_one_stream_of_tokens(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    paths = (tmp_path / "b.txt", tmp_path / "a.txt")
    for path, text in zip(paths, ("café", "dog"), strict=True):
        path.write_text(text, encoding="utf-8")
    ids = encode(TextSource("story", paths, 4), model_folder("llama"))
    assert ids.dtype == np.int32
    assert len(ids) == len("café\n\ndog".encode()), "one token per byte"
    assert ids[-1] == encode(TextSource("story", paths[1:], 4), model_folder("llama"))[-1]


def test_text_that_is_not_utf8_is_named(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"data\.story: not UTF-8 text"):
        encode(TextSource("story", (path,), 4), model_folder("llama"))


def test_a_model_without_a_tokenizer_is_refused(
    model_folder: Callable[[str], Path], edited_model: Callable[..., Path], texts: dict[str, TextSource]
) -> None:
    folder = edited_model(model_folder("llama"), lambda tensors: None)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(DataError, match=r"data\.calibration") as caught:
        encode(texts["calibration"], folder)
    assert caught.value.hint == "the model folder must hold its tokenizer"


def test_a_stage_on_too_little_text_says_so_before_it_works(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path], texts: dict[str, TextSource]
) -> None:
    short = replace(texts["calibration"], sequence_length=100_000, tokens=None)
    bench = new_bench(model_folder("llama"), data={"calibration": short})
    with pytest.raises(DataError, match="fewer than one sequence of 100000"):
        bench.run("calibrate")
    greedy = replace(texts["calibration"], tokens=10**6)
    with pytest.raises(DataError, match="1000000 tokens asked for"):
        new_bench(model_folder("llama"), data={"calibration": greedy}).run("calibrate")
