"""Text out of records, and files that are no text."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from layerwise.errors import DataError
from layerwise.stages.contract import TextSource
from layerwise.stages.data.reading import read_text
from layerwise.stages.data.text import encode

TEXTS = ["One line.", 'Two lines,\nwith "quotes" and ünïcode.', "", "Three, after an empty one."]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def source(path: Path, column: str | None = None) -> TextSource:
    return TextSource("calibration", (path,), 8, column=column)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """The records in a file of the kind that its ending says, written by pandas or json."""
    frame = pd.DataFrame(records)
    if path.suffix == ".parquet":
        frame.to_parquet(path, row_group_size=2)
    elif path.suffix in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.name == "list.json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n", "utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "list.json", "lines.json", "a.parquet", "a.csv", "a.tsv"])
def test_every_kind_of_file_gives_the_same_text(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, [{"id": number, "text": text} for number, text in enumerate(TEXTS)])
    assert read_text(source(path)) == "\n\n".join(TEXTS)
    other = write(tmp_path / name, [{"text": "no", "body": text} for text in TEXTS])
    assert read_text(source(other, "body")) == "\n\n".join(TEXTS)


@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "a.parquet"])
def test_conversations_are_written_by_the_template_of_the_model(
    name: str, tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    from transformers import AutoTokenizer

    model = model_folder("llama")
    path = write(tmp_path / name, [{"messages": CHAT}, {"messages": CHAT[1:]}])
    assert read_text(source(path, "messages")) == "Hi\n\nHi"
    with pytest.raises(DataError, match="the tokenizer makes no text of a conversation") as caught:
        encode(source(path, "messages"), model)
    assert "chat template" in (caught.value.hint or "")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    wanted = tokenizer("<system>Be brief.<user>Hi\n\n<user>Hi", add_special_tokens=False)["input_ids"]
    assert encode(source(path, "messages"), folder).tolist() == wanted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "cannot be read as JSONL: line 2: "),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', "record 2 of .* has no column text, but txt"),
        ("a.jsonl", b'{"text": "a"}\n"b"', "record 2 of .* has no columns: 'b'"),
        ("a.jsonl", b'{"text": 3}', "text is neither text nor a conversation: 3"),
        ("a.jsonl", b'{"text": null}', "text is neither text nor a conversation: None"),
        ("a.jsonl", b'{"text": "\xff"}', "cannot be read as JSONL: .*utf-8"),
        ("a.json", b"[1, 2", "cannot be read as JSON: "),
        ("a.parquet", b"PAR1 and no more", "cannot be read as PARQUET: "),
        ("a.csv", b"text\na,b\n", "cannot be read as CSV: "),
        ("a.txt", gzip.compress(b"text"), "is compressed by gzip: unpack it first"),
        ("a.txt", b"PAR1....", "is a Parquet file: give it the ending .parquet"),
        ("a.txt", b"%PDF-1.7", "is a PDF"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"data\.calibration: .*{message}") as caught:
        read_text(source(tmp_path / name))
    assert str(tmp_path / name) in caught.value.message


def test_an_archive_is_no_text(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.txt", "w") as archive:
        archive.writestr("inside.txt", "text")
    with pytest.raises(DataError, match="is a zip archive: unpack it first"):
        read_text(source(tmp_path / "a.txt"))
