"""The `allocate` stage: every solver on a tiny model, its budgets, its account, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.optimize import Bounds, LinearConstraint, milp

from layerwise.errors import InfeasibleBudget, LayerwiseError, UsageError
from layerwise.solvers import SEARCHES, SOLVERS
from layerwise.stages.allocate.allocation import load_allocations
from layerwise.stages.allocate.costs import CostTable
from layerwise.stages.allocate.stage import AllocateParams, mistakes
from layerwise.stages.levels.database import DatabaseIndex

QUICK = {
    "generations": 4, "offspring": 6, "survivors_per_selection": [2, 1], "tokens_per_selection": [32, 96],
}  # fmt: skip
SHORT = {"evaluations": 24, "batch": 4, "population": 6, "tokens_per_ask": 64}
"""For the other searches: settings that one of them does not have mean nothing to it."""
SEPARABLE = [name for name in SOLVERS if name != "brute"]  # 21 units are too many for enumeration
BUDGETS = {"bits": [2.5, 3.0, 3.6]}


@pytest.mark.parametrize("tie", ["none", "fused"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("solver", [*SEPARABLE, *SEARCHES])
def test_every_solver_stays_within_every_budget(
    chain: Callable[[str], Any], family: str, solver: str, tie: str
) -> None:
    made = chain(family)
    settings = QUICK if solver == "evolve" else SHORT
    found = made.allocate({"solver": solver, "budgets": BUDGETS, "tie": tie, **settings})
    allocations, rows = load_allocations(found.out), found.rows["allocations"]
    units = DatabaseIndex(made.levels.out).units
    n_weights = sum(unit.n_weights for unit in units)
    for budget, allocation, row in zip(BUDGETS["bits"], allocations, rows, strict=True):
        named = {"gptq-2b-g16": 2, "gptq-4b-g16": 4, "rtn-3b-g32-asym": 3}
        bits = sum(named[allocation.levels[unit.name]] * unit.n_weights for unit in units)
        assert bits / n_weights == pytest.approx(allocation.sizes["bits"])
        assert allocation.sizes["bits"] <= budget * (1 + 1e-9)
        for group in {unit.unit.group for unit in units} - {None} if tie == "fused" else ():
            assert len({allocation.levels[unit.name] for unit in units if unit.unit.group == group}) == 1
        assert allocation.kl is not None
        assert allocation.perplexity is not None
        assert row["kl"] == allocation.kl
        assert dict(zip(row["units"], row["levels"], strict=True)) == allocation.levels
        assert tuple(row["genome"]) == allocation.genome
        assert (row["solver"], row["budget"], row["candidate"]) == (solver, f"bits={budget:g}", allocation.candidate)
        assert row["profile_tokens"] == (0 if solver in ("uniform", "even") else len(units) * 3 * 192)


def test_ilp_and_dp_find_the_least_sum_of_the_profile(chain: Callable[[str], Any]) -> None:
    made = chain("gpt2")
    index = DatabaseIndex(made.levels.out)
    losses = np.array(json.loads((made.profile.out / "profile.json").read_text())["metrics"]["kl"])[:, 1:]
    weights = np.array([unit.n_weights for unit in index.units])
    bits = np.array([2, 4, 3]) * weights[:, None]
    one_level_each = LinearConstraint(np.kron(np.eye(len(weights)), np.ones(3)), 1, 1)
    budget = LinearConstraint(bits.reshape(1, -1), -np.inf, 2.8 * weights.sum())
    best = milp(
        losses.ravel(), constraints=[one_level_each, budget], integrality=np.ones(losses.size), bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )  # fmt: skip
    for solver in ("ilp", "dp"):
        (row,) = made.allocate({"solver": solver, "budgets": {"bits": 2.8}}).rows["allocations"]
        assert row["predicted_loss"] == pytest.approx(best.fun, rel=1e-6)


@pytest.mark.parametrize("budget", [2.5, 3.0])
def test_evolve_is_never_above_its_start_on_the_searched_data(chain: Callable[[str], Any], budget: float) -> None:
    made = chain("llama")
    for start in ("ilp", "uniform"):
        (begin,) = load_allocations(made.allocate({"solver": start, "budgets": {"bits": budget}}).out)
        settings = {**QUICK, "start": start, "budgets": {"bits": budget}}
        (end,) = load_allocations(made.allocate({"solver": "evolve", **settings}).out)
        assert end.kl is not None
        assert begin.kl is not None
        assert end.kl <= begin.kl


def test_a_search_on_all_tokens_gains_on_a_uniform_start(chain: Callable[[str], Any]) -> None:
    made = chain("llama")
    settings = {"generations": 6, "offspring": 8, "survivors_per_selection": [1], "tokens_per_selection": [192]}
    (begin,) = load_allocations(made.allocate({"solver": "uniform", "budgets": {"bits": 3.0}}).out)
    found = made.allocate({"solver": "evolve", "budgets": {"bits": 3.0}, "start": "uniform", **settings})
    (end,) = load_allocations(found.out)
    assert (end.kl or 1) < (begin.kl or 0)
    best = min(row["fitness"] for row in found.rows["candidates"])
    assert end.kl == pytest.approx(best, rel=1e-12)


def test_the_same_seed_replays_the_same_search_and_another_does_not(chain: Callable[[str], Any]) -> None:
    made = chain("gpt2")
    settings = {"solver": "evolve", "budgets": {"bits": 3.0}, "start": "random", **QUICK}
    first, second, other = (made.allocate({**settings, "seed": seed}) for seed in (1, 1, 2))
    assert (first.out / "allocations.json").read_bytes() == (second.out / "allocations.json").read_bytes()

    def told(result: Any) -> list[tuple[Any, ...]]:
        return [(row["genome"], row["draw"], row["fitness"]) for row in result.rows["candidates"]]

    assert told(first) == told(second) != told(other)


def test_every_scored_candidate_is_accounted_for(chain: Callable[[str], Any]) -> None:
    made = chain("llama")
    found = made.allocate({"solver": "evolve", "budgets": {"bits": [2.5, 3.0]}, "seed": 3, **QUICK})
    table = CostTable(DatabaseIndex(made.levels.out))
    for row in found.rows["allocations"]:
        own = [candidate for candidate in found.rows["candidates"] if candidate["budget"] == row["budget"]]
        assert len(own) == row["evaluations"]
        assert sum(candidate["n_tokens"] for candidate in own) == row["tokens"]
    for candidate in found.rows["candidates"]:
        assert candidate["candidate"] == table.candidate(candidate["genome"])
        assert candidate["bits"] <= float(candidate["budget"].removeprefix("bits=")) * (1 + 1e-9)
        assert candidate["bytes"] == table.describe(candidate["genome"])["bytes"]
        assert candidate["status"] == "ok"
    assert any(note.startswith("generations, bits=3, best at kl") for _, _, note in found.progress)


@pytest.mark.parametrize("solver", SEARCHES)
def test_every_search_stops_where_it_is_told_and_is_never_above_its_start(
    chain: Callable[[str], Any], solver: str
) -> None:
    made = chain("llama")
    (begin,) = load_allocations(made.allocate({"solver": "ilp", "budgets": {"bits": 2.5}}).out)
    found = made.allocate({"solver": solver, "budgets": {"bits": 2.5}, **QUICK, **SHORT, "evaluations": 20})
    (end,), (row,) = load_allocations(found.out), found.rows["allocations"]
    assert (end.kl or 1) <= (begin.kl or 0)
    assert 1 <= row["evaluations"] <= 20
    assert len(found.rows["candidates"]) == row["evaluations"]
    assert {candidate["solver"] for candidate in found.rows["candidates"]} == {solver}


def test_what_a_search_does_not_read_is_no_part_of_its_key() -> None:
    def material(**params: Any) -> dict[str, Any]:
        return AllocateParams.model_validate({"budgets": {"bits": 3}, **params}).material()

    assert material(solver="random", offspring=5, preset="quick") == material(solver="random")
    assert material(solver="random", batch=5) != material(solver="random")
    assert material(solver="evolve", batch=5) == material(solver="evolve")
    assert material(solver="evolve", offspring=5) != material(solver="evolve")
    assert material(solver="ilp", seed=5, evaluations=7) == material(solver="ilp")


def test_perplexity_can_be_what_is_minimised(chain: Callable[[str], Any]) -> None:
    made = chain("gpt2")
    found = made.allocate({"solver": "evolve", "budgets": {"bits": 3.0}, "fitness": "perplexity", **QUICK})
    assert {row["metric"] for row in found.rows["candidates"]} == {"nll"}
    assert found.rows["allocations"][0]["metric"] == "kl"


def test_budgets_of_two_resources_give_every_combination(chain: Callable[[str], Any]) -> None:
    made = chain("llama")
    sizes = [CostTable(DatabaseIndex(made.levels.out)).describe([level] * 21)["bytes"] for level in (1, 2)]
    budgets = {"bits": [3.0, 3.5], "bytes": [sum(sizes) / 2, sizes[1]]}
    found = load_allocations(made.allocate({"solver": "ilp", "budgets": budgets}).out)
    assert len(found) == 4
    for allocation, (bits, size) in zip(found, itertools.product(*budgets.values()), strict=True):
        assert allocation.sizes["bits"] <= bits
        assert allocation.sizes["bytes"] <= size


def test_two_budgets_may_lead_to_one_allocation(chain: Callable[[str], Any]) -> None:
    found = load_allocations(chain("llama").allocate({"solver": "uniform", "budgets": {"bits": [3.0, 3.1]}}).out)
    assert found[0].candidate == found[1].candidate
    assert (found[0].kl, found[0].sizes["bits"]) == (found[1].kl, 3.0)


# --- bits, sparsity and depth in one search ---

MIXED = [
    {"method": "rtn", "bits": 3, "group_size": 16},
    {"method": "magnitude", "sparsity": 0.5},
    {"method": "drop", "units": ["attention", "mlp", "block"]},
    {"method": "dense"},
]


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path], make_bench: Callable[..., Any]
) -> Any:
    """A model of two blocks, of each half one weight with three levels, and everything may be dropped."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("two-blocks")
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, initializer_range=0.3, **sizes))
    model.save_pretrained(folder)
    for file in model_folder("llama").glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    bench = make_bench(folder)
    levels = bench.run("compress", {"menu": MIXED, "targets": ["o_proj", "down_proj"]})
    return bench, levels, bench.run("profile", {"metrics": ["kl"], "tokens": 96}, database=levels.out)


