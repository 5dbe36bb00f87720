"""The `latency` stage and what follows from it. Times themselves are never judged, only where they go."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import DeviceChanged, InfeasibleBudget, NoisyMeasurement, UsageError
from layerwise.kernels.device import this_device
from layerwise.kernels.dispatch import Choice, Dispatcher
from layerwise.kernels.latency_table import LatencyTable
from layerwise.kernels.latency_table import Row as TableRow
from layerwise.pipeline.executors.inline import InlineExecutor
from layerwise.pipeline.executors.journal import JournaledExecutor
from layerwise.stages.allocate.allocation import load_allocations, make_allocation, save_allocations
from layerwise.stages.allocate.costs import CostTable, load_times
from layerwise.stages.allocate.stage import AllocateParams
from layerwise.stages.allocate.stage import mistakes as allocate_mistakes
from layerwise.stages.contract import Context, ModelSource
from layerwise.stages.latency.charging import Rest, charge, fastest_levels, fit_rest
from layerwise.stages.latency.machine import MeasureParams, fingerprint, one_by_one
from layerwise.stages.latency.speed import SpeedParams, _compare, _rows
from layerwise.stages.latency.speed import mistakes as speed_mistakes
from layerwise.stages.latency.stage import _copies
from layerwise.stages.levels.database import Database, DatabaseIndex, LevelEntry, UnitEntry
from layerwise.stages.models.network import Unit

SHORT = {"window_ms": 0.2, "samples": 3, "spread": 1000.0, "retries": 0}
"""Times that mean nothing, quickly."""

MENU = [
    {"method": "rtn", "bits": 8, "group_size": -1},
    {"method": "rtn", "bits": [3, 4, 6], "group_size": 32},
    {"method": "dense"},
]


@pytest.fixture(scope="module")
def timed(chain: Callable[[str], Any]) -> Callable[[str], Any]:
    """Levels of a family with their times: a bench, a database, a profile, the latencies."""
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            bench, stats = chain(family).bench, chain(family).stats
            levels = bench.run("compress", {"menu": MENU}, statistics=stats.out)
            profile = bench.run("profile", {"metrics": ["output_error"]}, database=levels.out)
            found = bench.run("latency", {**SHORT, "batch": 2, "tokens": 3}, database=levels.out)
            made[family] = bench, levels, profile, found
        return made[family]

    return get


def document(result: Any, name: str = "latency.json") -> Any:
    return json.loads((result.out / name).read_text())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_level_of_every_unit_has_the_time_of_its_shape_and_label(
    timed: Callable[[str], Any], family: str
) -> None:
    _, levels, _, found = timed(family)
    index, said = DatabaseIndex(levels.out), document(found)
    assert said["database"] == index.digest
    times: dict[tuple[Any, ...], set[float]] = {}
    for unit, ms in zip(index.units, said["ms"], strict=True):
        for level, one in zip(unit.levels, ms, strict=True):
            assert math.isfinite(one)
            assert one > 0
            times.setdefault((*unit.shape, level.name), set()).add(one)
    assert all(len(known) == 1 for known in times.values())
    assert said["rest_ms"] >= 0
    assert (said["batch"], said["tokens"]) == (2, 3)


def test_the_table_has_a_race_for_each_shape_and_says_what_has_no_kernel(timed: Callable[[str], Any]) -> None:
    _, levels, _, found = timed("llama")
    table = LatencyTable.load(found.out / "table.json", this_device("cpu"))
    shapes = {unit.shape for unit in DatabaseIndex(levels.out).units}
    assert {(row.n, row.k) for row in table.rows} == shapes
    assert {row.m for row in table.rows} == {6}
    for n, k in shapes:
        labels = {row.label for row in table.rows if (row.n, row.k) == (n, k)}
        group = "g32" if k > 32 else "channel"  # one group of 32 is the whole row
        assert labels == {"dense", "int8-channel-sym", f"int4-{group}-sym", f"int3-{group}-sym"}
        (three,) = table.of(f"int3-{group}-sym", n, k, 6, "float32")
        best = table.of("dense", n, k, 6, "float32")[0]
        assert (three.status, three.median_ms, three.backend) == ("no_kernel", best.median_ms, best.backend)


def test_the_store_has_a_row_for_each_level_and_one_for_the_rest(timed: Callable[[str], Any]) -> None:
    _, levels, _, found = timed("llama")
    said, rows = document(found), found.rows["latency"]
    assert len(rows) == sum(len(unit.levels) for unit in DatabaseIndex(levels.out).units) + 1
    by_level = {(row["unit"], row["level"]): row for row in rows}
    for unit, names, times in zip(said["units"], said["levels"], said["ms"], strict=True):
        for name, ms in zip(names, times, strict=True):
            row = by_level[unit, name]
            assert row["ms"] == ms
            assert row["status"] == ("no_kernel" if "3b" in name else "measured"), "6 bits run as dense weights too"
            assert row["fingerprint"] == this_device("cpu").digest
            assert row["p10"] <= row["milliseconds"] <= row["p90"]
    rest = by_level[None, None]
    assert (rest["ms"], rest["status"]) == (said["rest_ms"], "fitted")


def test_only_exact_kernels_are_charged_where_that_is_asked_for(timed: Callable[[str], Any]) -> None:
    bench, levels, _, _ = timed("llama")
    found = bench.run("latency", {**SHORT, "exact": True}, database=levels.out)
    assert {row["backend"] for row in found.rows["latency"]} <= {"linear", "matmul", "mkl", "onednn", None}


def test_more_tokens_than_the_model_takes_are_refused(timed: Callable[[str], Any]) -> None:
    bench, levels, _, _ = timed("llama")
    with pytest.raises(UsageError, match="at most 64 tokens, not 65"):
        bench.run("latency", {**SHORT, "tokens": 65}, database=levels.out)


def test_a_noisy_table_is_refused(timed: Callable[[str], Any]) -> None:
    bench, levels, _, _ = timed("llama")
    with pytest.raises(NoisyMeasurement, match="scatter too much"):
        bench.run("latency", {**SHORT, "spread": 1e-9}, database=levels.out)


# --- what is charged ---


def choice(label: str, ms: float, mad: float = 0.0, size: int = 64) -> Choice:
    row = TableRow(
        backend="linear", label=label, n=4, k=4, m=1, dtype="float32", median_ms=ms, p10_ms=ms, p90_ms=ms, mad_ms=mad,
        min_ms=ms, samples=9, quality=1.0, status="measured", size_bytes=size, exact=True, dense=False,
    )  # fmt: skip
    return Choice(row, replace(row, median_ms=4.0, size_bytes=64))


def test_levels_whose_times_overlap_are_charged_their_mean_and_others_their_own() -> None:
    times = {"a": (1.0, 0.1), "b": (1.2, 0.1), "c": (1.4, 0.1), "d": (2.0, 0.0), "e": (2.0, 0.0), "f": (9.0, 0.5)}
    choices = {((4, 4), name): choice(name, *time) for name, time in times.items()}
    choices[(8, 4), "a"] = choice("a", 1.1, 0.1)  # of another shape: no tie with the first
    charged = charge(choices, Rest(5.0, 0.0))
    # 2 * sqrt(0.1^2 + 0.1^2) = 0.283: b is tied with a, c is not tied with a, and d with e
    assert [charged[(4, 4), name] for name in times] == [1.1, 1.1, 1.4, 2.0, 2.0, 9.0]
    assert charged[(8, 4), "a"] == 1.1


GRID = {"encoding": "grid", "group_size": -1, "sym": True}


def entry(name: str, levels: Mapping[str, Any], role: Any = "linear") -> UnitEntry:
    """A unit with recipes by level name; a level without one could not be made."""
    made = [
        LevelEntry(level, recipe, None if recipe is None else {}, status="nan" if recipe is None else "ok")
        for level, recipe in levels.items()
    ]
    return UnitEntry(Unit(name, name, role, 0, (4, 4), (0,)), None, tuple(made))


RECIPES = {"dense": {"encoding": "dense"}, "8b": {**GRID, "bits": 8}, "4b": {**GRID, "bits": 4}, "broken": None}
TWO_UNITS = [entry(name, RECIPES) for name in "qk"]
THREE_KINDS = {
    ((4, 4), "grid 8 bits row sym"): choice("8b", 1.0, size=16),
    ((4, 4), "grid 4 bits row sym"): choice("4b", 3.0, size=8),
    ((4, 4), "dense"): choice("dense", 4.0, size=64),
}


def test_two_models_measured_whole_are_predicted_exactly_and_others_by_their_bytes() -> None:
    assert fastest_levels(TWO_UNITS, THREE_KINDS) == {"q": "8b", "k": "8b"}
    rest = fit_rest(TWO_UNITS, THREE_KINDS, dense_ms=8.0 + 2.92, fast_ms=2.0 + 1.0)
    assert rest.ms == pytest.approx(1.0 - 0.02 * 32)  # 1.92 ms over 128 - 32 bytes
    assert rest.ms_per_byte == pytest.approx(0.02)
    charged = {name: ms for (_, name), ms in charge(THREE_KINDS, rest).items()}
    assert rest.ms + 2 * charged["dense"] == pytest.approx(8.0 + 2.92)
    assert rest.ms + 2 * charged["grid 8 bits row sym"] == pytest.approx(2.0 + 1.0)
    mixed = rest.ms + charged["dense"] + charged["grid 4 bits row sym"]
    assert mixed == pytest.approx(4.0 + 3.0 + 1.0 + 0.02 * (64 + 8 - 32))


def test_what_is_no_linear_layer_or_not_offered_is_not_timed() -> None:
    others = [entry("expert", RECIPES, "expert"), entry("attn", {"keep": {"encoding": "keep"}}, "attention")]
    fixed = replace(
        TWO_UNITS[0], levels=tuple(replace(level, offered=level.name == "4b") for level in TWO_UNITS[0].levels)
    )
    assert fastest_levels([*others, fixed, TWO_UNITS[1]], THREE_KINDS) == {"q": "4b", "k": "8b"}
    both = fit_rest([*TWO_UNITS, *others], THREE_KINDS, dense_ms=10.0, fast_ms=5.0)
    assert both == fit_rest(TWO_UNITS, THREE_KINDS, dense_ms=10.0, fast_ms=5.0)


def test_a_tie_of_the_fastest_level_is_in_its_model_too() -> None:
    tied = {**THREE_KINDS, ((4, 4), "grid 4 bits row sym"): choice("4b", 1.2, 0.2, size=16)}
    rest = fit_rest(TWO_UNITS, tied, dense_ms=10.0, fast_ms=5.0)
    assert rest.ms + 2 * charge(tied, rest)[(4, 4), "grid 8 bits row sym"] == pytest.approx(5.0)


def test_noise_that_hides_what_the_caches_do_leaves_one_rest_for_all() -> None:
    assert fit_rest(TWO_UNITS, THREE_KINDS, dense_ms=8.5, fast_ms=3.0) == Rest(1.0, 0.0)
    only_dense = [replace(unit, levels=unit.levels[:1]) for unit in TWO_UNITS]
    assert fit_rest(only_dense, THREE_KINDS, dense_ms=9.5, fast_ms=9.0) == Rest(1.0, 0.0)


def test_a_steep_line_ends_where_nothing_is_left_without_weights() -> None:
    assert fit_rest(TWO_UNITS, THREE_KINDS, dense_ms=18.0, fast_ms=3.0) == Rest(0.0, 1 / 32)


@pytest.mark.parametrize(("dense_ms", "fast_ms"), [(9.0, 1.9), (7.9, 3.0)])
def test_products_that_take_longer_than_all_are_noise(dense_ms: float, fast_ms: float) -> None:
    with pytest.raises(NoisyMeasurement, match="beside their products"):
        fit_rest(TWO_UNITS, THREE_KINDS, dense_ms, fast_ms)


def test_a_weight_comes_again_after_as_many_copies_as_the_model_has_weights_for() -> None:
    assert _copies((10, 10), 1000) == 10
    assert _copies((10, 10), 40) == 1
    assert _copies((2, 2), 10**9) == 256


# --- experts, tied heads, parts that are dropped ---

PARTS = [
    {"method": "rtn", "bits": 4, "group_size": 32},
    {"method": "drop", "units": ["attention", "mlp", "block"]},
]


@pytest.fixture(scope="module")
def in_parts(model_folder: Callable[[str], Path], make_bench: Callable[..., Any]) -> Callable[[str], Any]:
    """Every weight of a family at 4 bits, which are not offered dense, with times."""
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            bench = make_bench(model_folder(family))
            levels = bench.run("compress", {"menu": PARTS, "targets": ["blocks", "head", "embedding"]})
            times = bench.run("latency", {**SHORT, "batch": 2, "tokens": 3, "exact": True}, database=levels.out)
            made[family] = bench, levels, times
        return made[family]

    return get


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "granitemoe"])
def test_the_store_says_what_was_timed_and_what_runs_in_the_rest(
    in_parts: Callable[[str], Any], load_model: Callable[[str], Any], family: str
) -> None:
    """Linear layers are; experts, routers, the embedding, a tied head and parents run decoded, or not at all."""
    import torch

    _, levels, times = in_parts(family)
    said, lm = document(times), load_model(family)
    linear = {name for name, layer in lm.model.named_modules() if isinstance(layer, torch.nn.Linear)}
    linear -= {"lm_head"} if family != "mixtral" else set()  # tied: another layer reads its weight, too
    rows = {(row["unit"], row["level"]): row for row in times.rows["latency"]}
    for unit, names, ms in zip(said["units"], said["levels"], said["ms"], strict=True):
        for name, one in zip(names, ms, strict=True):
            row = rows[unit, name]
            if unit not in linear:
                assert (row["status"], row["ms"], one) == ("in_rest", None, 0.0)
            elif name == "dense":
                assert (row["status"], row["ms"], one) == ("not_offered", None, None)
            else:
                assert row["status"] in ("measured", "no_kernel")
                assert row["ms"] == one > 0
    assert linear <= set(said["units"])
    assert {tuple(entry.shape) for entry in DatabaseIndex(levels.out).units if entry.name in linear} == {
        (row.n, row.k) for row in LatencyTable.load(times.out / "table.json", this_device("cpu")).rows
    }


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_a_dropped_part_saves_the_times_of_its_layers_and_is_not_in_the_model_that_is_timed(
    in_parts: Callable[[str], Any], load_model: Callable[[str], Any], rebuilt: Callable[..., Any], family: str
) -> None:
    import torch

    from layerwise.kernels.linear import PackedLinear
    from layerwise.stages.latency.forward_pass import ForwardPass, _packed

    bench, levels, times = in_parts(family)
    index, said = DatabaseIndex(levels.out), document(times)
    table = CostTable(index, load_times(times.out, index))
    gone = ["model.layers.0.mlp", "model.layers.2"]
    allocation = make_allocation(
        table,
        [int(entry.name in gone) if entry.is_parent else 1 for entry in table.units],
        solver="hand",
        budget={"ms": 9},
    )
    by_unit = dict(zip(said["units"], said["ms"], strict=True))
    own = [ms[1] for name, ms in by_unit.items() if not name.startswith(tuple(gone)) and len(ms) == 2]
    assert allocation.sizes["ms"] == pytest.approx(said["rest_ms"] + math.fsum(own))

    work = ForwardPass(bench.model, "cpu", 2, 3, MeasureParams(**SHORT).whole_sampling())
    model = _packed(work, levels.out, allocation.levels, times.out / "table.json", exact=True)
    replaced = {name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    linear = {entry.name for entry in index.units if entry.unit.replaceable}
    assert replaced == {name for name in linear if name in allocation.levels}
    database = Database(levels.out, bench.model)
    weights = {
        unit: database.level(unit, level).decode()
        for unit, level in allocation.levels.items()
        if level not in ("keep", "drop")
    }
    ids = torch.arange(6).reshape(2, 3)
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
        expected = rebuilt(load_model(family).model, weights, gone)(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))  # exact kernels, float32

    folder = bench.folder / "dropped"
    folder.mkdir()
    save_allocations(folder, [allocation])
    inputs = {"allocations": folder, "database": levels.out, "latency": times.out}
    timed_whole = document(bench.run("speed", {**SHORT, "tolerance": 1e9}, **inputs), "speed.json")
    assert timed_whole[allocation.candidate]["predicted_ms"] == pytest.approx(allocation.sizes["ms"])


def test_the_dense_model_beside_an_allocation_is_the_one_that_the_times_were_fitted_to(
    in_parts: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers of the database packed as dense weights, those of dropped parts included."""
    from layerwise.stages.latency import forward_pass

    _, levels, times = in_parts("qwen3")
    built: list[Any] = []
    monkeypatch.setattr(forward_pass, "_packed", lambda work, database, of, table, exact: built.append(dict(of)))
    monkeypatch.setattr(forward_pass, "_forward", lambda model, work: None)
    monkeypatch.setattr(forward_pass, "_time", lambda forwards, work: {})
    index = DatabaseIndex(levels.out)
    some = {"model.layers.0": "drop", "model.layers.1.mlp.up_proj": "rtn-4b-g32"}
    forward_pass.time_packed(None, levels.out, some, times.out / "table.json", True)
    assert built == [some, {entry.name: None for entry in index.units if entry.unit.replaceable}]


