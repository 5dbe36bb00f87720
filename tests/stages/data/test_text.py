"""Text into sequences: what is cut where, and what is refused."""

from __future__ import annotations

import os
import shutil
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
from layerwise.stages.data.reading import pieces, read_text
from layerwise.stages.data.text import cut, encode, sequences_of


def source(length: int, tokens: int | None = None) -> TextSource:
    return TextSource("story", (), length, tokens)


@given(total=st.integers(1, 200), length=st.integers(2, 30), data=st.data(), first=st.sampled_from([None, -5]))
def test_sequences_are_distinct_slices_spread_over_the_text(
    total: int, length: int, data: Any, first: int | None
) -> None:
    ids = np.arange(total, dtype=np.int32)  # a token is its own position
    step = length if first is None else length - 1
    available = total // step
    if available == 0:
        with pytest.raises(DataError):
            cut(ids, source(length), first)
        return
    wanted = data.draw(st.integers(1, available))
    sequences = cut(ids, source(length, wanted * length), first)
    assert sequences.dtype == np.int32
    assert sequences.shape == (wanted, length)
    if first is not None:
        assert (sequences[:, 0] == first).all()
        sequences, length = sequences[:, 1:], step
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
    (tmp_path / "good.txt").write_text("a dog\n", encoding="utf-8")
    path.write_bytes(b"one\ntwo " + path.read_bytes())
    message = r"data\.story: \S*latin\.txt is not UTF-8 text: line 2 holds the byte 0xe9"
    with pytest.raises(DataError, match=message) as caught:
        encode(TextSource("story", (tmp_path / "good.txt", path), 4), model_folder("llama"))
    assert "iconv" in str(caught.value.hint)


def test_byte_order_marks_and_other_ends_of_lines_are_no_text(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + name.encode() + b"\r\nend\r")
    assert (
        read_text(TextSource("story", (tmp_path / "one.txt", tmp_path / "two.txt"), 4))
        == "one.txt\nend\n\n\ntwo.txt\nend\n"
    )


def test_a_pipe_in_place_of_a_text_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt is no regular file"):
        read_text(TextSource("story", (tmp_path / "pipe.txt",), 4))


@given(text=st.text(alphabet="ab \n", max_size=200), size=st.integers(2, 40))
def test_pieces_are_the_text_and_end_where_it_hurts_least(text: str, size: int) -> None:
    found = pieces(text, size)
    assert "".join(found) == text
    assert max(map(len, found)) <= size
    for piece in found[:-1]:
        late = piece[size // 2 :]
        assert piece.endswith("\n") or ("\n" not in late and (piece.endswith(" ") or " " not in late))


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of bytes that begins each text with token 256, and a model of 257 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bos")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*alphabet, "<s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 256)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    (folder / "config.json").write_text('{"vocab_size": 257, "model_type": "llama"}')
    (folder / "text.txt").write_text("abcdefghij" * 10)
    return folder


@pytest.mark.parametrize(("bos", "begins"), [(None, True), (True, True), (False, False)])
def test_each_sequence_begins_as_the_tokenizer_or_the_workflow_says(
    with_bos: Path, bos: bool | None, begins: bool
) -> None:
    text = TextSource("story", (with_bos / "text.txt",), 11, bos=bos)
    sequences = sequences_of(text, with_bos)
    assert len(sequences) == (10 if begins else 9)
    assert (sequences[:, 0] == 256).all() == begins
    assert (sequences[:, 1:] < 256).all()
    assert 256 not in encode(text, with_bos)


def test_a_beginning_that_no_tokenizer_has_is_refused(model_folder: Callable[[str], Path], with_bos: Path) -> None:
    text = TextSource("story", (with_bos / "text.txt",), 11)
    assert len(sequences_of(text, model_folder("llama"))) == 9
    with pytest.raises(DataError, match=r"bos: true, but the tokenizer has no beginning-of-sequence token"):
        sequences_of(replace(text, bos=True), model_folder("llama"))


def test_a_token_that_the_model_has_no_row_for_is_named(with_bos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(with_bos, folder)
    (folder / "config.json").write_text('{"vocab_size": 256, "model_type": "llama"}')
    message = r"the tokenizer gives token 256 \('<s>'\), but the model has only the tokens 0 to 255"
    with pytest.raises(DataError, match=message) as caught:
        sequences_of(TextSource("story", (folder / "text.txt",), 11), folder)
    assert caught.value.hint


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
