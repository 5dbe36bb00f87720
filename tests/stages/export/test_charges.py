"""Bytes counted in a format are those of the files that are written in it, whatever the levels."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from layerwise.errors import UsageError
from layerwise.stages.allocate.allocation import Allocation, load_allocations, make_allocation, save_allocations
from layerwise.stages.allocate.costs import CostTable
from layerwise.stages.export.charges import Charges
from layerwise.stages.export.shards import FILE_BYTES, Part, charged_bytes, layout_of, write_file, write_shards
from layerwise.stages.levels.database import DatabaseIndex

MENU = [
    {"method": "rtn", "bits": [2, 3, 4, 8], "group_size": 16},
    {"method": "rtn", "bits": [4, 8], "group_size": -1},
    {"method": "rtn", "bits": 4, "group_size": 16, "sym": False},
    {"method": "magnitude", "sparsity": 0.5},
    {"method": "drop", "units": ["mlp"]},
    {"method": "dense"},
]


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def benches(make_bench: Callable[[Path], Any], model_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """By family, a bench and its levels."""
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            bench = make_bench(model_folder(family))
            targets = ["blocks", "head", "embedding"]
            made[family] = bench, bench.run("compress", {"menu": MENU, "targets": targets})
        return made[family]

    return get


def drawn(table: CostTable, seed: int) -> Allocation:
    """Any levels that are offered, the same for what engines fuse."""
    chance = random.Random(seed)
    members = defaultdict(list)
    for row, unit in enumerate(table.units):
        members[unit.unit.group or unit.name].append(row)
    genome = [0] * len(table.units)
    for rows in members.values():
        offers = [
            {level.name for level, yes in zip(table.units[row].levels, table.offered[row], strict=False) if yes}
            for row in rows
        ]
        name = chance.choice(sorted(set.intersection(*offers)))
        for row in rows:
            genome[row] = [level.name for level in table.units[row].levels].index(name)
    return make_allocation(table, genome, solver="drawn", budget={"bits": 32})


FORMATS = [
    ("compressed_tensors", {"any_bits": True, "asymmetric": True, "dense_experts": True}),
    ("compressed_tensors", {"dense_experts": True}),
    ("gptq", {}),
    ("gptq_v2", {}),
    ("dense", {}),
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "mixtral", "phi3"])
@pytest.mark.parametrize(("format_", "settings"), FORMATS)
def test_predicted_bytes_are_those_of_the_weight_files(
    benches: Callable[[str], Any], tmp_path: Path, family: str, format_: str, settings: dict[str, Any]
) -> None:
    bench, levels = benches(family)
    index = DatabaseIndex(levels.out)
    table = CostTable(index, charges=Charges(format_, settings, index, bench.model))
    allocation = replace(drawn(table, seed=len(family)), format=format_)
    save_allocations(tmp_path, [allocation])
    applied = bench.run("apply", {"pick": allocation.candidate}, allocations=tmp_path, database=levels.out)
    for shard_bytes in ("5GB", "1kB"):
        params = {"format": format_, "shard_bytes": shard_bytes, **settings}
        out = bench.run("export", params, model=applied.out).out
        size = weight_bytes(out)
        assert json.loads((out / "layerwise.json").read_text())["weight_files"] == {
            "bytes": size, "predicted_bytes": allocation.sizes["bytes"],
        }  # fmt: skip
        assert size == allocation.sizes["bytes"]
        for file in out.glob("*.safetensors"):
            load_file(file)


def test_a_budget_of_bytes_is_kept_by_the_file_that_is_written(benches: Callable[[str], Any]) -> None:
    bench, levels = benches("llama")
    budget = 70_000
    params = {"solver": "uniform", "budgets": {"bytes": budget}, "format": "compressed-tensors"}
    found = bench.run("allocate", params, database=levels.out)
    (allocation,) = load_allocations(found.out)
    assert allocation.format == "compressed_tensors"
    assert not set(allocation.levels.values()) & {"rtn-2b-g16", "rtn-3b-g16", "rtn-4b-g16-asym", "drop"}
    applied = bench.run("apply", allocations=found.out, database=levels.out)
    out = bench.run("export", {"format": "compressed_tensors"}, model=applied.out).out
    assert weight_bytes(out) == allocation.sizes["bytes"] <= budget


def test_levels_that_a_format_cannot_hold_are_not_offered_and_say_why(benches: Callable[[str], Any]) -> None:
    bench, levels = benches("llama")
    index = DatabaseIndex(levels.out)
    charges = Charges("gptq", {}, index, bench.model)
    table = CostTable(index, charges=charges)
    for row, unit in enumerate(table.units):
        for column, level in enumerate(unit.levels):
            refused = table.refused.get((row, column))
            assert refused == charges.why_not(unit, level)
            assert not (refused and table.offered[row, column])
    assert {why for why in table.refused.values() if "zero point of 0" in why}
    with pytest.raises(UsageError, match="fixed: the format cannot hold rtn-4b-g16-asym"):
        CostTable(index, charges=charges, fixed={"self_attn.q_proj": "rtn-4b-g16-asym"})
    only = [{"method": "rtn", "bits": 4, "group_size": 16, "sym": False}]
    other = DatabaseIndex(bench.run("compress", {"menu": only}).out)
    table = CostTable(other, charges=Charges("gptq", {}, other, bench.model))
    with pytest.raises(UsageError, match=r"the format holds none of the levels of .*zero point of 0"):
        table.problem({"bits": 4}, tie=False, losses=None)


def test_files_are_as_long_as_their_parts_are_charged_wherever_they_are_cut(tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float16]
    tensors = {
        f"a.{'ü' * (number % 3)}{number}": torch.arange(number * 7 % 50).to(dtypes[number % 6]).reshape(-1, 1)
        for number in range(40)
    } | {"scalar": torch.tensor(3.5)}
    parts = [Part(name, layout_of({name: tensors[name]}), lambda name=name: {name: tensors[name]}) for name in tensors]
    for number, shard_bytes in enumerate((1, 100, 1000, 10**9)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_shards(parts, folder, shard_bytes=shard_bytes)
        assert weight_bytes(folder) == FILE_BYTES + sum(charged_bytes(part.layout) for part in parts)
        read = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in read)


def test_a_file_written_without_room_is_the_one_of_the_library(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"b": torch.ones(3, 5), "a": torch.zeros(7), "c": torch.ones(2)}
    write_file(tensors, tmp_path / "ours", {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with safe_open(tmp_path / "ours", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
