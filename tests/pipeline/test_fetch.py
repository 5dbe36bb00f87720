"""What decides results is in a digest, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from layerwise.errors import DataError, UnsupportedModel, UsageError
from layerwise.pipeline.artifacts import FileDigests
from layerwise.pipeline.cluster.shipping import cargo
from layerwise.pipeline.fetch import Fetched, fetch

REST = """
stages:
  stats: {uses: calibrate}
"""


def fetched(desk: Any, config: str = "{}", **options: Any) -> Fetched:
    (desk.folder / "model" / "config.json").write_text(config)
    root = desk.folder / "results"
    return fetch(desk.load(REST, **options), root, FileDigests(root))


def digests(desk: Any, **options: Any) -> tuple[str, str]:
    found = fetched(desk, **options)
    return found.model_digest, found.data_digests["calibration"]


def test_the_model_and_the_texts_are_given_as_stages_need_them(desk: Any) -> None:
    found = fetched(desk, sets=["model={path: model, dtype: bfloat16}"])
    assert found.model.path == desk.folder / "model"
    assert found.model.dtype == "bfloat16"
    calibration = found.data["calibration"]
    assert calibration.paths == (desk.folder / "calibration.txt",)
    assert (calibration.sequence_length, calibration.tokens) == (128, 2048)


def test_sequences_are_as_long_as_the_model_takes_and_longer_ones_are_refused(desk: Any) -> None:
    config = '{"max_position_embeddings": 128}'
    found = fetched(desk, config, sets=["data.heldout={text: heldout.txt}"])
    assert (found.data["calibration"].sequence_length, found.data["heldout"].sequence_length) == (128, 128)
    with pytest.raises(DataError, match=r"data\.calibration: sequences of 129 tokens, but model takes at most 128"):
        fetched(desk, config, sets=["data.calibration.sequence_length=129"])


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "tokenizer.model", "vocab.txt", "chat_template.jinja"]
)
def test_a_changed_file_of_the_model_changes_its_digest_alone(desk: Any, name: str) -> None:
    model, text = digests(desk)
    (desk.folder / "model" / name).write_text("new")
    changed, same = digests(desk)
    assert changed != model
    assert same == text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"quantization_config": {"quant_method": "gptq", "bits": 4}}', r"model is already quantized \(gptq, says"),
        ("{", r"config\.json is no JSON: "),
        ("[]", r"config\.json holds no settings by name"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"config\.json is a pointer of Git LFS"),
    ],
)
def test_what_is_no_dense_model_is_refused_before_anything_runs(desk: Any, config: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message) as caught:
        fetched(desk, config)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_in_place_of_a_file_is_named(desk: Any, name: str) -> None:
    (desk.folder / "model" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UnsupportedModel, match=rf"{name} is a pointer of Git LFS") as caught:
        fetched(desk)
    assert "git lfs pull" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "tokenizer.json"])
@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "no regular file"), (os.mkdir, "a folder")])
def test_a_pipe_or_a_folder_in_place_of_a_file_is_named(desk: Any, name: str, make: Any, kind: str) -> None:
    make(desk.folder / "model" / name)
    with pytest.raises(UnsupportedModel, match=rf"{name} is {kind}") as caught:
        fetched(desk)
    assert caught.value.hint


def test_what_lies_beside_the_model_is_named_and_makes_no_difference(
    desk: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = desk.folder / "model"
    (model / "model.safetensors").write_text("weights")
    before = digests(desk)
    assert not caplog.text
    (model / "model_old.safetensors").write_text("old")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model_old.safetensors"}}')
    assert digests(desk) == before
    assert "not read: model.safetensors.index.json, model_old.safetensors" in caplog.text
    shipped = {path.name for path in cargo(desk.load(REST)).files}
    assert shipped & {path.name for path in model.iterdir()} == {"config.json", "model.safetensors"}


def test_a_readme_beside_the_weights_does_not_matter(desk: Any) -> None:
    before = digests(desk)
    (desk.folder / "model" / "README.md").write_text("new")
    assert digests(desk) == before


def test_the_dtype_changes_the_digest_of_the_model(desk: Any) -> None:
    assert digests(desk, sets=["model={path: model, dtype: bfloat16}"])[0] != digests(desk)[0]


def test_trust_in_the_model_and_then_its_code_are_part_of_what_it_is(desk: Any) -> None:
    trusted = {"sets": ["model={path: model, trust: true}"]}
    plain, before = digests(desk)[0], digests(desk, **trusted)[0]
    (desk.folder / "model" / "code.py").write_text("new")
    assert digests(desk)[0] == plain
    assert len({plain, before, digests(desk, **trusted)[0]}) == 3
    workflow = desk.load(REST, **trusted)
    assert workflow.resolved()["model"]["trust"] is True
    assert "trust" not in desk.load(REST).resolved()["model"]
    assert desk.folder / "model" / "code.py" in cargo(workflow).files
    assert desk.folder / "model" / "code.py" not in cargo(desk.load(REST)).files


def test_a_link_among_the_files_of_a_model_is_named_before_anything_runs(desk: Any) -> None:
    (desk.folder / "secret.json").write_text("mine")
    (desk.folder / "model" / "notes.json").symlink_to(desk.folder / "secret.json")
    with pytest.raises(UnsupportedModel, match=r"notes\.json is a link to"):
        fetched(desk)


@pytest.mark.parametrize("option", ["data.calibration.tokens=1Ki", "data.calibration.sequence_length=64"])
def test_how_a_text_is_cut_changes_its_digest_alone(desk: Any, option: str) -> None:
    model, text = digests(desk)
    same, changed = digests(desk, sets=[option])
    assert same == model
    assert changed != text


def test_where_a_text_stands_does_not_matter_and_what_is_in_it_does(desk: Any) -> None:
    before = digests(desk)
    desk.write("once upon a time", "copy.txt")
    assert digests(desk, sets=["data.calibration.text=copy.txt"]) == before
    desk.write("twice upon a time", "copy.txt")
    assert digests(desk, sets=["data.calibration.text=copy.txt"]) != before


def test_a_folder_without_a_configuration_is_no_model(desk: Any) -> None:
    root = desk.folder / "results"
    with pytest.raises(UnsupportedModel, match=r"holds no config\.json") as caught:
        fetch(desk.load(REST), root, FileDigests(root))
    assert caught.value.hint


def test_a_hub_model_that_cannot_be_fetched_is_told_in_words(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def offline(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        raise OSError("no connection")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=offline))
    with pytest.raises(UnsupportedModel, match="cannot fetch owner/name: no connection") as caught:
        fetched(desk, sets=["model={id: owner/name, revision: abc}"])
    assert caught.value.hint
    assert asked == [("owner/name", "abc")]


def test_a_hub_model_is_used_from_where_it_was_fetched_to(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = SimpleNamespace(snapshot_download=lambda name, **options: str(desk.folder / "model"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert digests(desk, sets=["model={id: owner/name}"]) == digests(desk)


def test_of_a_hub_model_its_own_weights_are_downloaded_and_no_copies(
    desk: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against the matching of huggingface_hub itself, on a repository with every kind of copy."""
    from huggingface_hub.utils import filter_repo_objects

    there = [
        "config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "tokenizer.model", "modeling.py",
        "model.safetensors.index.json", "parts/a.safetensors", "parts/b.safetensors", "consolidated.safetensors",
        "pytorch_model.bin", "original/params.json", "original/consolidated.00.pth", "model-00001-of-00002.safetensors",
        "onnx/model.onnx", "model.gguf", "README.md",
    ]  # fmt: skip
    cache = tmp_path / "cache"
    got: set[str] = set()

    def download(name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: Any) -> str:
        for file in filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            got.add(file)
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            index = '{"weight_map": {"v": "parts/a.safetensors", "w": "parts/b.safetensors"}}'
            (cache / file).write_text(index if file.endswith("index.json") else "{}")
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    fetched(desk, sets=["model={id: owner/name}"])
    assert got == {*there[:5], *there[6:9]}
    there.append("model.safetensors")
    shutil.rmtree(cache)
    got.clear()
    fetched(desk, sets=["model={id: owner/name}"])
    assert got == {*there[:5], there[6], "model.safetensors"}


