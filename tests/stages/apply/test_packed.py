"""A model applied in packed form runs, and says what its decoded weights say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.errors import UsageError
from layerwise.kernels.linear import PackedLinear
from layerwise.stages.allocate.allocation import CostTable, save_allocations
from layerwise.stages.apply.packed import load_packed, read_packed
from layerwise.stages.apply.stage import ApplyParams
from layerwise.stages.contract import ModelSource
from layerwise.stages.levels.database import Database, DatabaseIndex

IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(9))
MENU = [{"method": "rtn", "bits": [3, 5], "group_size": 16}, {"method": "dense"}]
"""One level with a kernel, one without, and the weight itself."""


@pytest.fixture(scope="module")
def applied(chain: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A family's model with the three levels in turn, packed or not: the database, and the artifact."""

    def run(family: str, *, packed: bool = True) -> tuple[Any, Any]:
        made = chain(family)
        levels = made.bench.run("compress", {"menu": MENU}, statistics=made.stats.out)
        table, folder = CostTable(DatabaseIndex(levels.out)), tmp_path_factory.mktemp("allocations")
        in_turn = table.allocation([n % 3 for n in range(len(table.units))], solver="hand", budget={"bits": 14.0})
        save_allocations(folder, [in_turn])
        params = {"pick": in_turn.candidate, "packed": packed}
        return levels, made.bench.run("apply", params, allocations=folder, database=levels.out)

    return run


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_packed_model_runs_and_says_what_the_written_weights_say(
    applied: Callable[..., Any], load_model: Callable[[str], Any], model_folder: Callable[[str], Path], family: str
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    _, artifact = applied(family)
    model = load_packed(ModelSource(model_folder(family)), artifact.out)
    expected = AutoModelForCausalLM.from_pretrained(model_folder(family)).eval()
    for name, tensor in load_file(artifact.out / "weights.safetensors").items():
        expected.get_parameter(name).data = tensor
    with torch.no_grad():
        found, said = model(input_ids=IDS).logits, expected(input_ids=IDS).logits
    assert torch.allclose(found, said, rtol=0, atol=float(1e-5 * said.abs().max()))  # float32, another order of sums
    assert not torch.allclose(found, load_model(family).logits(IDS), atol=float(1e-2 * said.abs().max()))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **settings), expected.generate(IDS, **settings))


def test_every_unit_is_packed_as_the_level_that_was_chosen(applied: Callable[..., Any]) -> None:
    levels, artifact = applied("llama")
    database, packed = Database(levels.out), read_packed(artifact.out)
    chosen = json.loads((artifact.out / "allocation.json").read_text())["allocation"]["levels"]
    without = json.loads((artifact.out / "packed.json").read_text())["no_kernel"]
    assert set(packed) == set(chosen)
    assert {chosen[unit].split("-")[1] for unit in without} == {"5b"}
    assert {packed[unit].label for unit in chosen} == {"dense", "int3-g16-sym"}
    for unit, level in chosen.items():
        assert torch.equal(packed[unit].dense(), database.decode(unit, level))


def test_without_asking_for_it_nothing_is_packed_and_the_stage_is_found_as_before(
    applied: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    _, artifact = applied("llama", packed=False)
    assert {file.name for file in artifact.out.iterdir()} == {"allocation.json", "weights.safetensors"}
    with pytest.raises(UsageError, match="has no packed weights"):
        load_packed(ModelSource(model_folder("llama")), artifact.out)
    assert ApplyParams(pick="best").material() == {"pick": "best"}
    assert ApplyParams(pick="best", packed=True).material() == {"pick": "best", "packed": True}


def test_a_packed_form_of_another_model_is_refused(
    applied: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    _, artifact = applied("llama")
    with pytest.raises(UsageError, match="the model has no layer model"):
        load_packed(ModelSource(model_folder("gpt2")), artifact.out)


def test_a_function_chooses_what_runs_each_unit(
    applied: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    _, artifact = applied("llama")
    asked = []

    def choose(packed: Any, work: Any) -> str:
        asked.append((packed.label, work.m))
        return "matmul"

    model = load_packed(ModelSource(model_folder("llama")), artifact.out, choose)
    with torch.no_grad():
        model(input_ids=IDS)
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    assert len(asked) == len(layers) == 21
    assert {m for _, m in asked} == {IDS.numel()}
