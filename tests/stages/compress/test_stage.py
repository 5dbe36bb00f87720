"""The `compress` stage: every level of every unit, what it costs, and what becomes of units that lack something."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from layerwise.errors import NotFinite, UnsupportedModel, UsageError
from layerwise.stages import find_stage
from layerwise.stages.allocate.costs import CostTable
from layerwise.stages.calibrate.stage import CalibrateParams
from layerwise.stages.calibrate.statistics import Statistics
from layerwise.stages.compress.params import CompressParams, mistakes
from layerwise.stages.contract import ModelSource
from layerwise.stages.levels.database import Database, DatabaseIndex
from layerwise.stages.levels.files import unit_file
from layerwise.stages.levels.mask import kept
from layerwise.stages.models.causal_lm import CausalLM

NAMES = ["dense", "gptq-2b-g16", "gptq-4b-g16", "rtn-3b-g32-asym"]
EVERYTHING = ["blocks", "head", "embedding"]


def tensor_bytes(file: Path) -> int:
    """Of a safetensors file all that is no header."""
    content = file.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "granitemoe"])
def test_every_unit_gets_every_level_with_its_errors(
    chain: Callable[[str], Any], load_model: Callable[[str], Any], family: str
) -> None:
    made, lm = chain(family), load_model(family)
    database, statistics = Database(made.levels.out, made.bench.model), Statistics(made.stats.out)
    rows = {(row["unit"], row["level"]): row for row in made.levels.rows["levels"]}
    units = [unit for unit in lm.units if unit.block is not None]
    assert list(rows) == [(unit.name, name) for unit in units for name in NAMES]
    for unit in units:
        W = lm.weight(unit).double()
        H = statistics.tensor(unit, "hessian").double()
        for name in NAMES:
            row, level = rows[unit.name, name], database.level(unit.name, name)
            D = level.decode().double() - W
            assert row["status"] == "ok"
            assert row["offered"] == (name != "dense"), "the menu does not say that a unit may stay as it is"
            assert row["weight_nmse"] == pytest.approx(D.norm().item() ** 2 / W.norm().item() ** 2, rel=1e-9)
            output_error = torch.trace(D @ H @ D.T) / torch.trace(W @ H @ W.T)
            assert row["output_error"] == pytest.approx(output_error.item(), rel=1e-3)  # float32 product
            assert row["effective_bits"] == level.effective_bits
            assert row["size_bytes"] == level.size_bytes
            assert row["parameters"] == unit.n_weights
            assert row["flops"] == 2 * unit.n_weights * unit.share
            assert row["method"] == name.split("-")[0]
            assert json.loads(row["recipe"]) == dict(level.recipe)
    (note,) = find_stage("calibrate").notes(CalibrateParams(), made.bench.model)
    left = sum(unit.n_weights for unit in lm.units if unit.block is None)
    left += sum(weight.n_weights for weight in lm.uncovered)
    assert note.startswith(f"{left:,} of "), "what gets no level is told before the run, with how much it is"
    menu = [{"method": "rtn", "bits": 4}]
    assert [note] == list(find_stage("compress").notes(CompressParams(menu=menu), made.bench.model))


def test_level_0_is_what_the_model_has_and_is_offered_only_if_the_menu_says_so(
    chain: Callable[[str], Any], load_model: Callable[[str], Any]
) -> None:
    made, lm = chain("gpt2"), load_model("gpt2")
    levels = made.bench.run("compress", {"menu": [{"method": "dense"}]}, statistics=made.stats.out)
    database = Database(levels.out, made.bench.model)
    units = [unit for unit in lm.units if unit.block is not None]
    for unit in units:
        assert torch.equal(database.level(unit.name, "dense").decode(), lm.weight(unit))
        assert tensor_bytes(unit_file(levels.out, unit.name)) == 0, "it is not stored again"
    rows = levels.rows["levels"]
    assert len(rows) == len(units)
    assert {(row["bits"], row["weight_nmse"], row["output_error"], row["offered"]) for row in rows} == {
        (32, 0, 0, True)
    }


def test_the_same_stage_gives_the_same_bytes(chain: Callable[[str], Any]) -> None:
    made = chain("mixtral")
    menu = {"menu": [{"method": "gptq", "bits": 3, "group_size": 16}, {"method": "drop"}]}
    outs = [made.bench.run("compress", menu, statistics=made.stats.out).out for _ in range(2)]
    files = sorted(path.relative_to(outs[0]) for path in outs[0].rglob("*") if path.is_file())
    assert len(files) == 1 + 3 * (4 + 1 + 8 + 2)
    assert all((outs[0] / name).read_bytes() == (outs[1] / name).read_bytes() for name in files)


# --- costs ---


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "mixtral", "granitemoe", "bloom"])
def test_the_bytes_of_an_allocation_are_those_of_its_tensors_and_of_the_rest_of_the_checkpoint(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path], family: str
) -> None:
    """Chosen levels' tensors in their files; beside them the checkpoint, without what the units have there and, where a
    part is dropped, without all tensors of that part."""
    folder = model_folder(family)
    parts = ["block"] if family == "bloom" else ["attention", "mlp", "block"]
    menu = [
        {"method": "rtn", "bits": [3], "group_size": 16, "sym": False}, {"method": "magnitude", "sparsity": 0.4},
        {"method": "drop", "units": parts},
    ]  # fmt: skip
    targets = ["down_proj", "fc2", "dense", "q_proj", "head"]
    known = {unit.kind.rpartition(".")[2] for unit in CausalLM.load(ModelSource(folder)).units} | {"head"}
    levels = new_bench(folder).run("compress", {"menu": menu, "targets": [name for name in targets if name in known]})
    index = DatabaseIndex(levels.out)
    database, table = Database(levels.out, ModelSource(folder)), CostTable(index)
    total = sum(tensor_bytes(file) for file in folder.glob("*.safetensors"))
    assert table.describe([0] * len(index.units))["bytes"] == total
    stored = {unit.name: 4 * unit.n_weights for unit in index.units if not unit.is_parent}
    weights = [unit for unit in index.units if not unit.is_parent]
    for number in (1, 2):
        genome = [0 if unit.is_parent else number for unit in index.units]
        chosen = [database.level(unit.name, unit.levels[number].name) for unit in weights]
        in_files = sum(tensor.numel() * tensor.element_size() for level in chosen for tensor in level.tensors.values())
        sizes = table.describe(genome)
        assert sizes["bytes"] == total - sum(stored.values()) + in_files
        zeros = sum(unit.n_weights - level.parameters for unit, level in zip(weights, chosen, strict=True))
        assert sizes["parameters"] == total // 4 - zeros
        assert (zeros > 0) == (number == 2)
    # Levels of all units take the bytes of their files, of which nothing else is.
    everything = sum(tensor_bytes(unit_file(levels.out, unit.name)) for unit in weights)
    assert everything == sum(level.costs["bytes"] for unit in weights for level in unit.levels[1:])
    (first,) = [row for row, unit in enumerate(index.units) if unit.unit.role == "block" and unit.unit.block == 0]
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    inside = sum(
        4 * tensor.numel() for name, tensor in tensors.items() if name.startswith(f"{index.units[first].name}.")
    )
    genome = [0] * len(index.units)
    genome[first] = 1
    assert table.describe(genome)["bytes"] == total - inside


def test_a_tied_weight_that_is_saved_twice_counts_twice_until_it_is_compressed(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path], edited_model: Callable[..., Path]
) -> None:
    def twice(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = edited_model(model_folder("qwen3"), twice)
    levels = new_bench(folder).run("compress", {"menu": [{"method": "rtn", "bits": 8}], "targets": ["head"]})
    index = DatabaseIndex(levels.out)
    total = tensor_bytes(folder / "model.safetensors")
    assert CostTable(index).describe([0])["bytes"] == total
    assert CostTable(index).describe([1])["bytes"] == total - 2 * 4 * 256 * 32 + 256 * 32 + 2 * 256


# --- without statistics, or with too few ---


def test_what_needs_no_statistics_needs_no_calibration(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path], load_model: Callable[[str], Any]
) -> None:
    bench, lm = new_bench(model_folder("granitemoe")), load_model("granitemoe")
    menu = [{"method": "rtn", "bits": 4}, {"method": "magnitude", "sparsity": 0.5}, {"method": "drop"}]
    levels = bench.run("compress", {"menu": menu, "targets": EVERYTHING})
    assert {row["unit"] for row in levels.rows["levels"]} == {
        *(unit.name for unit in lm.units), *(parent.name for parent in lm.parents if parent.role != "block"),
    }  # fmt: skip
    assert {row["output_error"] for row in levels.rows["levels"]} == {None}
    assert {row["status"] for row in levels.rows["levels"]} == {"ok"}
    assert [row["status"] for row in levels.rows["units"]] == ["ok"] * len(lm.units), "the survey is told here, then"
    default = bench.run("compress", {"menu": menu[:1]})
    assert {row["unit"] for row in default.rows["levels"]} == {unit.name for unit in lm.units if unit.block is not None}


def test_an_expert_that_few_tokens_reached_gets_its_levels_from_the_fallback(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path], load_model: Callable[[str], Any]
) -> None:
    bench, lm = new_bench(model_folder("mixtral")), load_model("mixtral")
    stats = bench.run("calibrate", {"statistics": ["hessian", "block_inputs"]})
    counts = Statistics(stats.out).counts
    experts = {unit.name: counts.get(unit.name, 0) for unit in lm.units if unit.role == "expert"}
    least = sorted(experts.values())[len(experts) // 2]
    menu = [
        {"method": "gptq", "bits": [2, 4], "group_size": 16}, {"method": "gptq_sequential", "bits": 3},
        {"method": "magnitude", "sparsity": 0.5},
    ]  # fmt: skip
    levels = bench.run("compress", {"menu": menu, "least_tokens": least}, statistics=stats.out)
    database = Database(levels.out, bench.model)
    nearest = {"method": "rtn", "bits": [2, 4], "group_size": 16, "grid": "mse"}
    plain = Database(bench.run("compress", {"menu": [nearest]}).out, bench.model)
    few = {name for name, count in experts.items() if count < least}
    assert 0 < len(few) < len(experts)
    for row in levels.rows["levels"]:
        if row["unit"] in few and row["level"].startswith("gptq"):
            assert row["status"] == "fallback"
            assert row["error"] == f"only {experts[row['unit']]} calibration tokens reached it: made by rtn"
            assert row["method"] == "rtn"
        else:
            assert (row["status"], row["error"]) == ("ok", None)
    for unit in few:
        for bits in (2, 4):
            found = database.level(unit, f"gptq-{bits}b-g16")
            assert torch.equal(found.decode(), plain.level(unit, f"rtn-{bits}b-g16-mse").decode())


def test_an_expert_that_no_token_reached_costs_no_other_unit_its_levels(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path], edited_model: Callable[..., Path]
) -> None:
    def never_chosen(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.block_sparse_moe.gate.weight"].zero_()

    bench = new_bench(edited_model(model_folder("mixtral"), never_chosen))
    stats = bench.run("calibrate", {"statistics": ["hessian", "block_inputs"]})
    statistics = Statistics(stats.out)
    experts = [unit for unit, _ in statistics.survey.units if unit.block == 1 and unit.role == "expert"]
    unseen = {unit.name for unit in experts if unit.name not in statistics.counts}
    assert len(unseen) == 4, "ties go to two of the four"
    for unit in experts:
        assert bool(statistics.tensor(unit, "hessian").any()) == (unit.name not in unseen)
    menu = [
        {"method": "gptq", "bits": 4, "group_size": 16}, {"method": "gptq_sequential", "bits": 3, "group_size": 16},
    ]  # fmt: skip
    levels = bench.run("compress", {"menu": menu, "least_tokens": 1}, statistics=stats.out)
    assert {row["unit"] for row in levels.rows["levels"] if row["status"] == "fallback"} == unseen
    assert {row["status"] for row in levels.rows["levels"]} == {"ok", "fallback"}


# --- blocks ---


def test_methods_of_blocks_stand_beside_those_of_units(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    bench = new_bench(model_folder("gpt2"))
    stats = bench.run("calibrate", {"statistics": ["hessian", "block_inputs"], "targets": ["blocks", "head"]})
    menu = [
        {"method": "gptq_sequential", "bits": [2, 3], "group_size": 16},
        {"method": "gptq", "bits": 2, "group_size": 16},
    ]
    levels = bench.run("compress", {"menu": menu}, statistics=stats.out)
    rows = {(row["unit"], row["level"]): row for row in levels.rows["levels"]}
    database = Database(levels.out, bench.model)
    first = "transformer.h.0.attn.c_attn"  # nothing of its block comes before it
    plain, sequential = (database.level(first, f"{name}-2b-g16").decode() for name in ("gptq", "gptq_sequential"))
    assert torch.allclose(plain, sequential, atol=1e-3)
    last = "transformer.h.2.mlp.c_proj"
    plain, sequential = (database.level(last, f"{name}-2b-g16").decode() for name in ("gptq", "gptq_sequential"))
    assert not torch.allclose(plain, sequential, atol=1e-3)
    head = rows["lm_head", "gptq_sequential-3b-g16"]
    assert (head["status"], head["error"]) == ("fallback", "it stands in no block: made by rtn")
    assert {row["status"] for (unit, _), row in rows.items() if unit != "lm_head"} == {"ok"}


# --- what cannot be made ---


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_unit_that_is_not_finite_loses_its_levels_and_the_rest_goes_on(
    new_bench: Callable[..., Any],
    model_folder: Callable[[str], Path],
    edited_model: Callable[..., Path],
    broken: float,
) -> None:
    last = "model.layers.2.mlp.down_proj"  # nothing is calibrated after it

    def edit(tensors: dict[str, Any]) -> None:
        tensors[f"{last}.weight"][3, 5] = broken

    bench = new_bench(edited_model(model_folder("llama"), edit))
    stats = bench.run("calibrate", {"statistics": ["hessian", "block_inputs"]})
    menu = [
        {"method": "gptq", "bits": [2, 4], "group_size": 16}, {"method": "rtn", "bits": 3}, {"method": "dense"},
        {"method": "magnitude", "sparsity": 0.5}, {"method": "gptq_sequential", "bits": 3},
    ]  # fmt: skip
    levels = bench.run("compress", {"menu": menu}, statistics=stats.out)
    rows = levels.rows["levels"]
    lost = {(row["unit"], row["level"]) for row in rows if row["status"] != "ok"}
    names = ["dense", "gptq-2b-g16", "gptq-4b-g16", "rtn-3b-g128", "magnitude-50%", "gptq_sequential-3b-g128"]
    block = {row["unit"] for row in rows if row["unit"].startswith("model.layers.2.")}
    assert lost == {(last, name) for name in names} | {(unit, names[-1]) for unit in block}
    for row in rows:
        if row["status"] != "ok":
            assert row["status"] == "nan"
            assert row["error"]
            assert row["output_error"] is row["effective_bits"] is row["bits"] is row["size_bytes"] is None
    assert len(rows) == 21 * 6
    with pytest.raises(UsageError, match=f"unit {last} has no level 'rtn-3b-g128': the weight has 1 NaN or Inf"):
        Database(levels.out, bench.model).level(last, "rtn-3b-g128")
    with pytest.raises(NotFinite, match=f"unit {last} has no level to choose"):
        bench.run("allocate", {"solver": "uniform", "budgets": {"bits": 4}}, database=levels.out)


def test_statistics_that_are_not_finite_cost_the_units_behind_them_their_levels_but_not_what_they_are(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path], edited_model: Callable[..., Path]
) -> None:
    broken = "model.layers.1.self_attn.o_proj"

    def edit(tensors: dict[str, Any]) -> None:
        tensors[f"{broken}.weight"][0, 0] = math.nan

    bench = new_bench(edited_model(model_folder("llama"), edit))
    stats = bench.run("calibrate")
    menu = [{"method": "gptq", "bits": 4, "group_size": 16}, {"method": "dense"}]
    levels = bench.run("compress", {"menu": menu}, statistics=stats.out)
    status = {(row["unit"], row["level"]): row["status"] for row in levels.rows["levels"]}
    units = {unit for unit, _ in status}
    before = {name for name in units if ".0." in name or any(f".1.self_attn.{x}_proj" in name for x in "qkv")}
    assert {name for name in units if status[name, "gptq-4b-g16"] == "ok"} == before
    assert len(before) == 10
    assert {name for name in units if status[name, "dense"] != "ok"} == {broken}


def test_what_no_block_has_cannot_be_dropped(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    bench = new_bench(model_folder("bloom"))
    with pytest.raises(
        UnsupportedModel, match=r"the menu drops or narrows attention and mlp, but .*: its halves are not"
    ) as caught:
        bench.run("compress", {"menu": [{"method": "drop"}]})
    assert "units: [block]" in (caught.value.hint or "")
    rows = bench.run("compress", {"menu": [{"method": "drop", "units": "block"}]}).rows["levels"]
    parents = [row for row in rows if row["level"] in ("keep", "drop")]
    assert [(row["unit"], row["level"], row["offered"]) for row in parents] == [
        (f"transformer.h.{block}", level, True) for block in range(3) for level in ("keep", "drop")
    ]


# --- what is refused ---


@pytest.mark.parametrize(
    ("menu", "complaint"),
    [
        ([], "at least 1 item"),
        ([{"method": "rtn", "bits": [3, 4]}, {"method": "rtn", "bits": [4, 5]}], "makes level rtn-4b-g128 twice"),
        ([{"method": "drop"}, {"method": "drop", "units": "block"}], "makes level drop twice"),
        ([{"method": "width", "keep": 0.5}, {"method": "width", "keep": 0.5, "units": "mlp"}], "width-50% twice"),
        ([{"method": "gptk", "bits": 4}], "gptk"),
        ([{"method": "gptq", "bits": 9}], "less than or equal to 8"),
        ([{"method": "gptq", "bits": 4, "groupsize": 3}], "groupsize"),
        ([{"method": "drop", "units": "head"}], "'attention', 'mlp' or 'block'"),
    ],
)
def test_a_menu_is_checked_before_anything_runs(menu: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        CompressParams.model_validate({"menu": menu})


def test_a_menu_that_needs_what_nobody_gathers_is_a_mistake_of_the_workflow() -> None:
    params = CompressParams.model_validate(
        {
            "menu": [
                {"method": "rtn", "bits": 4},
                {"method": "gptq", "bits": 3},
                {"method": "gptq_sequential", "bits": 2},
            ]
        }
    )
    place = [("menu", 1, "method"), ("menu", 2, "method")]
    nothing = list(mistakes(params, {}))
    assert [where for where, _ in nothing] == place
    assert nothing[0][1] == "gptq needs hessian: add a `calibrate` stage to needs"
    few = list(mistakes(params, {"statistics": [CalibrateParams(statistics=["channels"])]}))
    assert [where for where, _ in few] == place
    assert "needs block_inputs, but the calibrate stage gathers only channels" in few[1][1]
    assert not list(mistakes(params, {"statistics": [CalibrateParams()]})), "it gathers what is needed"
    enough = CalibrateParams(statistics=["hessian", "block_inputs"])
    assert not list(mistakes(params, {"statistics": [enough]}))
    ((where, text),) = mistakes(params, {"statistics": [enough], "model": [object()]})
    assert (where, "give `model` to the calibrate stage" in text) == ((), True)


def test_statistics_that_are_not_there_are_missed_before_any_work(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    bench = new_bench(model_folder("llama"))
    menu = {"menu": [{"method": "rtn", "bits": 4}, {"method": "gptq", "bits": 4}]}
    stats = bench.run("calibrate", {"statistics": ["channels"], "targets": ["q_proj"]}).out
    with pytest.raises(UsageError, match="the menu needs hessian, but the statistics have only channels"):
        bench.run("compress", menu, statistics=stats)
    stats = bench.run("calibrate", {"targets": ["q_proj"]}).out
    with pytest.raises(UsageError, match=r"3 of its units were not calibrated, the first is model\.layers\.0\."):
        bench.run("compress", {**menu, "targets": ["q_proj", "k_proj"]}, statistics=stats)
    assert not list(bench.folder.glob("*/items/units/*")), "no unit was begun"
    both = bench.run("compress", {"menu": menu["menu"][:1], "targets": ["q_proj", "k_proj"]}, statistics=stats)
    known = {row["unit"] for row in both.rows["levels"] if row["output_error"] is not None}
    assert known == {f"model.layers.{block}.self_attn.q_proj" for block in range(3)}
    with pytest.raises(UnsupportedModel, match=r"targets: 'qproj' names no unit"):
        bench.run("compress", {**menu, "targets": ["qproj"]}, statistics=stats)


# --- a model that was compressed before ---


def test_a_pruned_model_keeps_its_mask_when_it_is_quantized_and_what_is_not_chosen_keeps_its_level(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    bench = new_bench(model_folder("llama"))
    prune = {"menu": [{"method": "magnitude", "sparsity": 0.5}], "targets": ["down_proj", "up_proj"]}
    pruned = bench.run("compress", prune)
    chosen = bench.run(
        "allocate", {"solver": "uniform", "budgets": {"bits": [16.0]}}, database=pruned.out
    )  # the only level
    model = bench.run("apply", {"pick": "bits=16"}, allocations=chosen.out, database=pruned.out)
    masks = Database(pruned.out, bench.model)

    stats = bench.run("calibrate", model=model.out)
    menu = [{"method": "gptq", "bits": 4, "group_size": 16}, {"method": "rtn", "bits": 3, "group_size": 16}]
    # The pruned model is inside the statistics; what was pruned, but is not calibrated now, keeps its level.
    again = bench.run("compress", {"menu": menu, "ignore": ["up_proj"]}, statistics=stats.out)
    database, index = Database(again.out, bench.model), DatabaseIndex(again.out)
    down = [unit for unit in index.units if unit.name.endswith("down_proj")]
    assert len(down) == 3
    for unit in down:
        before = masks.level(unit.name, "magnitude-50%")
        unchanged = database.level(unit.name, unit.levels[0].name)
        assert unit.levels[0].name == "magnitude-50%"
        assert torch.equal(unchanged.decode(), before.decode())
        for entry in unit.levels[1:]:
            level = database.level(unit.name, entry.name)
            assert level.recipe["encoding"] == "masked_grid"
            assert torch.equal(kept(level), kept(before))
            assert not level.decode()[~kept(before)].any()
            assert entry.costs is not None
            assert entry.costs["parameters"] == 640
    other = next(unit for unit in index.units if unit.name.endswith("q_proj"))
    assert database.level(other.name, "gptq-4b-g16").recipe["encoding"] == "grid"
    assert not any(unit.name.endswith("up_proj") for unit in index.units)

    # Nothing changed: the model's own bytes, masks and values of all six pruned units instead of their weights.
    table = CostTable(index)
    total = tensor_bytes(model_folder("llama") / "model.safetensors")
    saved = 6 * (4 * 1280 - (1280 // 8 + 4 * 640))
    assert table.describe([0] * len(index.units))["bytes"] == total - saved
    assert table.describe([0] * len(index.units))["parameters"] == total // 4 - 6 * 640

    # The model of the database has everything: the network that it loads is the pruned one.
    shutil.rmtree(model.out)
    network = CausalLM.load(database.model(bench.model))
    for unit in network.units:
        if unit.name.endswith(("down_proj", "up_proj")):
            expected = masks.level(unit.name, "magnitude-50%").decode()
            assert torch.equal(network.weight(unit), expected)


@pytest.mark.parametrize("calibrated", [False, True])
def test_what_a_model_has_dropped_or_pruned_stays_so_when_it_is_compressed_again(
    new_bench: Callable[..., Any],
    model_folder: Callable[[str], Path],
    load_model: Callable[[str], Any],
    calibrated: bool,
) -> None:
    bench = new_bench(model_folder("mixtral"))
    menu = [{"method": "magnitude", "sparsity": 0.5}, {"method": "drop", "units": ["attention"]}]
    first = bench.run("compress", {"menu": menu, "targets": ["experts.down_proj"]})
    index = DatabaseIndex(first.out)
    half = next(unit.name for unit in index.units if unit.is_parent and unit.unit.block == 1)
    allocations = bench.run("allocate", {"solver": "uniform", "budgets": {"bits": [16.0]}}, database=first.out)
    document = json.loads((allocations.out / "allocations.json").read_text())
    genome = [1 if not unit.is_parent or unit.name == half else 0 for unit in index.units]
    table = CostTable(index)
    document[0] |= {
        "genome": genome, "candidate": table.candidate(genome), "sizes": table.describe(genome),
        "levels": {unit.name: unit.levels[level].name for unit, level in zip(index.units, genome, strict=True)},
    }  # fmt: skip
    (allocations.out / "allocations.json").write_text(json.dumps(document))
    model = bench.run("apply", {"pick": document[0]["candidate"]}, allocations=allocations.out, database=first.out)

    inputs = {"model": model.out}
    if calibrated:
        inputs = {"statistics": bench.run("calibrate", model=model.out).out}
        _check_hessian_behind(
            Statistics(inputs["statistics"]), load_model("mixtral"), half, Database(first.out, bench.model)
        )
    second = bench.run("compress", {"menu": [{"method": "rtn", "bits": 4}, {"method": "dense"}]}, **inputs)
    units = {unit.name: unit for unit in DatabaseIndex(second.out).units}
    assert not any(name.startswith(f"{half}.") for name in units), "what was dropped is not there any more"
    down = units["model.layers.1.mlp.experts.2.down_proj"]
    assert [level.name for level in down.levels] == ["magnitude-50%", "rtn-4b-g128"]
    assert [level.name for level in units["model.layers.0.self_attn.q_proj"].levels] == ["dense", "rtn-4b-g128"]
    database = Database(second.out, replace(bench.model, compressed=None))
    pruned = ~kept(database.level(down.name, "magnitude-50%"))
    assert pruned.sum() == 640
    assert not database.level(down.name, "rtn-4b-g128").decode()[pruned].any()
    before, after = table.describe(genome), CostTable(DatabaseIndex(second.out)).describe([0] * len(units))
    assert {name: before[name] for name in ("bytes", "parameters")} == {
        name: after[name] for name in ("bytes", "parameters")
    }


def _check_hessian_behind(statistics: Statistics, lm: Any, half: str, levels: Database) -> None:
    """The Hessian of the last block's attention is of inputs in the compressed model: the dense one with the pruned
    weights written into it, and the last layer of the half-block that is dropped set to zero."""
    assert not [name for name in statistics.selected if name.startswith(f"{half}.")]
    model = copy.deepcopy(lm.model)
    for unit in lm.units:
        if unit.kind == "mlp.experts.down_proj":
            weight = levels.level(unit.name, "magnitude-50%").decode()
            unit.view.write(model.get_parameter(unit.view.tensor).data, weight)
    model.get_parameter(f"{half}.o_proj.weight").data.zero_()
    last = next(unit for unit in lm.units if unit.name == "model.layers.2.self_attn.q_proj")
    rows: list[Any] = []
    model.get_submodule(last.name).register_forward_pre_hook(lambda module, args: rows.append(args[0].flatten(0, 1)))
    tokens = np.load(next(statistics.folder.parent.glob("items/tokens-*.npy"))).astype(np.int64)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokens), use_cache=False)
    expected = rows[0].T @ rows[0]
    found = statistics.tensor(last, "hessian")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_an_interrupted_stage_repeats_no_finished_unit(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerwise.stages.compress import rtn as module

    params = {"menu": [{"method": "rtn", "bits": 4}], "targets": ["q_proj", "o_proj"]}
    expected = new_bench(model_folder("llama")).run("compress", params).out
    bench, plain, ran = new_bench(model_folder("llama")), module.rtn, []

    def dies(task: Any, params: Any) -> Any:
        ran.append(task.unit)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return plain(task, params)

    dies.__module__ = module.__name__
    monkeypatch.setattr(module, "rtn", dies)
    with pytest.raises(KeyboardInterrupt):
        bench.run("compress", params)
    found = bench.run("compress", params, again=True).out
    assert len(ran) == 7
    assert len(set(ran)) == 6
    files = sorted(path.relative_to(expected) for path in expected.rglob("*") if path.is_file())
    assert all((expected / name).read_bytes() == (found / name).read_bytes() for name in files)


def test_what_calibrate_left_out_may_be_ignored_by_compress_too_but_not_all(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    bench = new_bench(model_folder("llama"))
    stats = bench.run("calibrate", {"ignore": ["down_proj"]})
    menu = {"menu": [{"method": "gptq", "bits": 4, "group_size": 16}]}
    levels = bench.run("compress", {**menu, "ignore": ["down_proj", "up_proj"]}, statistics=stats.out)
    kinds = {unit.name.rpartition(".")[2] for unit in DatabaseIndex(levels.out).units}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"}
    with pytest.raises(UnsupportedModel, match="ignore: 'dwn_proj' names no unit"):
        bench.run("compress", {**menu, "ignore": ["dwn_proj"]}, statistics=stats.out)
    few = bench.run("calibrate", {"targets": ["down_proj"]})
    with pytest.raises(UsageError, match="no unit is left: of those with statistics all are ignored by"):
        bench.run("compress", {**menu, "ignore": ["down_proj"]}, statistics=few.out)