def every_model(profile: Path) -> list[tuple[float, dict[str, float], dict[str, str]]]:
    """Each of the 5184 genomes by hand: additive loss of what is there, its resources, its levels.

    Counted from the shapes that the fixture gave the model; all is float32.
    """
    document = json.loads((profile / "profile.json").read_text())
    units, levels, losses = document["units"], document["levels"], document["metrics"]["kl"]
    sizes = {"o_proj": 16 * 16, "down_proj": 16 * 24}
    beside = {"self_attn": 3 * 16 * 16, "mlp": 2 * 16 * 24, "block": 2 * 16}  # q, k, v; gate, up; two norms
    rest = {"parameters": 2 * 256 * 16 + 16, "flops": 2 * 256 * 16}  # embedding, head and norm; the head's products
    found = []
    for genome in itertools.product(*(range(len(own)) for own in levels)):
        chosen = dict(zip(units, genome, strict=True))
        gone = {name for name, number in chosen.items() if levels[units.index(name)][number] == "drop"}
        there = {name for name in units if not any(name.startswith(f"{part}.") for part in gone)}
        bits, parameters, flops = 0.0, float(rest["parameters"]), float(rest["flops"])
        for name in there:
            leaf = name.rpartition(".")[2]
            if leaf in sizes:
                kind = levels[units.index(name)][chosen[name]].partition("-")[0]
                kept = sizes[leaf] * (0.5 if kind == "magnitude" else 1)
                bits += {"rtn": 3, "magnitude": 32, "dense": 32}[kind] * kept
                parameters += kept
                flops += 2 * kept
            elif name not in gone:
                own = beside[leaf if leaf in beside else "block"]
                parameters += own
                flops += 0 if leaf.isdigit() else 2 * own
        loss = math.fsum(losses[units.index(name)][chosen[name]] for name in there)
        totals = {"bits": bits / (2 * sum(sizes.values())), "parameters": parameters, "flops": flops}
        found.append((loss, totals, {name: levels[units.index(name)][chosen[name]] for name in there}))
    return found