def test_a_database_without_a_linear_layer_has_a_rest_alone(
    model_folder: Callable[[str], Path], new_bench: Callable[..., Any]
) -> None:
    bench = new_bench(model_folder("mixtral"))
    menu = [{"method": "rtn", "bits": [2, 4], "group_size": 32}]
    levels = bench.run("compress", {"menu": menu, "targets": ["experts.down_proj"]})
    found = bench.run("latency", SHORT, database=levels.out)
    assert {row["status"] for row in found.rows["latency"]} == {"in_rest", "fitted"}
    table = CostTable(DatabaseIndex(levels.out), load_times(found.out, DatabaseIndex(levels.out)))
    assert table.describe([1] * 12)["ms"] == table.describe([2] * 12)["ms"] == document(found)["rest_ms"] > 0


# --- one machine, one item at a time ---


def context_of(folder: Path) -> Context:
    for name in ("out", "items"):
        (folder / name).mkdir(exist_ok=True)
    executor = JournaledExecutor(InlineExecutor(check_pickle=True), folder / "journal", tmp=folder / "tmp")
    return Context(
        out=folder / "out", items=folder / "items", model=ModelSource(folder), data={}, inputs={}, executor=executor,
        record=lambda table, rows: None, progress=lambda done, total, note: None,
    )  # fmt: skip


