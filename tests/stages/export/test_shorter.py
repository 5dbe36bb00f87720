"""Dropped blocks: a smaller configuration that transformers loads, and that says what the network without them says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.errors import UnsupportedModel
from layerwise.stages.allocate.allocation import make_allocation, save_allocations
from layerwise.stages.allocate.costs import CostTable
from layerwise.stages.contract import ModelSource
from layerwise.stages.export.shorter import Shorter, cut
from layerwise.stages.levels.database import DatabaseIndex

IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(9))
MENU = [{"method": "rtn", "bits": 3, "group_size": 16}, {"method": "drop", "units": ["block"]}]


@pytest.fixture
def without(make_bench: Callable[[Path], Any], tmp_path: Path) -> Callable[[Path, set[int]], tuple[Any, Any]]:
    """A bench and the `model` artifact of a folder, 3 bits everywhere, in which some blocks are dropped."""

    def make(folder: Path, gone: set[int]) -> tuple[Any, Any]:
        bench = make_bench(folder)
        levels = bench.run("compress", {"menu": MENU})
        table = CostTable(DatabaseIndex(levels.out))
        names = ["drop" if u.unit.block in gone else "keep" if u.is_parent else "rtn-3b-g16" for u in table.units]
        genome = [
            [level.name for level in unit.levels].index(name) if unit.is_parent or name != "drop" else 0
            for unit, name in zip(table.units, names, strict=True)
        ]
        allocation = make_allocation(table, genome, solver="hand", budget={"bits": 32})
        (tmp_path / "allocations").mkdir()
        save_allocations(tmp_path / "allocations", [allocation])
        inputs = {"allocations": tmp_path / "allocations", "database": levels.out}
        return bench, bench.run("apply", {"pick": allocation.candidate}, **inputs)

    return make


@pytest.mark.parametrize(
    ("family", "gone"),
    [
        ("llama", {0}), ("qwen2", {1}), ("mistral", {1}), ("gemma2", {1}), ("gemma2", {0, 2}), ("gpt2", {1}),
        ("bloom", {0}), ("qwen3moe", {1}), ("mixtral", {1}),
    ],
)  # fmt: skip
def test_a_model_without_some_blocks_is_a_smaller_model_of_the_same_words(
    without: Callable[..., Any], model_folder: Callable[[str], Path], family: str, gone: set[int]
) -> None:
    from transformers import AutoModelForCausalLM

    from layerwise.stages.models.causal_lm import CausalLM

    bench, applied = without(model_folder(family), gone)
    out = bench.run("export", model=applied.out).out
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, local_files_only=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_hidden_layers == 3 - len(gone)
    if hasattr(model.config, "layer_types"):
        before = CausalLM.load(bench.model).model.config.layer_types
        assert model.config.layer_types == [kind for number, kind in enumerate(before) if number not in gone]
    with torch.no_grad():
        expected = CausalLM.load(ModelSource(bench.model.path, compressed=applied.out)).logits(IDS)
        found = model.eval()(input_ids=IDS, use_cache=False).logits
        generated = model.generate(IDS[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)  # with a cache
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4
    assert generated.shape == (2, 9)


def test_shards_lose_what_is_dropped_and_the_index_says_so(
    without: Callable[..., Any], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(model_folder("llama")).save_pretrained(folder, max_shard_size="20KB")
    for file in model_folder("llama").glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    bench, applied = without(folder, {1})
    out = bench.run("export", model=applied.out).out
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in out.glob("*.safetensors")}
    assert not any(".layers.2." in name for name in index["weight_map"])
    assert AutoModelForCausalLM.from_pretrained(out, local_files_only=True).config.num_hidden_layers == 2


def test_a_configuration_whose_blocks_are_what_their_numbers_are_is_refused(
    without: Callable[..., Any], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "periodic"
    shutil.copytree(model_folder("qwen3moe"), folder)
    config = json.loads((folder / "config.json").read_text())
    bench, applied = without(folder, {0})
    (folder / "config.json").write_text(json.dumps(config | {"decoder_sparse_step": 2}))
    with pytest.raises(UnsupportedModel, match="decoder_sparse_step"):
        bench.run("export", model=applied.out)


def test_lists_are_cut_and_numbered_anew() -> None:
    settings = {
        "layer_types": ["a", "b", "c", "d"],
        "mlp_only_layers": [0, 1, 3],
        "eos_token_id": [1, 2, 3, 4],
        "x": [1],
    }
    assert cut(settings, 4, Shorter("model.layers", frozenset({1}))) == {
        "layer_types": ["a", "c", "d"], "mlp_only_layers": [0, 2],
    }  # fmt: skip
    left = Shorter("model.layers", frozenset({1, 2}))
    names = {"model.layers.10.mlp.w": "model.layers.8.mlp.w", "layers.0.w": "layers.0.w", "model.layers.2.w": None}
    assert {name: left.name(name) for name in names} == names