@pytest.mark.parametrize("solver", ["ilp", "branch"])
def test_bits_depth_and_sparsity_are_chosen_together_as_exhaustion_would(mixed: Any, solver: str) -> None:
    bench, levels, profile = mixed
    models = every_model(profile.out)
    assert len(models) == 3**4 * 2**6
    kinds: set[str] = set()
    for budget in (
        {"bits": 12.0},
        {"parameters": 9700},
        {"flops": 11200},
        {"bits": 20.0, "parameters": 10200, "flops": 12000},
    ):
        inputs = {"database": levels.out, "profile": profile.out}
        (row,) = bench.run("allocate", {"solver": solver, "budgets": budget}, **inputs).rows["allocations"]
        within = [
            (loss, totals, chosen) for loss, totals, chosen in models
            if all(totals[resource] <= amount for resource, amount in budget.items())
        ]  # fmt: skip
        best = min(loss for loss, _, _ in within)
        assert row["predicted_loss"] == pytest.approx(best, rel=1e-6), budget
        own = dict(zip(row["units"], row["levels"], strict=True))
        (told,) = {tuple(sorted(totals.items())) for _, totals, chosen in models if chosen == own}
        assert {resource: row[resource] for resource, _ in told} == pytest.approx(dict(told))
        assert all(row[resource] <= amount * (1 + 1e-9) for resource, amount in budget.items())
        kinds |= {level.partition("-")[0] for level in own.values()}
    assert kinds == {"dense", "rtn", "magnitude", "keep", "drop"}, "each is worth it for one of the budgets"