def note(name: str, folder: Path) -> str:
    if name == "broken" and not (folder / "mended").exists():
        raise NoisyMeasurement("too noisy")
    with (folder / "log").open("a") as log:
        log.write(f"{name} ")
    return name.upper()


def test_an_interrupted_stage_measures_nothing_twice(tmp_path: Path) -> None:
    work = {name: partial(note, name, tmp_path) for name in ("first", "broken", "last")}
    machine = fingerprint(MeasureParams())
    with pytest.raises(NoisyMeasurement):
        list(one_by_one(context_of(tmp_path), work, machine))
    (tmp_path / "mended").touch()
    found = dict(one_by_one(context_of(tmp_path), work, machine))
    assert found == {"first": "FIRST", "broken": "BROKEN", "last": "LAST"}
    assert (tmp_path / "log").read_text().split() == ["first", "broken", "last"]


def test_work_that_reaches_another_machine_is_refused(tmp_path: Path) -> None:
    elsewhere = replace(this_device("cpu"), name="another processor", threads=7).as_json()
    work = {"first": partial(note, "first", tmp_path)}
    with pytest.raises(DeviceChanged, match=r"name: another processor and .*threads: 7 and 1"):
        list(one_by_one(context_of(tmp_path), work, elsewhere))
    assert not (tmp_path / "log").exists()


