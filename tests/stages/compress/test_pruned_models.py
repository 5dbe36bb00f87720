"""Pruning of whole models: tied weights, weights that say nothing, and what is left of a unit that cannot be pruned."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.stages.levels.database import Database, DatabaseIndex

MENU: list[dict[str, Any]] = [
    {"method": "sparsegpt", "sparsity": [0.5], "pattern": ["2:4"]},
    {"method": "sparsegpt", "sparsity": 0.6, "compare": "layer", "then": {"bits": [4], "group_size": 16}},
    {"method": "sparsegpt", "sparsity": 0.5, "block": [1, 16], "then": {"bits": [3], "group_size": 16}},
    {"method": "wanda", "sparsity": [0.5], "pattern": ["4:8"], "then": {"bits": [4], "group_size": 16}},
]


@pytest.fixture(scope="module")
def pruned(make_bench: Callable[[Path], Any], model_folder: Callable[[str], Path]) -> tuple[Any, Any]:
    """A model whose head is its embedding, all of it on the menu."""
    bench = make_bench(model_folder("qwen3"))
    statistics = bench.run(
        "calibrate", {"targets": ["blocks", "head", "embedding"], "statistics": ["hessian", "channels"]}
    )
    return bench, bench.run("compress", {"menu": MENU}, statistics=statistics.out)


def test_every_unit_has_exactly_what_was_asked_for(pruned: tuple[Any, Any]) -> None:
    bench, levels = pruned
    database = Database(levels.out, bench.model)
    for unit in database.units:
        assert {entry.status for entry in unit.levels} == {"ok"}
        for entry in unit.levels[1:]:
            assert entry.recipe is not None
            assert entry.costs is not None
            weight = database.level(unit.name, entry.name).decode()
            pattern, share = entry.recipe.get("pattern"), entry.recipe["sparsity"]
            if "block" in entry.recipe:
                wide = entry.recipe["block"][1]
                runs = torch.stack([(part == 0).all(1) for part in weight.split(wide, 1)])
                assert int(runs.sum()) >= share * runs.numel()
                continue
            assert int((weight == 0).sum()) >= share * weight.numel()
            assert entry.costs["density"] == weight.numel() - math.ceil(share * weight.numel() - 1e-6)
            if pattern is not None:
                n, m = map(int, pattern.split(":"))
                assert int((weight.unflatten(1, (-1, m)) != 0).sum(2).max()) <= n


def test_a_weight_that_is_head_and_embedding_is_pruned_once_in_both_places(pruned: tuple[Any, Any]) -> None:
    from layerwise.stages.allocate.allocation import make_allocation, save_allocations
    from layerwise.stages.allocate.costs import CostTable
    from layerwise.stages.models.causal_lm import CausalLM
    from layerwise.stages.models.compressed import source_of

    bench, levels = pruned
    index = DatabaseIndex(levels.out)
    (tied,) = [unit.name for unit in index.units if unit.unit.role in ("head", "embedding")]
    table = CostTable(index)
    names = [[level.name for level in unit.levels] for unit in index.units]
    genome = [levels.index("sparsegpt-2:4") for levels in names]
    allocation = make_allocation(table, genome, solver="hand", budget={"density": 0.5})
    assert table.describe(genome)["density"] == 0.5
    folder = bench.folder / "tied"
    folder.mkdir()
    save_allocations(folder, [allocation])
    applied = bench.run("apply", {"pick": allocation.candidate}, allocations=folder, database=levels.out)
    model = CausalLM.load(source_of(applied.out, bench.model)).model
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(head, embedding)
    assert int((head.unflatten(1, (-1, 4)) != 0).sum(2).max()) == 2
    assert tied in [unit.name for unit in index.units]


def test_weights_that_say_nothing_do_no_harm_and_one_that_is_nan_costs_no_other_its_levels(
    make_bench: Callable[[Path], Any],
    model_folder: Callable[[str], Path],
    edited_model: Callable[[Path, Callable[[dict[str, Any]], None]], Path],
) -> None:
    spoiled = "model.layers.1.mlp.down_proj"

    def edit(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"].zero_()
        tensors["model.layers.0.self_attn.k_proj.weight"].fill_(0.25)
        tensors["model.layers.0.mlp.up_proj.weight"][:, 3] = 1
        tensors["model.layers.0.mlp.gate_proj.weight"][:, ::2] = 0

    good = edited_model(model_folder("llama"), edit)
    bench = make_bench(good)
    statistics = bench.run("calibrate", {"statistics": ["hessian", "channels"]})
    made = bench.run("compress", {"menu": MENU}, statistics=statistics.out)
    assert {level.status for unit in DatabaseIndex(made.out).units for level in unit.levels} == {"ok"}

    def spoil(tensors: dict[str, Any]) -> None:
        tensors[f"{spoiled}.weight"][0, 0] = float("nan")

    bench = make_bench(edited_model(good, spoil))
    made = bench.run("compress", {"menu": [{"method": "magnitude", "sparsity": 0.5, "pattern": "2:4"}]})
    for unit in DatabaseIndex(made.out).units:
        statuses = {level.status for level in unit.levels[1:]}
        assert statuses == ({"nan"} if unit.name == spoiled else {"ok"}), unit.name
