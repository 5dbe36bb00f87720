"""The `compress` stage: every level of every unit, and what becomes of units that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from layerwise.errors import NotFinite, UsageError
from layerwise.stages.calibrate.statistics import Statistics
from layerwise.stages.compress.stage import CompressParams
from layerwise.stages.levels.database import Database
from layerwise.stages.models.checkpoint import Checkpoint

NAMES = ["gptq-2b-g16", "gptq-4b-g16", "rtn-3b-g32-asym"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_unit_gets_every_level_with_its_errors(
    chain: Callable[[str], Any], load_model: Callable[[str], Any], family: str
) -> None:
    made, lm = chain(family), load_model(family)
    database, statistics = Database(made.levels.out), Statistics(made.stats.out)
    rows = {(row["unit"], row["level"]): row for row in made.levels.rows["levels"]}
    assert list(rows) == [(unit.name, name) for unit in lm.units for name in NAMES]
    for unit, described in zip(lm.units, statistics.units, strict=True):
        W = lm.weight(unit).double()
        W = W.T if unit.transposed else W
        H = statistics.hessian(described).double()
        for name in NAMES:
            row, level = rows[unit.name, name], database.level(unit.name, name)
            D = database.decode(unit.name, name).double() - W
            assert row["status"] == "ok"
            assert row["weight_nmse"] == pytest.approx(D.norm().item() ** 2 / W.norm().item() ** 2, rel=1e-9)
            output_error = torch.trace(D @ H @ D.T) / torch.trace(W @ H @ W.T)
            assert row["output_error"] == pytest.approx(output_error.item(), rel=1e-3)  # float32 product
            assert row["effective_bits"] == level.effective_bits
            assert row["size_bytes"] == level.size_bytes
            assert row["method"] == name.split("-")[0]


def test_a_weight_comes_back_in_the_layout_of_the_model(
    chain: Callable[[str], Any], load_model: Callable[[str], Any]
) -> None:
    database, lm = Database(chain("gpt2").levels.out), load_model("gpt2")
    for unit in lm.units:
        assert database.weight(unit.name, 1).shape == lm.weight(unit).shape
        assert torch.equal(database.weight(unit.name, 1).T, database.decode(unit.name, NAMES[1]))


def test_a_dense_level_is_the_weight_itself(
    new_bench: Callable[..., Any], chain: Callable[[str], Any], load_model: Callable[[str], Any]
) -> None:
    made, lm = chain("gpt2"), load_model("gpt2")
    levels = made.bench.run("compress", {"menu": [{"method": "dense"}]}, statistics=made.stats.out)
    database = Database(levels.out)
    for unit in lm.units:
        assert torch.equal(database.weight(unit.name, 0), lm.weight(unit))
    assert {(row["bits"], row["weight_nmse"], row["output_error"]) for row in levels.rows["levels"]} == {(32, 0, 0)}


def test_the_same_stage_gives_the_same_bytes(chain: Callable[[str], Any]) -> None:
    made = chain("llama")
    menu = {"menu": [{"method": "gptq", "bits": 3, "group_size": 16}]}
    outs = [made.bench.run("compress", menu, statistics=made.stats.out).out for _ in range(2)]
    files = sorted(path.relative_to(outs[0]) for path in outs[0].rglob("*") if path.is_file())
    assert len(files) == 1 + 21
    assert all((outs[0] / name).read_bytes() == (outs[1] / name).read_bytes() for name in files)


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
    stats = bench.run("calibrate")
    menu = [{"method": "gptq", "bits": [2, 4], "group_size": 16}, {"method": "rtn", "bits": 3}, {"method": "dense"}]
    levels = bench.run("compress", {"menu": menu}, statistics=stats.out)
    rows = levels.rows["levels"]
    lost = [row for row in rows if row["status"] != "ok"]
    assert {row["unit"] for row in lost} == {last}
    assert [row["level"] for row in lost] == ["gptq-2b-g16", "gptq-4b-g16", "rtn-3b-g128", "dense"]
    for row in lost:
        assert row["status"] == "nan"
        assert row["error"]
        assert row["output_error"] is row["effective_bits"] is row["bits"] is None
    assert len(rows) == 21 * 4
    with pytest.raises(UsageError, match=f"unit {last} has no level 'dense'"):
        Database(levels.out).level(last, "dense")
    with pytest.raises(NotFinite, match=f"unit {last} has no level to choose"):
        bench.run("allocate", {"solver": "uniform", "budgets": {"bits": 4}}, database=levels.out)


def test_statistics_that_are_not_finite_cost_the_units_behind_them_their_levels(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path], edited_model: Callable[..., Path]
) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = math.nan

    bench = new_bench(edited_model(model_folder("llama"), edit))
    stats = bench.run("calibrate")
    levels = bench.run("compress", {"menu": [{"method": "gptq", "bits": 4, "group_size": 16}]}, statistics=stats.out)
    status = {row["unit"]: row["status"] for row in levels.rows["levels"]}
    before = [name for name in status if ".0." in name or any(f".1.self_attn.{x}_proj" in name for x in "qkv")]
    assert {name for name, found in status.items() if found == "ok"} == set(before)
    assert len(before) == 10


@pytest.mark.parametrize(
    ("menu", "complaint"),
    [
        ([], "at least 1 item"),
        ([{"method": "rtn", "bits": [3, 4]}, {"method": "rtn", "bits": [4, 5]}], "makes level rtn-4b-g128 twice"),
        ([{"method": "gptk", "bits": 4}], "gptk"),
        ([{"method": "gptq", "bits": 9}], "less than or equal to 8"),
        ([{"method": "gptq", "bits": 4, "groupsize": 3}], "groupsize"),
    ],
)
def test_a_menu_is_checked_before_anything_runs(menu: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        CompressParams.model_validate({"menu": menu})


def test_a_weight_in_another_layout_does_not_reach_the_compressor(
    chain: Callable[[str], Any], model_folder: Callable[[str], Path]
) -> None:
    made = chain("gpt2")
    stored = Checkpoint(model_folder("gpt2")).read("transformer.h.0.attn.c_attn.weight")
    assert stored.shape == (32, 96)
    assert Database(made.levels.out).level("transformer.h.0.attn.c_attn", NAMES[0]).shape == (96, 32)