# --- milliseconds as a budget ---


@pytest.mark.parametrize("solver", ["ilp", "branch", "greedy", "uniform"])
def test_an_allocation_keeps_within_milliseconds_and_bytes_and_says_both(
    timed: Callable[[str], Any], solver: str
) -> None:
    bench, levels, profile, found = timed("llama")
    said = document(found)
    params = {"solver": solver, "loss": "output_error", "budgets": {"ms": ["20%", "100%"], "bytes": "70%"}}
    made = bench.run("allocate", params, database=levels.out, profile=profile.out, latency=found.out)
    least = said["rest_ms"] + math.fsum(min(times) for times in said["ms"])
    most = said["rest_ms"] + math.fsum(max(times) for times in said["ms"])
    for allocation, share in zip(load_allocations(made.out), (0.2, 1.0), strict=True):
        levels_of = zip(said["units"], said["levels"], said["ms"], strict=True)
        own = math.fsum(times[names.index(allocation.levels[unit])] for unit, names, times in levels_of)
        assert allocation.sizes["ms"] == pytest.approx(said["rest_ms"] + own)
        assert allocation.sizes["ms"] <= (least + share * (most - least)) * (1 + 1e-9)
    assert [row["ms"] for row in made.rows["allocations"]] == [a.sizes["ms"] for a in load_allocations(made.out)]


