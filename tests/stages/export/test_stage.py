"""The `export` stage: a folder that transformers loads, with decoded weights where its files have dense ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from layerwise.errors import UnsupportedModel
from layerwise.stages.allocate.allocation import load_allocations
from layerwise.stages.levels.database import Database

IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    "any_family",
    ["llama", "gpt2", "qwen3", "opt", "phi3", "gptj", "bloom", "mixtral", "qwen3moe", "granitemoe"],
    indirect=True,
)
def test_an_exported_folder_loads_with_transformers_and_says_what_the_decoded_weights_say(
    in_turn: Callable[..., Any],
    load_model: Callable[[str], Any],
    rebuilt: Callable[..., Any],
    model_folder: Callable[[str], Path],
    any_family: str,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = in_turn(any_family)
    applied = made.bench.run("apply", {"pick": made.allocation.candidate}, **made.inputs)
    exported = made.bench.run("export", model=applied.out)
    model, info = AutoModelForCausalLM.from_pretrained(exported.out, output_loading_info=True, local_files_only=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    database = Database(made.levels.out, made.bench.model)
    levels = json.loads((exported.out / "layerwise.json").read_text())["allocation"]["levels"]
    weights = {
        unit: database.level(unit, level).decode() for unit, level in levels.items() if level not in ("dense", "keep")
    }
    dense = load_model(any_family)
    with torch.no_grad():
        expected = rebuilt(dense.model, weights)(input_ids=IDS, use_cache=False).logits
        found = model.eval()(input_ids=IDS, use_cache=False).logits
    scale = float(expected.abs().max())
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * scale)  # experts may run in another order
    assert not torch.allclose(found, dense.logits(IDS), rtol=0, atol=1e-2 * scale)
    assert AutoTokenizer.from_pretrained(exported.out)("the cat")["input_ids"]

    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder(any_family), exported.out))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in before.items()
    }
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert all(tensor.dim() >= 2 for name, tensor in before.items() if name not in same)
    assert {file.name for file in exported.out.iterdir()} == {
        *(file.name for file in model_folder(any_family).iterdir()), "layerwise.json",
    }  # fmt: skip


def test_weights_that_were_left_dense_are_the_same_to_the_bit(
    in_turn: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    made = in_turn("llama")
    applied = made.bench.run("apply", {"pick": made.allocation.candidate}, **made.inputs)
    exported = made.bench.run("export", model=applied.out)
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder("llama"), exported.out))
    changed = {f"{unit}.weight" for unit, level in made.allocation.levels.items() if level != "dense"}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name not in changed)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("layout", ["once", "twice", "in two files"])
def test_a_tied_head_is_written_wherever_it_is_stored(
    in_turn: Callable[..., Any],
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    layout: str,
) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(model_folder("qwen3"), folder)
    tensors = load_file(folder / "model.safetensors")
    if layout == "twice":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    if layout == "in two files":
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        save_file({HEAD: tensors[EMBEDDING]}, folder / "model-2.safetensors", metadata={"format": "pt"})
        places = {**dict.fromkeys(tensors, "model-1.safetensors"), HEAD: "model-2.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    made = in_turn("qwen3", folder=folder)
    assert made.allocation.levels["lm_head"] != "dense"
    applied = made.bench.run("apply", {"pick": made.allocation.candidate}, **made.inputs)
    exported = made.bench.run("export", model=applied.out).out
    written = [(file.name, load_file(file)) for file in sorted(exported.glob("*.safetensors"))]
    stored = [(file.name, load_file(file)) for file in sorted(folder.glob("*.safetensors"))]
    assert [(name, set(found)) for name, found in written] == [(name, set(found)) for name, found in stored]
    decoded = Database(made.levels.out, made.bench.model).level("lm_head", made.allocation.levels["lm_head"]).decode()
    copies = [found[name] for _, found in written for name in (EMBEDDING, HEAD) if name in found]
    assert len(copies) == (1 if layout == "once" else 2)
    assert all(torch.equal(copy, decoded) for copy in copies)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_shards_and_half_precision_survive_the_whole_chain(
    model_folder: Callable[[str], Path], in_turn: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    """Mixtral's experts stand in the network as one matrix, in the files as two, which may be in different shards."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "half"
    half = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.bfloat16)
    half.save_pretrained(folder, max_shard_size="20KB")
    for file in model_folder(family).glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    made = in_turn(family, folder=folder)
    applied = made.bench.run("apply", {"pick": made.allocation.candidate}, **made.inputs)
    exported = made.bench.run("export", model=applied.out)
    database = Database(made.levels.out, made.bench.model)
    expected = {}
    for unit, level in made.allocation.levels.items():
        if level not in ("dense", "keep"):
            expected |= _as_stored(unit, database.level(unit, level).decode().bfloat16())
    seen = set()
    for file in files:
        with safe_open(file, framework="pt") as before, safe_open(exported.out / file.name, framework="pt") as after:
            assert sorted(before.keys()) == sorted(after.keys())
            assert before.metadata() == after.metadata()
            for name in before.keys():  # noqa: SIM118
                tensor = after.get_tensor(name)
                assert tensor.dtype == torch.bfloat16
                assert torch.equal(tensor, expected.get(name, before.get_tensor(name))), name
                seen.add(name)
    assert set(expected) <= seen, "every level has found its place"


def _as_stored(unit: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """By its name in the files: for Mixtral's experts w1 above w3, and w2, as its config says."""
    if ".experts." in unit:
        path, number, parameter = unit.replace(".mlp.", ".block_sparse_moe.").rsplit(".", 2)
        if parameter == "down_proj":
            return {f"{path}.{number}.w2.weight": weight}
        gate, up = weight.chunk(2)
        return {f"{path}.{number}.w1.weight": gate, f"{path}.{number}.w3.weight": up}
    return {
        f"{unit.replace('.mlp.gate', '.block_sparse_moe.gate') if unit.endswith('.mlp.gate') else unit}.weight": weight
    }


def test_a_model_without_a_changed_unit_is_exported_as_it_is(
    model_folder: Callable[[str], Path], new_bench: Callable[..., Any]
) -> None:
    bench = new_bench(model_folder("mixtral"))
    menu = [{"method": "rtn", "bits": 4, "group_size": 16}, {"method": "dense"}]
    levels = bench.run("compress", {"menu": menu})
    found = bench.run("allocate", {"solver": "uniform", "budgets": {"bits": 32}}, database=levels.out)
    (allocation,) = load_allocations(found.out)
    stored = load_file(model_folder("mixtral") / "model.safetensors")
    assert allocation.kl == 0.0
    assert allocation.sizes["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    applied = bench.run("apply", allocations=found.out, database=levels.out)
    exported = load_file(bench.run("export", model=applied.out).out / "model.safetensors")
    assert set(exported) == set(stored)
    assert all(torch.equal(exported[name], tensor) for name, tensor in stored.items())


def test_a_model_with_dropped_half_blocks_is_refused_before_anything_is_written(in_turn: Callable[..., Any]) -> None:
    made = in_turn("llama", dropped=True)
    applied = made.bench.run("apply", {"pick": made.allocation.candidate}, **made.inputs)
    before = set(applied.out.parent.parent.glob("*-export/out/*.safetensors"))  # of other tests in this place
    with pytest.raises(UnsupportedModel, match=r"1 half-blocks are dropped, the first is .*self_attn") as caught:
        made.bench.run("export", model=applied.out)
    assert "without dropped parts" in str(caught.value.hint)
    assert set(applied.out.parent.parent.glob("*-export/out/*.safetensors")) == before
