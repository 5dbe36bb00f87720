"""The model and the texts of a workflow, and text that must be kept apart. The head of a file is written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

STAGES = "stages: {a: {uses: calibrate}}\n"


def head(model: str = "model", data: str = "calibration: {text: calibration.txt}") -> str:
    return f"version: 1\nmodel: {model}\ndata: {{{data}}}\n"


def load(desk: Any, text: str) -> Any:
    from layerwise.pipeline.workflow import load_workflow

    return load_workflow(desk.write(text), find_stage=desk.stages)


@pytest.mark.parametrize("written", ["model", "./model", "../{name}/model", "{folder}/model", "{{path: model}}"])
def test_a_model_folder_is_relative_to_the_file(desk: Any, written: str) -> None:
    model = load(desk, head(written.format(name=desk.folder.name, folder=desk.folder)) + STAGES).model
    assert (model.path, model.id) == (desk.folder / "model", None)


def test_a_tilde_is_the_home_folder(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(desk.folder))
    assert load(desk, head("~/model") + STAGES).model.path == desk.folder / "model"


def test_a_folder_is_not_looked_for_where_the_user_stands(
    desk: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert desk.mistakes(STAGES, head=head("here"))[0].startswith("2:8: model: folder not found: ")


@pytest.mark.parametrize(
    ("written", "id_", "revision", "dtype"),
    [
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B", None, "float32"),
        ("{id: gpt2, dtype: bfloat16}", "gpt2", None, "bfloat16"),
        ("{id: a/b, revision: abc}", "a/b", "abc", "float32"),
    ],
)
def test_a_hub_model_is_left_to_be_fetched(desk: Any, written: str, id_: str, revision: Any, dtype: str) -> None:
    model = load(desk, head(written) + STAGES).model
    assert (model.path, model.id, model.revision, model.dtype) == (None, id_, revision, dtype)


def test_a_folder_that_looks_like_an_id_is_a_folder(desk: Any) -> None:
    (desk.folder / "my" / "model").mkdir(parents=True)
    assert load(desk, head("my/model") + STAGES).model.path == desk.folder / "my" / "model"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("./gone", "2:8: model: folder not found: {folder}/gone"),
        ("/gone/model", "2:8: model: folder not found: /gone/model"),
        ("a/b/c", "2:8: model: folder not found: {folder}/a/b/c"),
        (
            "gpt2",
            "2:8: model: folder not found: {folder}/gpt2 (a Hugging Face id without owner is written {{id: gpt2}})",
        ),
        ("{{path: ./gone}}", "2:15: model.path: folder not found: {folder}/gone"),
        ("{{id: ./x}}", "2:13: model.id: './x' is not a Hugging Face id (owner/name)"),
        (
            "{{id: a/b, path: model}}",
            "2:8: model: give either path (a folder), id (a Hugging Face id) or python (a function)",
        ),
        (
            "{{dtype: float32}}",
            "2:8: model: give either path (a folder), id (a Hugging Face id) or python (a function)",
        ),
        ("{{path: model, revision: x}}", "2:8: model: revision belongs to a Hugging Face id, not to a folder"),
        (
            "{{id: a/b, dtype: float17}}",
            "2:25: model.dtype: 'float17' is not one of float32, bfloat16, float16 (did you mean 'float16'?)",
        ),
        ("{{id: a/b, dtpye: float16}}", "2:18: model.dtpye: unknown key (did you mean 'dtype'?)"),
        ("3", "2:8: model: must be text or a map, got the whole number 3"),
        ("", "2:7: model: must be text or a map, got nothing"),
    ],
)
def test_a_wrong_model_is_reported(desk: Any, written: str, message: str) -> None:
    wrong = desk.mistakes(STAGES, head=head(written.format()))
    assert wrong == [message.format(folder=desk.folder)]


@pytest.mark.parametrize(
    ("tokens", "number"),
    [("7", 7), ("64k", 64_000), ("1M", 10**6), ("2Mi", 2 << 20), ("32Ki", 32 << 10), ("1.5k", 1500), ("1e3", 1000)],
)
def test_tokens_may_have_a_unit(desk: Any, tokens: str, number: int) -> None:
    data = f"calibration: {{text: [calibration.txt, heldout.txt], tokens: {tokens}}}"
    text = load(desk, head(data=data) + STAGES).data["calibration"]
    assert text.tokens == number
    assert text.paths == (desk.folder / "calibration.txt", desk.folder / "heldout.txt")


def test_a_folder_stands_for_the_texts_in_it(desk: Any) -> None:
    corpus = desk.folder / "corpus"
    names = ["b.txt", "a/z.jsonl", "a/B.TXT", ".git/x.txt", ".y.txt", "picture.png"]
    for name in names:
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text("text")
    data = "calibration: {text: [heldout.txt, corpus], column: body}"
    text = load(desk, head(data=data) + STAGES).data["calibration"]
    assert text.paths == (desk.folder / "heldout.txt", corpus / "a/B.TXT", corpus / "a/z.jsonl", corpus / "b.txt")
    assert text.resolved()["column"] == "body"


def test_a_hub_dataset_keeps_its_particulars(desk: Any) -> None:
    data = "calibration: {dataset: a/b, config: c, split: test, tokens: 1k, sequence_length: 64}"
    text = load(desk, head(data=data) + STAGES).data["calibration"]
    assert (text.dataset, text.config, text.split, text.column) == ("a/b", "c", "test", "text")
    assert (text.tokens, text.sequence_length, text.paths) == (1000, 64, ())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{text: gone.txt}", "3:28: data.calibration.text: file not found: {folder}/gone.txt"),
        ("{text: [heldout.txt, gone.txt]}", "3:42: data.calibration.text.1: file not found: {folder}/gone.txt"),
        (
            "{text: model}",
            "3:28: data.calibration.text: no text files in {folder}/model: nothing there ends in "
            ".txt, .md, .rst, .json, .jsonl, .ndjson, .parquet, .csv, .tsv",
        ),
        ("{text: []}", "3:28: data.calibration.text: must have at least 1 entry, has 0"),
        ("{text: 3}", "3:28: data.calibration.text: must be text or a list, got the whole number 3"),
        ("{txt: a}", "3:22: data.calibration.txt: unknown key (did you mean 'text'?)"),
        ("{dataset: a/b, spilt: x}", "3:36: data.calibration.spilt: unknown key (did you mean 'split'?)"),
        ("heldout.txt", "3:21: data.calibration: must be a map, got text 'heldout.txt'"),
        (
            "{text: heldout.txt, tokens: -1}",
            "3:49: data.calibration.tokens: must be greater than 0, got -1",
        ),
        (
            "{text: heldout.txt, tokens: 0.5k3}",
            "3:49: data.calibration.tokens: must be a whole number like 65536, 64k, 32Ki or 2Mi, got text '0.5k3'",
        ),
        (
            "{text: heldout.txt, sequence_length: 1}",
            "3:58: data.calibration.sequence_length: must be greater than 1, got 1",
        ),
    ],
)
def test_a_wrong_text_is_reported(desk: Any, entry: str, message: str) -> None:
    wrong = desk.mistakes(STAGES, head=head(data=f"calibration: {entry}"))
    assert wrong == [message.format(folder=desk.folder)]


# --- text that must be kept apart ---

SCORED = """\
stages:
  stats: {{uses: calibrate, with: {{data: {used}}}}}
  levels: {{uses: compress, needs: stats, with: {{menu: [{{method: wanda}}]}}}}
  search: {{uses: allocate, needs: levels}}
  best: {{uses: pick, needs: search}}
  score: {{uses: evaluate, needs: best, with: {{{scored}}}}}
