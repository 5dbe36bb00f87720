"""Single tensors out of a checkpoint, against transformers and safetensors themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import ModelSource
from layerwise.stages.export.dense import dense as write_dense
from layerwise.stages.models.checkpoint import Checkpoint, read_header


def test_every_tensor_reads_as_safetensors_reads_it(model_folder: Callable[[str], Path], any_family: str) -> None:
    checkpoint = Checkpoint(model_folder(any_family))
    expected = load_file(model_folder(any_family) / "model.safetensors")
    assert set(checkpoint.headers) == set(expected)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())
    assert checkpoint.size_bytes == sum(4 * tensor.numel() for tensor in expected.values())


def test_a_checkpoint_that_has_the_prefix_is_read_for_a_model_without_it() -> None:
    checkpoint = Checkpoint.__new__(Checkpoint)
    checkpoint.__dict__["headers"] = {"model.h.0.fc.weight": (Path(), "F32", (2, 3))}
    assert checkpoint.find("h.0.fc.weight", (2, 3), "model") == "model.h.0.fc.weight"
    assert checkpoint.find("model.h.0.fc.weight", (2, 3), "model") == "model.h.0.fc.weight"
    assert checkpoint.find("h.0.fc.weight", (3, 2), "model") is None


def test_shards_read_like_one_file(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model_folder("llama")).save_pretrained(tmp_path, max_shard_size="30KB")
    whole, sharded = Checkpoint(model_folder("llama")), Checkpoint(tmp_path)
    assert len(sharded.files) > 2
    assert set(sharded.headers) == set(whole.headers)
    assert sharded.size_bytes == whole.size_bytes
    assert all(torch.equal(sharded.read(name), whole.read(name)) for name in whole.headers)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.bool]
)
def test_the_bytes_of_a_tensor_follow_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 5).to(dtype)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).tensor_bytes("w") == 15 * tensor.element_size()


@pytest.mark.parametrize("shape", [(), (4,), (3, 5)])
def test_the_dtype_of_a_tensor_of_any_shape_is_known(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A single number has no first row to look at."""
    save_file({"w": torch.zeros(shape, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).dtype("w") == torch.bfloat16


def test_a_folder_with_pickled_weights_only_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="holds no safetensors weights") as caught:
        Checkpoint(tmp_path)
    assert caught.value.hint is not None
    assert "save_pretrained" in caught.value.hint


@pytest.mark.parametrize("left", [0, 4, 9, 60, -1])
def test_a_truncated_file_is_named(tmp_path: Path, left: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(30)}, file)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UnsupportedModel, match=r"cannot read .*model\.safetensors"):
        read_header(file)


@pytest.mark.parametrize("content", [b"this is no safetensors file at all", b"\x02" + bytes(7) + b"[]"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UnsupportedModel, match="cannot read"):
        read_header(tmp_path / "model.safetensors")


def test_a_shard_that_the_index_names_but_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-1.safetensors"}}')
    with pytest.raises(UnsupportedModel, match=r"names 1 weight files, of which 1 are not there: model-1\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"w": 1}}', "{"]
)
def test_an_index_of_another_kind_is_named(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors\.index\.json is no index of weight files"):
        Checkpoint(tmp_path)


def test_shards_in_folders_below_are_read_and_written_where_they_stand(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(model_folder("llama")).save_pretrained(folder, max_shard_size="30KB")
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"] = {name: f"weights/{shard}" for name, shard in document["weight_map"].items()}
    index.write_text(json.dumps(document))
    (folder / "weights").mkdir()
    for shard in folder.glob("*.safetensors"):
        shard.rename(folder / "weights" / shard.name)
    (tmp_path / "out").mkdir()
    write_dense(ModelSource(folder), tmp_path / "out")
    whole, written = Checkpoint(model_folder("llama")), Checkpoint(tmp_path / "out")
    assert [written.place_of(file).parent.name for file in written.files] == ["weights"] * len(written.files)
    assert all(torch.equal(written.read(name), whole.read(name)) for name in whole.headers)


def test_only_the_files_that_transformers_loads_are_the_models(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A copy, an adapter or a stale index beside them is neither counted nor read."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    shutil.copytree(model_folder("llama"), tmp_path / "model")
    folder = tmp_path / "model"
    clean = Checkpoint(folder).size_bytes
    other = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "model_old.safetensors", metadata={"format": "pt"})
    save_file({f"copy.{name}": tensor for name, tensor in other.items()}, folder / "consolidated.safetensors")
    weight_map = dict.fromkeys(other, "model_old.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "original").mkdir()
    save_file(other, folder / "original" / "consolidated.safetensors")
    checkpoint = Checkpoint(folder)
    assert checkpoint.size_bytes == clean
    assert checkpoint.contents.ignored == (
        "adapter_config.json",
        "consolidated.safetensors",
        "model.safetensors.index.json",
        "model_old.safetensors",
        "original",
    )
    assert not {file.name for file in checkpoint.contents.files} & set(checkpoint.contents.ignored)
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(checkpoint.read(name), loaded[name]) for name in checkpoint.headers)
