"""A compressed model compressed again: pruned, calibrated as it is by then, quantized, searched, applied, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerwise.stages.allocate.allocation import load_allocations, make_allocation, save_allocations
from layerwise.stages.allocate.costs import CostTable
from layerwise.stages.data.text import cut, encode
from layerwise.stages.levels.database import Database, DatabaseIndex
from layerwise.stages.models.compressed import CompressedModel

IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(9))
GONE = "model.layers.1.self_attn"
AGAIN = [
    {"method": "gptq", "bits": [3, 6], "group_size": 16},
    {"method": "magnitude", "sparsity": [0.5, 0.75]},
    {"method": "drop", "units": ["mlp"]},
    {"method": "dense"},
]


def pruned_first(bench: Any, dropped: bool) -> Any:
    """Every weight of the blocks half pruned; with `dropped`, one attention is left out."""
    menu = [{"method": "magnitude", "sparsity": 0.5}, {"method": "drop", "units": ["attention"]}]
    levels = bench.run("compress", {"menu": menu})
    table = CostTable(DatabaseIndex(levels.out))
    genome = [int(dropped and unit.name == GONE) if unit.is_parent else 1 for unit in table.units]
    folder = bench.folder / "pruned"
    folder.mkdir()
    save_allocations(folder, [make_allocation(table, genome, solver="hand", budget={"bits": 16.0})])
    return bench.run("apply", {"pick": "bits=16"}, allocations=folder, database=levels.out)


def largest_half(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs() > weight.abs().flatten().kthvalue(round(weight.numel() / 2)).values


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_pruned_then_quantized(
    new_bench: Callable[..., Any],
    model_folder: Callable[[str], Path],
    load_model: Callable[[str], Any],
    rebuilt: Callable[..., Any],
    family: str,
    dropped: bool,
) -> None:
    bench, lm = new_bench(model_folder(family)), load_model(family)
    keep = {unit.name: largest_half(lm.weight(unit)) for unit in lm.units if unit.block is not None}
    pruned = pruned_first(bench, dropped)
    stats = bench.run("calibrate", {"statistics": ["hessian"]}, model=pruned.out)
    levels = bench.run("compress", {"menu": AGAIN, "least_tokens": 8}, statistics=stats.out)
    profile = bench.run("profile", {"metrics": ["kl"], "tokens": 96}, database=levels.out)
    inputs = {"database": levels.out, "profile": profile.out}
    found = bench.run("allocate", {"solver": "ilp", "budgets": {"bits": [1.7, 6.0]}}, **inputs)
    small, large = load_allocations(found.out)

    # What there is: level 0 is the pruned weight by a name of its own, everything else is made from it.
    index = DatabaseIndex(levels.out)
    database = Database(levels.out, bench.model)
    for entry in index.units:
        if entry.is_parent:
            continue
        names = [level.name for level in entry.levels]
        assert names == ["magnitude-50% (before)", "gptq-3b-g16", "gptq-6b-g16", "magnitude-50%", "magnitude-75%"]
        before = database.level(entry.name, names[0]).decode()
        assert torch.equal(before != 0, keep[entry.name])
        assert torch.equal(before, lm.weight(next(u for u in lm.units if u.name == entry.name)) * keep[entry.name])
        for name in names[1:]:
            level = database.level(entry.name, name)
            assert level.name == name
            assert not level.decode()[~keep[entry.name]].any(), "what was pruned stays pruned"
            assert level.parameters <= int(keep[entry.name].sum())
        assert (entry.levels[0].weight_nmse, entry.levels[0].offered) == (0.0, True)

    for allocation in (small, large):
        applied = bench.run("apply", {"pick": allocation.candidate}, allocations=found.out, database=levels.out)
        model = CompressedModel(applied.out)
        gone = [name for name, level in model.levels.items() if level == "drop"]
        assert (GONE in gone) == dropped
        weights = {name: model.level(name).decode() for name, level in model.levels.items() if level != "drop"}
        assert set(weights) == {
            name for name in keep if not f"{name}.".startswith(tuple(f"{part}." for part in gone) or "-")
        }
        for name, weight in weights.items():
            assert not weight[~keep[name]].any()

        # Bytes: everything in the checkpoint but what is dropped, and the units as they lie in the artifact.
        inside = [part.replace(".mlp", ".block_sparse_moe") if family == "mixtral" else part for part in gone]
        stored = load_file(model_folder(family) / "model.safetensors")
        size = sum(
            t.nbytes for name, t in stored.items() if not name.startswith(tuple(f"{part}." for part in inside) or "-")
        )
        size += sum(
            sum(t.nbytes for t in load_file(applied.out / "units" / f"{name}.safetensors").values())
            - 4 * weight.numel()
            for name, weight in weights.items()
        )
        assert allocation.sizes["bytes"] == size
        assert allocation.sizes["bits"] <= float(allocation.budget.removeprefix("bits="))

        # Quality: against the workflow's dense model, whatever was done in between.
        scores = bench.run(
            "evaluate", {"metrics": ["kl"]}, allocations=found.out, database=levels.out, models=applied.out
        )
        metrics = json.loads((scores.out / "metrics.json").read_text())
        text = bench.data["heldout"]
        ids = torch.from_numpy(cut(encode(text, bench.model.path), text)).long()
        with torch.no_grad():
            p = lm.logits(ids).double().log_softmax(-1)
            q = rebuilt(lm.model, weights, gone)(input_ids=ids).logits.double().log_softmax(-1)
        expected = (p.exp() * (p - q)).sum(-1).mean().item()
        assert expected > 0.01
        for name in (allocation.candidate, f"{allocation.candidate}@model"):
            assert metrics[name]["kl"]["mean"] == pytest.approx(expected, abs=1e-5)
        assert metrics["dense"]["kl"]["mean"] == 0.0
        alone = bench.run("evaluate", {"metrics": ["kl"]}, allocations=found.out, database=levels.out)
        by_levels = json.loads((alone.out / "metrics.json").read_text())
        assert next(iter(by_levels)) == "dense", "it is measured beside them even if nothing was made of it"
        assert by_levels["dense"] == metrics["dense"]

        if not gone:
            from transformers import AutoModelForCausalLM

            exported = bench.run("export", model=applied.out)
            loaded = AutoModelForCausalLM.from_pretrained(exported.out, local_files_only=True).eval()
            with torch.no_grad():
                said = loaded(input_ids=IDS).logits
                wanted = rebuilt(lm.model, weights)(input_ids=IDS).logits
            assert torch.allclose(said, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_units_that_are_not_compressed_again_stay_as_they_were_and_go_with_the_part_they_are_in(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path], load_model: Callable[[str], Any]
) -> None:
    """The second time only attention gets levels; the pruned feed-forward weights are in no genome."""
    bench, lm = new_bench(model_folder("llama")), load_model("llama")
    pruned = pruned_first(bench, dropped=False)
    menu = [{"method": "rtn", "bits": 4, "group_size": 16}, {"method": "drop", "units": ["mlp", "block"]}]
    levels = bench.run("compress", {"menu": menu, "targets": ["re:.*self_attn"]}, model=pruned.out)
    table = CostTable(DatabaseIndex(levels.out))
    stored = load_file(model_folder("llama") / "model.safetensors")
    carried = [unit.name for unit in lm.units if ".mlp." in unit.name]
    for part in ("", "model.layers.0.mlp", "model.layers.2"):
        genome = [int(unit.name == part) if unit.is_parent else 1 for unit in table.units]
        folder = bench.folder / f"allocation{part}"
        folder.mkdir()
        allocation = make_allocation(table, genome, solver="hand", budget={"bits": 4.0})
        save_allocations(folder, [allocation])
        applied = bench.run("apply", {"pick": "bits=4"}, allocations=folder, database=levels.out)
        model, gone = CompressedModel(applied.out), f"{part}." if part else "nothing"
        for name in carried:
            assert (name in model.levels) == (not name.startswith(gone))
            if not name.startswith(gone):
                weight = lm.weight(next(unit for unit in lm.units if unit.name == name))
                assert torch.equal(model.level(name).decode(), weight * largest_half(weight))
        encoded = [name for name, level in model.levels.items() if level != "drop"]
        size = sum(tensor.nbytes for name, tensor in stored.items() if not name.startswith(gone))
        kept = sum(tensor.numel() for name, tensor in stored.items() if not name.startswith(gone))
        for name in encoded:
            tensors = load_file(applied.out / "units" / f"{name}.safetensors")
            size += sum(tensor.nbytes for tensor in tensors.values()) - stored[f"{name}.weight"].nbytes
            kept -= stored[f"{name}.weight"].numel() // 2  # quantized or not, it was pruned before
        assert (allocation.sizes["bytes"], allocation.sizes["parameters"]) == (size, kept)