@pytest.mark.parametrize("solver", [*SOLVERS, *SEARCHES])
def test_budgets_of_every_resource_are_kept_where_parts_may_be_dropped(mixed: Any, solver: str) -> None:
    bench, levels, profile = mixed
    settings = QUICK if solver == "evolve" else SHORT
    for resource in ("bytes", "parameters", "flops"):
        params = {"solver": solver, "budgets": {resource: ["15%", "60%"]}, **settings}
        made = bench.run("allocate", params, database=levels.out, profile=profile.out)
        table = CostTable(DatabaseIndex(levels.out))
        amounts = table.problem({}, tie=False, losses=None).reachable(resource)
        least, most = (amount + table.rest[resource] for amount in amounts)
        for allocation, share in zip(load_allocations(made.out), (0.15, 0.6), strict=True):
            assert allocation.sizes[resource] <= (least + share * (most - least)) * (1 + 1e-9)
            assert allocation.kl is not None


def what_is_left(chosen: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    """A model by what distinguishes it: levels of what is there, and where something was."""
    gone = {name for name, level in chosen.items() if level == "drop"}
    gone |= {block for block in ("model.layers.0", "model.layers.1") if {f"{block}.self_attn", f"{block}.mlp"} <= gone}
    inside = {name for name in chosen if any(name.startswith(f"{part}.") for part in gone)}
    there = {(name, level) for name, level in chosen.items() if name not in inside | gone}
    return frozenset(there | {(name, "drop") for name in gone - inside})


def test_candidates_of_a_search_over_parts_are_models_and_no_model_has_two_ids(mixed: Any) -> None:
    bench, levels, profile = mixed
    params = {"solver": "evolve", "budgets": {"bits": 8.0}, "seed": 2, **QUICK, "generations": 12, "offspring": 12}
    found = bench.run("allocate", params, database=levels.out, profile=profile.out)
    table, rows = CostTable(DatabaseIndex(levels.out)), found.rows["candidates"]
    ids: dict[frozenset[tuple[str, str]], set[str]] = {}
    for row in rows:
        assert row["bits"] <= 8.0 * (1 + 1e-9)
        chosen = {unit.name: unit.levels[n].name for unit, n in zip(table.units, row["genome"], strict=True)}
        ids.setdefault(what_is_left(chosen), set()).add(row["candidate"])
    assert {len(known) for known in ids.values()} == {1}
    assert len(set().union(*ids.values())) == len(ids)
    assert any("drop" in dict(model).values() for model in ids)
    first = [row["fitness"] for row in rows if row["generation"] == rows[0]["generation"]]
    (end,) = load_allocations(found.out)
    assert end.kl is not None
    assert end.kl <= max(first)


# --- what it refuses ---


@pytest.mark.parametrize(
    ("params", "profile", "error", "complaint"),
    [
        ({"solver": "ilp", "budgets": {"bits": 1.5}}, True, InfeasibleBudget, "below the least reachable 2 "),
        ({"solver": "evolve", "budgets": {"bits": [3, 1.9]}}, True, InfeasibleBudget, "budget 1.9 bits is below"),
        ({"solver": "ilp", "budgets": {"bits": 3}}, False, UsageError, "solver ilp needs a profile"),
        ({"solver": "evolve", "budgets": {"bits": 3}}, False, UsageError, "evolve with start: ilp needs a profile"),
        ({"solver": "evolve", "budgets": {"bits": 3}, "start": "random", "survivors_per_selection": [2, 2]},
         False, UsageError, "must name the same rounds|must leave one survivor"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_the_users_words(
    chain: Callable[[str], Any], params: dict[str, Any], profile: bool, error: type[LayerwiseError], complaint: str
) -> None:
    with pytest.raises(error) as caught:
        chain("llama").allocate(params, profile=profile)
    assert re.search(complaint, caught.value.message), caught.value.message
    assert caught.value.exit_code == 2


def test_budgets_that_only_fail_together_are_refused_in_the_users_words(chain: Callable[[str], Any]) -> None:
    made = chain("gpt2")
    menu = [{"method": "rtn", "bits": 2, "group_size": 2}, {"method": "rtn", "bits": 4, "group_size": -1}]
    levels = made.bench.run("compress", {"menu": menu}, statistics=made.stats.out)  # 10 and 4.5 effective bits
    profile = made.bench.run("profile", {"metrics": ["weight_nmse"]}, database=levels.out)
    for solver in [*(set(SEPARABLE) - {"dp"}), *SEARCHES]:  # dp takes one budget at a time, and says so
        params = {
            "solver": solver,
            "budgets": {"bits": 3, "effective_bits": 5},
            "loss": "weight_nmse",
            "start": "random",
        }
        with pytest.raises(
            InfeasibleBudget, match="no allocation is within bits=3,effective_bits=5: the least "
        ) as told:
            made.bench.run("allocate", params, database=levels.out, profile=profile.out)
        assert told.value.budget == {"bits": 3, "effective_bits": 5}[told.value.resource]
        assert told.value.budget < told.value.reachable < 11


def test_bytes_out_of_reach_are_those_of_the_whole_model(
    chain: Callable[[str], Any], model_folder: Callable[[str], Path]
) -> None:
    made = chain("llama")
    least = CostTable(DatabaseIndex(made.levels.out)).describe([1] * 21)["bytes"]
    with pytest.raises(InfeasibleBudget, match=f"least reachable {least}"):
        made.allocate({"solver": "uniform", "budgets": {"bytes": least - 1}})
    made.allocate({"solver": "uniform", "budgets": {"bytes": least}})


def test_a_solver_without_need_of_a_profile_needs_none(chain: Callable[[str], Any]) -> None:
    made = chain("gpt2")
    made.allocate({"solver": "uniform", "budgets": {"bits": 3}}, profile=False)
    made.allocate({"solver": "evolve", "budgets": {"bits": 3}, "start": "uniform", **QUICK}, profile=False)


def test_a_metric_that_the_profile_lacks_is_named(chain: Callable[[str], Any]) -> None:
    made = chain("llama")
    bare = made.bench.run("profile", {"metrics": ["output_error"]}, database=made.levels.out)
    with pytest.raises(UsageError, match="the profile has no kl, only output_error"):
        made.bench.run(
            "allocate", {"solver": "ilp", "budgets": {"bits": 3}}, database=made.levels.out, profile=bare.out
        )
    found = made.bench.run(
        "allocate",
        {"solver": "ilp", "budgets": {"bits": 3}, "loss": "output_error"},
        database=made.levels.out,
        profile=bare.out,
    )
    assert found.rows["allocations"][0]["profile_tokens"] == 0


def test_a_profile_of_another_database_is_refused(chain: Callable[[str], Any]) -> None:
    made = chain("llama")
    menu = [{"method": "rtn", "bits": [2, 4], "group_size": 16}]
    other = made.bench.run("compress", {"menu": menu}, statistics=made.stats.out)
    with pytest.raises(UsageError, match="the profile is that of another database"):
        made.bench.run(
            "allocate", {"solver": "ilp", "budgets": {"bits": 3}}, database=other.out, profile=made.profile.out
        )


def test_a_loss_that_does_not_know_dropped_parts_is_refused_before_anything_runs() -> None:
    """Weight and output errors are those of weights; a level without a loss is never chosen."""
    from layerwise.stages.compress.params import CompressParams
    from layerwise.stages.profile.stage import ProfileParams

    feeding = {"database": [CompressParams.model_validate({"menu": MIXED})], "profile": [ProfileParams()]}
    for loss in ("output_error", "weight_nmse"):
        params = AllocateParams.model_validate({"solver": "ilp", "loss": loss, "budgets": {"bits": 3}})
        (mistake,) = mistakes(params, feeding)
        assert mistake == (
            ("loss",),
            f"only kl knows what a dropped or narrower part costs: with {loss} there would be none",
        )
        assert not list(mistakes(params, {**feeding, "database": [CompressParams.model_validate({"menu": MIXED[:2]})]}))
    assert not list(mistakes(AllocateParams.model_validate({"solver": "ilp", "budgets": {"bits": 3}}), feeding))


@pytest.mark.parametrize(
    ("depth", "wrong"), [(0.4, True), ("0%", True), ("0.1%", False), (0.5, False), ([2, 0.1], True)]
)
def test_a_depth_that_leaves_nothing_is_refused_before_anything_runs(depth: Any, wrong: bool) -> None:
    from layerwise.stages.compress.params import CompressParams

    params = AllocateParams.model_validate({"solver": "uniform", "budgets": {"depth": depth}})
    menu = [{"method": "drop", "units": ["attention", "mlp", "block"]}, {"method": "dense"}]
    found = [text for _, text in mistakes(params, {"database": [CompressParams.model_validate({"menu": menu})]})]
    assert found == ([found[0]] if wrong else [])
    assert all("every block would be dropped" in text for text in found)


@pytest.mark.parametrize(
    ("menu", "told"),
    [
        ([{"method": "dense"}], "the menu makes no half-block narrower"),
        ([{"method": "width", "keep": 0.5}, {"method": "drop"}], "so none can be dropped"),
    ],
)
def test_equal_width_needs_widths_and_no_drops(menu: list[dict[str, Any]], told: str) -> None:
    from layerwise.stages.compress.params import CompressParams

    params = AllocateParams.model_validate(
        {"solver": "evolve", "start": "uniform", "budgets": {"parameters": "50%"}, "equal_width": True}
    )
    (mistake,) = mistakes(params, {"database": [CompressParams.model_validate({"menu": menu})]})
    assert mistake[0] == ("equal_width",)
    assert told in mistake[1]


def test_ties_hold_inside_parts_that_may_be_dropped(
    model_folder: Callable[[str], Path], new_bench: Callable[..., Any]
) -> None:
    bench = new_bench(model_folder("llama"))
    menu = [{"method": "rtn", "bits": [2, 3, 4], "group_size": 16}, {"method": "drop", "units": ["attention", "mlp"]}]
    levels = bench.run("compress", {"menu": menu})
    profile = bench.run("profile", {"metrics": ["kl"], "tokens": 32}, database=levels.out)
    groups: dict[str, set[str]] = {}
    for entry in DatabaseIndex(levels.out).units:
        if entry.unit.group is not None:
            groups.setdefault(entry.unit.group, set()).add(entry.name)
    assert len(groups) == 6
    for solver in ("ilp", "branch", "evolve"):
        params = {"solver": solver, "budgets": {"bits": [1.2, 2.4]}, "tie": "fused", **QUICK}
        found = bench.run("allocate", params, database=levels.out, profile=profile.out)
        for allocation in load_allocations(found.out):
            assert "drop" in allocation.levels.values() or allocation.sizes["bits"] > 2
            for members in groups.values():
                assert len({allocation.levels.get(unit) for unit in members}) == 1, "one level, or all of them gone"


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"budgets": {}}, "at least 1 item"),
        ({"budgets": {"bits": []}}, "one or more amounts"),
        ({"budgets": {"bits": [3, -1]}}, "above 0, or 0% to 100%, got -1"),
        ({"budgets": {"bits": float("nan")}}, "above 0"),
        ({"budgets": {"ms": "-5%"}}, "above 0, or 0% to 100%, got text '-5%'"),
        ({"budgets": {"ms": ["40%", "120%"]}}, "above 0, or 0% to 100%, got text '120%'"),
        ({"budgets": {"bit": 3}}, "bit"),
        ({"budgets": {"bits": 3}, "solver": "ipl"}, "did you mean 'ilp'"),
        ({"budgets": {"bits": 3}, "preset": "evopress-quantisation"}, "did you mean 'evopress-quantization'"),
        ({"budgets": {"bits": 3}, "tie": "all"}, "none' or 'fused"),
    ],
)
def test_parameters_are_checked_before_anything_runs(params: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        AllocateParams.model_validate(params)