"""


def test_a_stage_may_report_on_separate_text(desk: Any) -> None:
    desk.load(SCORED.format(used="calibration", scored="data: heldout"))


def test_held_out_text_must_not_be_what_another_stage_works_on(desk: Any) -> None:
    assert desk.mistakes(SCORED.format(used="calibration", scored="data: calibration")) == [
        "11:53: stages.score.with.data: 'calibration' is also what 'stages.stats' works on; "
        "held-out text must be separate"
    ]
    # The default counts too; it stands nowhere, so the stage is named.
    assert desk.mistakes(SCORED.format(used="heldout", scored="")) == [
        "11:3: stages.score.with.data: 'heldout' is also what 'stages.stats' works on; held-out text must be separate"
    ]
    assert desk.mistakes(SCORED.format(used="calibration", scored="also: [heldout, calibration]")) == [
        "11:63: stages.score.with.also: 'calibration' is also what 'stages.stats' works on; "
        "held-out text must be separate"
    ]


def test_the_same_file_under_another_name_is_the_same_text(desk: Any) -> None:
    (desk.folder / "link.txt").symlink_to(desk.folder / "calibration.txt")
    data = "data: {calibration: {text: calibration.txt}, heldout: {text: [heldout.txt, link.txt]}}\n"
    wrong = desk.mistakes(
        SCORED.format(used="calibration", scored="data: heldout"), head="version: 1\nmodel: model\n" + data
    )
    assert wrong == [
        f"9:53: stages.score.with.data: 'heldout' reads the same text ({desk.folder}/calibration.txt) "
        "as 'calibration', which 'stages.stats' works on; held-out text must be separate"
    ]


def test_two_splits_of_a_dataset_are_separate_and_one_split_is_not(desk: Any) -> None:
    top = (
        "version: 1\nmodel: model\ndata: {{calibration: {{dataset: a/b}}, heldout: {{dataset: a/b, split: {split}}}}}\n"
    )
    body = SCORED.format(used="calibration", scored="data: heldout")
    load(desk, top.format(split="test") + body)
    (wrong,) = desk.mistakes(body, head=top.format(split="train"))
    assert "'heldout' reads the same text (a/b train) as 'calibration'" in wrong


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "calib: {text: calibration.txt}",
            "4:13: stages.a.with.data: no data entry 'calibration' (did you mean 'calib'?)",
        ),
        ("x: {text: calibration.txt}", "4:13: stages.a.with.data: no data entry 'calibration' (known: x)"),
        ("", "4:10: stages.a.with.data: no data entry 'calibration' (the workflow declares no data)"),
    ],
)
def test_a_text_that_is_not_declared_is_reported(desk: Any, data: str, message: str) -> None:
    assert [text.split(": ", 1)[1] for text in desk.mistakes(STAGES, head=head(data=data))] == [
        message.split(": ", 1)[1]
    ]
