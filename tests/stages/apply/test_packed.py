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
from layerwise.stages.allocate.allocation import make_allocation, save_allocations
from layerwise.stages.allocate.costs import CostTable
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
        genome = [n % 3 for n in range(len(table.units))]
        in_turn = make_allocation(table, genome, solver="hand", budget={"bits": 14.0})
        save_allocations(folder, [in_turn])
        params = {"pick": in_turn.candidate, "packed": packed}
        return levels, made.bench.run("apply", params, allocations=folder, database=levels.out)

    return run


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_packed_model_runs_and_says_what_the_decoded_weights_say(
    applied: Callable[..., Any],
    load_model: Callable[[str], Any],
    model_folder: Callable[[str], Path],
    rebuilt: Callable[..., Any],
    family: str,
) -> None:
    levels, artifact = applied(family)
    model = load_packed(ModelSource(model_folder(family)), artifact.out)
    database = Database(levels.out, ModelSource(model_folder(family)))
    chosen = allocation_of(artifact)["levels"]
    dense = load_model(family)
    expected = rebuilt(dense.model, {unit: database.level(unit, level).decode() for unit, level in chosen.items()})
    with torch.no_grad():
        found, said = model(input_ids=IDS).logits, expected(input_ids=IDS).logits
    assert torch.allclose(found, said, rtol=0, atol=float(1e-5 * said.abs().max()))  # float32, another order of sums
    assert not torch.allclose(found, dense.logits(IDS), atol=float(1e-2 * said.abs().max()))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **settings), expected.generate(IDS, **settings))


@pytest.mark.parametrize("any_family", ["llama", "qwen3", "mixtral", "granitemoe"], indirect=True)
def test_what_is_no_linear_layer_runs_decoded_and_what_is_dropped_does_not_run(
    in_turn: Callable[..., Any],
    load_model: Callable[[str], Any],
    rebuilt: Callable[..., Any],
    any_family: str,
) -> None:
    """Experts, routers, an embedding and a tied head have no packed form, half-blocks and blocks need none."""
    made = in_turn(any_family, dropped=True)
    artifact = made.bench.run("apply", {"pick": made.allocation.candidate, "packed": True}, **made.inputs)
    packed, lm = read_packed(artifact.out), load_model(any_family)
    levels, database = made.allocation.levels, Database(made.levels.out, made.bench.model)
    weights = {unit: level for unit, level in levels.items() if level not in ("keep", "drop")}
    linear = {unit for unit in weights if isinstance(lm.model.get_submodule(_module(unit)), torch.nn.Linear)}
    tied = any_family in ("qwen3", "granitemoe")
    assert set(packed) == linear - ({"lm_head"} if tied else set())
    assert len(weights) > len(packed)
    without = json.loads((artifact.out / "packed.json").read_text())["no_kernel"]
    assert set(without) <= set(weights), "a parent is no weight"
    assert set(weights) - set(packed) <= set(without)
    model = load_packed(made.bench.model, artifact.out)
    replaced = {name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    assert replaced == set(packed)
    decoded = {unit: database.level(unit, level).decode() for unit, level in weights.items()}
    with torch.no_grad():
        found = model(input_ids=IDS, use_cache=False).logits
        said = rebuilt(lm.model, decoded, [unit for unit, level in levels.items() if level == "drop"])(
            input_ids=IDS, use_cache=False
        ).logits
    assert torch.allclose(found, said, rtol=0, atol=float(1e-5 * said.abs().max()))


def _module(unit: str) -> str:
    """The module that a unit is or, of an expert, that it is in."""
    return unit.rsplit(".", 2)[0] if ".experts." in unit else unit


def allocation_of(artifact: Any) -> Any:
    return json.loads((artifact.out / "model.json").read_text())["about"]["allocation"]


def test_every_unit_is_packed_as_the_level_that_was_chosen(
    applied: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    levels, artifact = applied("llama")
    database, packed = Database(levels.out, ModelSource(model_folder("llama"))), read_packed(artifact.out)
    chosen = allocation_of(artifact)["levels"]
    without = json.loads((artifact.out / "packed.json").read_text())["no_kernel"]
    assert set(packed) == set(chosen)
    assert {chosen[unit] for unit in without} == {"rtn-5b-g16", "dense"}
    assert {packed[unit].label for unit in chosen} == {"dense", "int3-g16-sym"}
    for unit, level in chosen.items():
        assert torch.equal(packed[unit].dense(), database.level(unit, level).decode())


def test_without_asking_for_it_nothing_is_packed_and_the_stage_is_found_as_before(
    applied: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    _, artifact = applied("llama", packed=False)
    assert {file.name for file in artifact.out.iterdir()} == {"model.json", "units"}
    with pytest.raises(UsageError, match="has no packed weights"):
        load_packed(ModelSource(model_folder("llama")), artifact.out)
    assert ApplyParams(pick="best").material() == {"pick": "best"}
    assert ApplyParams(pick="best", packed=True).material() == {"pick": "best", "packed": True}


def test_a_packed_form_of_another_model_is_refused(
    applied: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    _, artifact = applied("llama")
    with pytest.raises(UsageError, match=r"was made of another model: this one has no model\.layers\.0\."):
        load_packed(ModelSource(model_folder("gpt2")), artifact.out)
    with pytest.raises(UsageError, match=r"no model\.layers\.0\.self_attn\.k_proj of shape \(16, 32\)"):
        load_packed(ModelSource(model_folder("qwen3")), artifact.out)  # of the same names


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