def test_records_are_other_data_than_the_same_bytes_read_as_text_and_are_shipped_by_their_ending(desk: Any) -> None:
    digests = []
    for ending, options in ((".txt", ""), (".jsonl", ""), (".jsonl", ", column: body")):
        name = f"records{ending}"
        (desk.folder / name).write_text(json.dumps({"text": "some text", "body": "another"}))
        sets = [f"data.calibration={{text: {name}, sequence_length: 2{options}}}"]
        digests.append(fetched(desk, sets=sets).data_digests["calibration"])
        assert any(shipped.endswith(ending) for shipped in cargo(desk.load(REST, sets=sets)).files.values())
    assert len(set(digests)) == 3


def dataset(desk: Any) -> Fetched:
    (desk.folder / "model" / "config.json").write_text("{}")
    root = desk.folder / "results"
    workflow = desk.load(REST, sets=["data.calibration={dataset: owner/name, tokens: 4, sequence_length: 2}"])
    return fetch(workflow, root, FileDigests(root))


def offer(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_only_the_beginning_of_a_dataset_is_read_and_only_once(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert (name, config, split, streaming) == ("owner/name", None, "train", True)
        for number in range(1000):
            rows.append(number)
            yield {"text": f"document {number}"}

    offer(monkeypatch, load)
    first, second = dataset(desk), dataset(desk)
    assert rows == [0, 1, 2, 3]  # 4 tokens can need no more than 32 characters, and these are 40
    (path,) = first.data["calibration"].paths
    assert path.read_text() == "\n\n".join(f"document {number}" for number in range(4))
    assert first.data_digests == second.data_digests


def test_a_dataset_without_the_package_or_that_cannot_be_read_is_told(
    desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the package `datasets`") as caught:
        dataset(desk)
    assert "pip install" in str(caught.value.hint)

    def load(name: str, config: str | None, **options: Any) -> Any:
        raise ValueError("no such split")

    offer(monkeypatch, load)
    with pytest.raises(DataError, match=r"data\.calibration: cannot read owner/name: no such split"):
        dataset(desk)
    assert not list((desk.folder / "results").glob("texts/*"))