def test_a_search_records_the_milliseconds_of_its_candidates(timed: Callable[[str], Any]) -> None:
    bench, levels, _, found = timed("gpt2")
    quick = {"generations": 2, "offspring": 3, "survivors_per_selection": [1], "tokens_per_selection": [32]}
    params = {"solver": "evolve", "start": "random", "budgets": {"ms": "60%"}, **quick}
    made = bench.run("allocate", params, database=levels.out, latency=found.out)
    (allocation,) = load_allocations(made.out)
    assert made.rows["candidates"]
    assert all(row["ms"] > 0 for row in made.rows["candidates"])
    assert allocation.sizes["ms"] in [row["ms"] for row in made.rows["candidates"]]


def test_milliseconds_out_of_reach_are_refused_with_the_least(timed: Callable[[str], Any]) -> None:
    bench, levels, profile, found = timed("llama")
    said = document(found)
    least = said["rest_ms"] + math.fsum(min(times) for times in said["ms"])
    params = {"solver": "ilp", "loss": "output_error", "budgets": {"ms": least / 2}}
    with pytest.raises(InfeasibleBudget, match=f"ms is below the least reachable {least:.6g}"):
        bench.run("allocate", params, database=levels.out, profile=profile.out, latency=found.out)


@pytest.mark.parametrize(
    ("budgets", "got"),
    [({"ms": "101%"}, "text '101%'"), ({"ms": "fast"}, "text 'fast'"), ({"ms": [0.0]}, "0")],
)
def test_amounts_that_are_none_are_refused(budgets: Mapping[str, Any], got: str) -> None:
    with pytest.raises(ValueError, match=f"must be a number above 0, or 0% to 100%, got {got} "):
        AllocateParams.model_validate({"budgets": budgets})


