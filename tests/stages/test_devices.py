"""Stages on another device than the CPU: on one that is pretended, and, where there is one, on a GPU.

A GPU adds up in another order, so statistics differ in their last bits (a relative 1e-5 of float32 sums over 192 rows),
and now and then a weight that lies between two codes gets the other one. What tuning makes of that grows with its
steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerwise.stages.allocate.allocation import make_allocation, save_allocations
from layerwise.stages.allocate.costs import CostTable
from layerwise.stages.compress import viterbi
from layerwise.stages.levels.database import Database, DatabaseIndex
from layerwise.stages.models.compressed import CompressedModel
from layerwise.testing.models import tiny_model, tiny_texts
from layerwise.testing.pretended import GPU, pretended_gpu
from layerwise.testing.stages import Bench

MENU: list[dict[str, Any]] = [
    {"method": "rtn", "bits": [2, 4]},
    {"method": "rtn", "bits": 3, "group_size": 8, "group_along": "outputs", "scale_bits": 6, "grid": "mse"},
    {"method": "gptq", "bits": [2, 3], "group_size": 8},
    {"method": "gptq", "bits": 4, "group_size": 8, "sym": False, "desc_act": True, "grid": "mse"},
    {"method": "magnitude", "sparsity": 0.5},
    {"method": "wanda", "sparsity": 0.3, "pattern": "2:4", "then": {"bits": 4, "group_size": 8}},
    {"method": "sparsegpt", "sparsity": [0.5, 0.8], "pattern": "2:4"},
    {"method": "sparsegpt", "sparsity": 0.5, "block": [2, 8], "then": {"bits": 4, "group_size": 8, "sym": False}},
    {"method": "gptq_sequential", "bits": 3, "group_size": 8},
    {"method": "awq", "bits": 3, "group_size": 8, "grid_points": 2},
    {"method": "learned_rounding", "bits": 3, "group_size": 8, "steps": 2},
    {"method": "drop", "units": ["mlp"]},
]
ONE = "model.layers.0.self_attn.k_proj"
"""A unit for the trellis, whose many small operations take long where they are pretended."""

Made = tuple[Path, Path, Path]


@pytest.fixture
def other_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device by name, with what makes it one."""
    monkeypatch.setitem(viterbi.MEMORY, GPU, viterbi.MEMORY["cpu"])
    monkeypatch.setitem(viterbi.CACHE, GPU, viterbi.CACHE["cpu"])
    with pretended_gpu() if request.param == GPU else nullcontext():
        yield request.param


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A tiny model and its texts."""
    folder = tmp_path_factory.mktemp("devices")
    return folder, tiny_model(folder / "model"), tiny_texts(folder)


def chain(place: tuple[Path, Any, Any], device: str) -> Made:
    """Calibrate, compress one block and a unit by trellis, profile."""
    folder, model, texts = place
    (folder / device).mkdir()
    bench = Bench(folder / device, replace(model, device=device), texts)
    statistics = bench.run("calibrate", {"statistics": ["hessian", "channels", "fisher", "block_inputs"]})
    levels = bench.run(
        "compress", {"menu": MENU, "targets": ["re:model.layers.0"], "ignore": ["mlp.gate_proj"]}, statistics=statistics
    )
    menu = [{"method": "trellis", "bits": 2, "state_bits": 10}]
    bench.run("compress", {"menu": menu, "targets": [ONE]}, statistics=statistics)
    return statistics, levels, bench.run("profile", {"tokens": 64}, database=levels)


@pytest.fixture(scope="module")
def on_cpu(place: tuple[Path, Any, Any]) -> Made:
    return chain(place, "cpu")


@pytest.mark.parametrize("other_device", [GPU, pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_every_stage_works_on_another_device(place: Any, on_cpu: Made, other_device: str) -> None:
    statistics, levels, profile = chain(place, other_device)
    for file in sorted(on_cpu[0].rglob("*.safetensors")):
        for name, expected in load_file(file).items():
            found = load_file(statistics / file.relative_to(on_cpu[0]))[name]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=f"{file.name}: {name}")
    databases = [Database(folder, place[1]) for folder in (on_cpu[1], levels)]
    for expected, found in zip(*(database.units for database in databases), strict=True):
        assert [level.name for level in found.levels] == [level.name for level in expected.levels]
        for one, other in zip(expected.levels, found.levels, strict=True):
            assert other.recipe is not None and other.costs == one.costs, (found.name, other.name, other.error)
            if expected.is_parent:
                continue
            for error in ("weight_nmse", "output_error"):
                assert getattr(other, error) == pytest.approx(getattr(one, error), rel=0.05, abs=1e-6), other.name
            if "learned" not in one.name:
                a, b = (database.level(expected.name, one.name).decode() for database in databases)
                # Kept values that make up for others are as continuous as the statistics; codes are not.
                assert torch.isclose(a, b, rtol=1e-3, atol=1e-6).float().mean() > 0.98, (expected.name, one.name)
    one, other = (json.loads((folder / "profile.json").read_text())["metrics"]["kl"] for folder in (on_cpu[2], profile))
    for expected_kl, found_kl in zip(one, other, strict=True):
        assert found_kl == pytest.approx(expected_kl, rel=0.1, abs=1e-5)


@pytest.mark.parametrize("other_device", [GPU, pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_heads_and_channels_go_on_another_device(place: Any, tmp_path: Path, other_device: str) -> None:
    _, model, texts = place
    menu = [
        {"method": "width", "keep": 0.5, "multiple": 8},
        {"method": "width", "keep": 0.5, "multiple": 8, "then": {"bits": 4, "group_size": 8}},
    ]
    databases = []
    for device in ("cpu", other_device):
        (tmp_path / device).mkdir()
        bench = Bench(tmp_path / device, replace(model, device=device), texts)
        levels = bench.run("compress", {"menu": menu}, statistics=bench.run("calibrate", {"statistics": ["hessian"]}))
        databases.append(Database(levels, model))
        bench.run("profile", {"metrics": ["influence"], "tokens": 64}, database=levels)
    for expected, found in zip(*(database.units for database in databases), strict=True):
        for one, other in zip(expected.levels, found.levels, strict=True):
            assert other.recipe is not None and other.costs == one.costs, (found.name, other.name, other.error)
            if not expected.is_parent and "width" in one.name:
                a, b = (database.level(expected.name, one.name).decode() for database in databases)
                assert (a - b).abs().max() < 0.05 * a.abs().max() or (a == b).float().mean() > 0.98


SHORT = {"steps": 2, "check_every": 2, "batch_size": 2}
REPAIRS = [
    [{"method": "eora", "rank": 2}, {"method": "refit"}, {"method": "svd", "rank": 1}, {"method": "statistics"}],
    *([{"method": method, **SHORT}] for method in ("perp", "qat", "finetune", "lora")),
]


@pytest.mark.parametrize("other_device", [GPU, pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_every_repair_works_on_another_device(place: Any, on_cpu: Made, tmp_path: Path, other_device: str) -> None:
    _, model, texts = place
    bench = Bench(tmp_path, model, texts)
    menu = [{"method": "rtn", "bits": 3, "group_size": 8, "sym": False}, {"method": "magnitude", "sparsity": 0.5}]
    levels = bench.run("compress", {"menu": menu, "targets": ["re:model.layers.0.mlp"]})
    table = CostTable(DatabaseIndex(levels))
    in_turn = make_allocation(table, [1 + n % 2 for n in range(len(table.units))], solver="hand", budget={"bits": 9.0})
    save_allocations(tmp_path, [in_turn])
    best = bench.run("apply", {"pick": in_turn.candidate}, allocations=tmp_path, database=levels)
    for repairs in REPAIRS:
        made = []
        for device in ("cpu", other_device):
            (tmp_path / f"{device}-{repairs[0]['method']}").mkdir()
            one = Bench(tmp_path / f"{device}-{repairs[0]['method']}", replace(model, device=device), texts)
            made.append(one.run("recover", {"repairs": repairs}, model=best, statistics=on_cpu[0]))
        on_it, other = (CompressedModel(folder) for folder in made)
        for unit in on_it.levels:
            a, b = (found.level(unit).decode() for found in (on_it, other))
            assert (a - b).abs().max() < 0.05 * a.abs().max(), (repairs, unit)


@pytest.mark.parametrize("other_device", [GPU, pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_levels_are_made_again_on_another_device(place: Any, on_cpu: Made, tmp_path: Path, other_device: str) -> None:
    _, model, texts = place
    menu = [{"method": "gptq", "bits": [2, 3], "group_size": 8}]
    levels = Bench(tmp_path, model, texts).run("compress", {"menu": menu}, statistics=on_cpu[0])
    table = CostTable(DatabaseIndex(levels))
    in_turn = make_allocation(table, [1 + n % 2 for n in range(len(table.units))], solver="hand", budget={"bits": 9.0})
    save_allocations(tmp_path, [in_turn])
    about = []
    for device in ("cpu", other_device):
        (tmp_path / device).mkdir()
        one = Bench(tmp_path / device, replace(model, device=device), texts)
        params = {"pick": in_turn.candidate, "remake": True, "steps": 1}
        found = one.run("apply", params, allocations=tmp_path, database=levels)
        about.append(CompressedModel(found).document.about["remade"])
    on_it, other = about
    assert [block["remade"] for block in on_it["blocks"]] == [block["remade"] for block in other["blocks"]]
    for key in ("before", "after"):
        found_errors, expected = ([block[key] for block in made["blocks"]] for made in (other, on_it))
        assert found_errors == pytest.approx(expected, rel=0.05)
    assert other["kl_before"] == pytest.approx(on_it["kl_before"], rel=0.01)


def test_what_is_left_behind_on_the_cpu_is_seen() -> None:
    with pretended_gpu():
        weight = torch.ones(2, 2, device=GPU)
        with pytest.raises(RuntimeError, match="is on the CPU"):
            weight @ torch.ones(2, 2)
        with pytest.raises(TypeError, match="numpy"):
            weight.numpy()
        assert torch.equal((weight @ weight).cpu(), torch.full((2, 2), 2.0))
        layer = torch.nn.Linear(2, 2, bias=False).to(GPU)
        layer.weight.data = weight
        assert torch.equal(layer(weight).detach().cpu(), torch.full((2, 2), 2.0))


def test_the_benchmark_tells_what_failed_and_compares_the_rest(
    place: Any, on_cpu: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import gpu_pipeline as benchmark  # type: ignore[import-not-found]

    statistics, levels, profile = on_cpu
    page = benchmark.Page(tmp_path / "page.md", ["cpu", "cpu:0"], "1M")
    comparison = benchmark.Comparison(replace(place[1]), tmp_path, page, 0.2, time.perf_counter() + 60)
    jobs = iter([lambda: statistics, lambda: 1 / 0, lambda: time.sleep(9), lambda: statistics])
    assert comparison.row("one fails", lambda device: next(jobs)()) == {"cpu": statistics}
    comparison.agree(comparison.row("one is slow", lambda device: next(jobs)()), benchmark.compare_statistics)
    for found, compare in (
        (statistics, benchmark.compare_statistics),
        (levels, benchmark.compare_levels),
        (profile, benchmark.compare_profiles),
    ):
        comparison.agree(comparison.row("both", lambda device, found=found: found), compare)
    written = (tmp_path / "page.md").read_text()
    for text in ("ZeroDivisionError", "not done in 0 s", "up to 0.0e+00 of their norm", "100.0000 % of the weights"):
        assert text in written
    assert "failed" in written and "not compared" not in written
