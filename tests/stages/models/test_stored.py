"""Where weights stand in a checkpoint: found for every family, and written back so that transformers loads them."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import ModelSource
from layerwise.stages.models.causal_lm import CausalLM
from layerwise.stages.models.checkpoint import Checkpoint
from layerwise.stages.models.stored import Locator, Stored


def load_with_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


def changed_everywhere(lm: CausalLM, folder: Path) -> dict[str, Tensor]:
    """Give every unit another weight, in the files; gives those weights by unit."""
    checkpoint, generator = Checkpoint(folder), torch.Generator().manual_seed(1)
    locator = Locator(lm, checkpoint)
    tensors = {file: load_file(file) for file in checkpoint.files}
    weights = {}
    for unit in lm.units:
        weights[unit.name] = torch.randn(unit.shape, generator=generator)
        for view, piece in locator.find(unit).pieces(weights[unit.name], checkpoint):
            view.write(tensors[checkpoint.headers[view.tensor][0]][view.tensor], piece)
    for file, content in tensors.items():
        save_file(content, file, metadata={"format": "pt"})
    return weights


def check_round_trip(lm: CausalLM, folder: Path) -> None:
    """What is found is what the model has, no place twice; what is written there is what transformers loads."""
    checkpoint = Checkpoint(folder)
    locator = Locator(lm, checkpoint)
    found = {unit.name: locator.find(unit) for unit in lm.units}
    backwards = Locator(lm, checkpoint)
    assert found == {unit.name: backwards.find(unit) for unit in reversed(lm.units)}, "whoever asks first"
    for unit in lm.units:
        stored = found[unit.name]
        assert torch.equal(stored.read(checkpoint), lm.weight(unit)), unit.name
        assert Stored.from_json(json.loads(json.dumps(stored.as_json()))) == stored
        assert stored.size_bytes(checkpoint) == unit.n_weights * 4 * (1 + len(stored.copies))
    places = Counter(view for stored in found.values() for view in stored.places)
    assert set(places.values()) == {1}
    whole = [view.tensor for view in places if view.whole]
    assert len(set(whole)) == len(whole), "a tensor is one unit's, or parts of it are"
    weights = changed_everywhere(lm, folder)
    parameters = dict(load_with_transformers(folder).named_parameters(remove_duplicate=False))
    for unit in lm.units:
        assert unit.view is not None
        assert torch.equal(unit.view.read(parameters[unit.view.tensor].data), weights[unit.name]), unit.name


def test_every_unit_is_found_and_written_back_where_transformers_reads_it(
    model_folder: Callable[[str], Path],
    load_model: Callable[[str], Any],
    edited_model: Callable[..., Path],
    any_family: str,
) -> None:
    check_round_trip(load_model(any_family), edited_model(model_folder(any_family), lambda tensors: None))


EXPECTED = {
    "mixtral": ("block_sparse_moe.experts.2.w1", "block_sparse_moe.experts.2.w3"),
    "qwen3moe": ("mlp.experts.2.gate_proj", "mlp.experts.2.up_proj"),
    "olmoe": ("mlp.experts.2.gate_proj", "mlp.experts.2.up_proj"),
}
ROUTERS = {"mixtral": "block_sparse_moe.gate", "granitemoe": "block_sparse_moe.router.layer"}


def test_an_expert_stands_in_the_tensors_of_the_published_checkpoints(
    model_folder: Callable[[str], Path], load_model: Callable[[str], Any], moe_family: str
) -> None:
    lm, checkpoint = load_model(moe_family), Checkpoint(model_folder(moe_family))
    locator = Locator(lm, checkpoint)
    units = {(unit.kind.rpartition(".")[2], unit.view.index): unit for unit in lm.units if unit.block == 1}
    parts = locator.find(units["gate_up_proj", (2,)]).parts
    if moe_family == "granitemoe":
        (view,) = parts
        assert (view.tensor, view.index) == ("model.layers.1.block_sparse_moe.input_linear.weight", (2,))
    else:
        assert [view.tensor for view in parts] == [f"model.layers.1.{name}.weight" for name in EXPECTED[moe_family]]
        assert all(view.whole for view in parts)
    (router,) = [unit for unit in lm.units if unit.block == 1 and unit.role == "parameter"]
    (view,) = locator.find(router).parts
    assert view.tensor == f"model.layers.1.{ROUTERS.get(moe_family, 'mlp.gate')}.weight"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_shards_are_written_back_like_one_file(load_model: Callable[[str], Any], tmp_path: Path, family: str) -> None:
    load_model(family).model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(Checkpoint(tmp_path).files) > 3
    check_round_trip(load_model(family), tmp_path)


def test_a_tied_weight_that_is_saved_twice_is_written_to_both_places(
    model_folder: Callable[[str], Path], edited_model: Callable[..., Path]
) -> None:
    def twice(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = edited_model(model_folder("qwen3"), twice)
    lm = CausalLM.load(ModelSource(folder))
    (head,) = [unit for unit in lm.units if unit.role == "head"]
    stored = Locator(lm, Checkpoint(folder)).find(head)
    assert {stored.parts[0].tensor, *stored.copies} == {"lm_head.weight", "model.embed_tokens.weight"}
    assert stored.size_bytes(Checkpoint(folder)) == 2 * 4 * 256 * 32
    check_round_trip(lm, folder)
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("equal", ["zero experts", "equal halves", "equal experts everywhere", "zero routers"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_equal_contents_are_told_apart_by_block_expert_and_the_names_of_their_like(
    model_folder: Callable[[str], Path], edited_model: Callable[..., Path], family: str, equal: str
) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            expert = name.split(".experts.")[-1].split(".")[0] if ".experts." in name else None
            if equal == "zero experts" and expert in ("0", "2"):
                tensor.zero_()  # of all blocks, both halves
            if equal == "equal halves" and expert == "1" and ".0." in name:
                tensor.fill_(0.5)
            if equal == "equal experts everywhere" and expert is not None:
                first, _, rest = name.partition(".experts.")
                same = first.replace(first.split(".")[2], "0") + ".experts.0." + rest.partition(".")[2]
                tensor.copy_(tensors[same])
            if equal == "zero routers" and ".gate.weight" in name:
                tensor.zero_()

    folder = edited_model(model_folder(family), edit)
    check_round_trip(CausalLM.load(ModelSource(folder)), folder)


def test_equal_square_matrices_of_an_expert_are_told_apart_as_those_of_other_experts_are(
    load_model: Callable[[str], Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(load_model("mixtral").model.config)
    config.intermediate_size = config.hidden_size  # w1, w2 and w3, of which the second is the last one's
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for experts in (model.get_submodule(f"model.layers.{block}.mlp.experts") for block in (0, 2)):
        experts.gate_up_proj.data[1], experts.down_proj.data[1] = 0, 0
    model.save_pretrained(tmp_path)
    check_round_trip(CausalLM.load(ModelSource(tmp_path)), tmp_path)


def test_an_expert_that_is_not_a_number_is_found_all_the_same(
    model_folder: Callable[[str], Path], edited_model: Callable[..., Path]
) -> None:
    name = "model.layers.2.block_sparse_moe.experts.1.w3.weight"
    folder = edited_model(model_folder("mixtral"), lambda tensors: tensors[name][3].fill_(torch.nan))
    lm = CausalLM.load(ModelSource(folder))
    (unit,) = [unit for unit in lm.units if unit.name == "model.layers.2.mlp.experts.1.gate_up_proj"]
    assert Locator(lm, Checkpoint(folder)).find(unit).parts[1].tensor == name


def test_weights_computed_in_another_dtype_are_found_by_contents(
    model_folder: Callable[[str], Path], load_model: Callable[[str], Any]
) -> None:
    lm = CausalLM.load(ModelSource(model_folder("mixtral"), "bfloat16"))
    exact, rounded = (Locator(one, Checkpoint(model_folder("mixtral"))) for one in (load_model("mixtral"), lm))
    for unit in lm.units:
        assert rounded.find(unit) == exact.find(unit)


@pytest.mark.parametrize(("family", "prefix"), [("qwen3", "model."), ("gpt2", "transformer.")])
def test_a_checkpoint_of_the_base_model_is_read_without_its_prefix(
    model_folder: Callable[[str], Path], tmp_path: Path, family: str, prefix: str
) -> None:
    from transformers import AutoModel

    base = AutoModel.from_pretrained(model_folder(family))  # embeddings are tied: a head is not missed
    base.save_pretrained(tmp_path)
    checkpoint, lm = Checkpoint(tmp_path), CausalLM.load(ModelSource(tmp_path))
    unit = next(unit for unit in lm.units if unit.block == 0)
    assert unit.name.startswith(prefix)
    assert Locator(lm, checkpoint).find(unit).parts[0].tensor == f"{unit.name.removeprefix(prefix)}.weight"


@pytest.mark.parametrize(("family", "missing"), [("llama", "model.layers.0.self_attn.q_proj"), ("mixtral", "experts")])
def test_a_unit_that_is_not_in_the_checkpoint_is_named(
    load_model: Callable[[str], Any], model_folder: Callable[[str], Path], family: str, missing: str
) -> None:
    lm = load_model(family)
    unit = next(unit for unit in lm.units if missing in unit.name)
    with pytest.raises(UnsupportedModel, match=rf"no tensor {unit.view.tensor} of shape") as caught:
        Locator(lm, Checkpoint(model_folder("gpt2"))).find(unit)
    assert "save_pretrained" in (caught.value.hint or "")