def test_milliseconds_without_a_latency_stage_are_seen_before_anything_runs() -> None:
    params = AllocateParams.model_validate({"solver": "uniform", "budgets": {"ms": 3.0}})
    (mistake,) = allocate_mistakes(params, {})
    assert mistake == (("budgets", "ms"), "milliseconds must have been measured: add a `latency` stage to needs")
    assert not list(allocate_mistakes(params, {"latency": [object()]}))


# --- the whole model beside its parts ---


@pytest.fixture(scope="module")
def allocated(timed: Callable[[str], Any]) -> Any:
    bench, levels, profile, found = timed("llama")
    params = {"solver": "ilp", "loss": "output_error", "budgets": {"bytes": ["10%", "60%"]}}
    return bench.run("allocate", params, database=levels.out, profile=profile.out, latency=found.out)


def test_whole_models_are_timed_beside_the_sum_of_their_parts(timed: Callable[[str], Any], allocated: Any) -> None:
    bench, levels, _, found = timed("llama")
    inputs = {"allocations": allocated.out, "database": levels.out, "latency": found.out}
    made = bench.run("speed", {**SHORT, "tolerance": 1e9}, **inputs)
    said, allocations = document(made, "speed.json"), load_allocations(allocated.out)
    assert set(said) == {"dense", *(allocation.candidate for allocation in allocations)}
    rows = {(row["candidate"], row["metric"]): row for row in made.rows["metrics"]}
    for allocation in allocations:
        own = said[allocation.candidate]
        assert own["predicted_ms"] == pytest.approx(allocation.sizes["ms"])
        assert own["error"] == pytest.approx(own["predicted_ms"] / own["median_ms"] - 1)
        assert rows[allocation.candidate, "latency_error"]["value"] == own["error"]
        assert rows[allocation.candidate, "predicted_latency_ms"]["status"] == "ok"
    assert rows["dense", "latency_ms"]["value"] == said["dense"]["median_ms"] > 0
    assert ("dense", "latency_error") not in rows


@pytest.mark.parametrize(
    ("measured", "dense", "status"),
    [(10.0, 20.0, "ok"), (10.9, 20.0, "ok"), (20.0, 40.0, "drifted"), (5.0, 10.4, "drifted"), (20.0, 20.0, "off"),
     (20.0, 10.0, "off")],
)  # fmt: skip
def test_a_prediction_that_does_not_hold_says_whether_the_machine_changed_its_speed(
    measured: float, dense: float, status: str
) -> None:
    found = _compare({"median_ms": measured}, {"median_ms": dense}, 10.0, 20.0, 0.1)
    assert found["status"] == status
    assert found["drift"] == dense / 20.0
    rows = {row["metric"]: row for row in _rows("abc", found, 7)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "latency_ms": "ok", "predicted_latency_ms": status, "latency_error": status, "latency_drift": "ok",
    }  # fmt: skip
    assert rows["latency_error"]["value"] == 10.0 / measured - 1


def test_only_the_allocations_that_were_picked_are_timed(timed: Callable[[str], Any], allocated: Any) -> None:
    bench, levels, _, found = timed("llama")
    inputs = {"allocations": allocated.out, "database": levels.out, "latency": found.out}
    made = bench.run("speed", {**SHORT, "pick": ["bytes=10%"]}, **inputs)
    (picked,) = [a.candidate for a in load_allocations(allocated.out) if a.budget == "bytes=10%"]
    assert set(document(made, "speed.json")) == {"dense", picked}


def test_times_of_another_machine_are_not_compared_with_this_one(
    timed: Callable[[str], Any], allocated: Any, tmp_path: Path
) -> None:
    bench, levels, _, found = timed("llama")
    said = document(found)
    elsewhere = replace(this_device("cpu"), name="another processor").as_json()
    (tmp_path / "latency.json").write_text(json.dumps({**said, "machine": elsewhere}))
    inputs = {"allocations": allocated.out, "database": levels.out, "latency": tmp_path}
    with pytest.raises(DeviceChanged, match="measured on another device"):
        bench.run("speed", SHORT, **inputs)


def test_a_model_runs_by_the_table_that_was_measured(timed: Callable[[str], Any], allocated: Any) -> None:
    import torch

    from layerwise.kernels.linear import PackedLinear
    from layerwise.stages.apply.packed import load_packed

    bench, levels, _, found = timed("llama")
    applied = bench.run("apply", {"pick": "smallest", "packed": True}, allocations=allocated.out, database=levels.out)
    here = this_device("cpu")
    dispatcher = Dispatcher(LatencyTable.load(found.out / "table.json", here), here)
    model = load_packed(bench.model, applied.out, dispatcher)
    with torch.no_grad():
        model(input_ids=torch.zeros((2, 3), dtype=torch.int64))
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            ((backend, *_),) = layer._functions
            assert backend == dispatcher.choose(layer.label, *layer.packed.shape, 6, "float32").backend


def test_the_device_of_both_stages_is_compared_before_anything_runs() -> None:
    (mistake,) = speed_mistakes(SpeedParams(device="cpu"), {"latency": [MeasureParams(device="cuda")]})
    assert mistake == (("device",), "the latency stage measures cuda, so this one must too")
    assert not list(speed_mistakes(SpeedParams(), {"latency": [MeasureParams()]}))
