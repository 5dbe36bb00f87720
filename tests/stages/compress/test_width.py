"""Narrower half-blocks: what is kept, what it makes up for, what it costs, and what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from layerwise.errors import UnsupportedModel, UsageError
from layerwise.stages.allocate.allocation import make_allocation, save_allocations
from layerwise.stages.allocate.costs import CostTable
from layerwise.stages.compress import Task
from layerwise.stages.compress.params import CompressParams
from layerwise.stages.compress.stage import notes
from layerwise.stages.compress.width import Params, corrected, saliency, width
from layerwise.stages.contract import ModelSource
from layerwise.stages.levels.database import Database, DatabaseIndex
from layerwise.stages.levels.sliced import kept_groups, kept_part
from layerwise.stages.models.channels import Channels
from layerwise.stages.models.network import Unit

MLP = Channels("mlp", "mlp", 24, 1, "down", ((0, 1),), {"gate": ((0, 1),), "up": ((0, 1),)})
HEADS = Channels("attn", "attention", 4, 2, "o", ((0, 6),), {"q": ((0, 6),), "k": ((0, 3),), "v": ((0, 3),)})
SHAPES = {
    "gate": (24, 10),
    "up": (24, 10),
    "down": (10, 24),
    "q": (24, 10),
    "k": (12, 10),
    "v": (12, 10),
    "o": (10, 24),
}


def task(channels: Channels) -> tuple[Task, Tensor]:
    """Random weights, and the inputs of the output projection, whose channels depend on each other."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(SHAPES[name], generator=generator) for name in channels.units}
    X = torch.randn((200, 12), generator=generator) @ torch.randn((12, 24), generator=generator)
    X += 0.3 * torch.randn(X.shape, generator=generator)
    inputs = torch.randn((200, 10), generator=generator)
    known = dict.fromkeys(channels.rows, inputs.T @ inputs) | {channels.out: X.T @ X}
    units = {name: Unit(name, name, "linear", 0, SHAPES[name], (0,)) for name in channels.units}
    units[channels.half] = Unit(channels.half, channels.half, "mlp", 0, (0, 0), (0,))
    return Task(weights, lambda unit, _: known[unit], units, channels=channels), X


@pytest.mark.parametrize("channels", [MLP, HEADS], ids=lambda one: one.half)
def test_groups_are_ranked_by_the_energy_that_they_add_to_the_answer(channels: Channels) -> None:
    given, X = task(channels)
    W = given.weights[channels.out]
    size = 24 // channels.groups
    expected = [
        (X[:, g * size : (g + 1) * size].double() @ W[:, g * size : (g + 1) * size].double().T).square().sum()
        for g in range(channels.groups)
    ]
    found = saliency(W, given.statistic(channels.out, "hessian"), channels)
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # the Hessian was added up in float32


def test_what_is_kept_makes_up_for_what_went_by_least_squares() -> None:
    given, X = task(MLP)
    W, kept = given.weights["down"].double(), torch.tensor([0, 2, 3, 7, 11, 20])
    answer = X.double() @ W.T
    best, *_ = np.linalg.lstsq(X[:, kept].double().numpy(), answer.numpy(), rcond=None)
    found = corrected(given.weights["down"], X.double().T @ X.double(), kept, 1e-12)
    np.testing.assert_allclose(found.T, best, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("channels", [MLP, HEADS], ids=lambda one: one.half)
def test_a_correction_never_answers_worse_and_a_narrower_level_is_a_part_of_a_wider_one(channels: Channels) -> None:
    given, X = task(channels)
    params = Params(keep=(0.25, 0.5, 0.75), multiple=2)
    made, plain = width(given, params), width(given, params.model_copy(update={"correct": False}))
    answer = X @ given.weights[channels.out].T
    kept: list[set[int]] = []
    for level, uncorrected in zip(made[channels.out], plain[channels.out], strict=True):
        errors = [(X @ one.decode().T - answer).square().sum() for one in (level, uncorrected)]
        assert errors[0] < errors[1]
        groups = kept_groups(level)
        assert all(
            kept_groups(one) == groups for unit in channels.units for one in made[unit] if one.name == level.name
        )
        kept.append(set(groups))
    assert kept[0] < kept[1] < kept[2]
    assert [len(some) for some in kept] == [channels.groups // 4, channels.groups // 2, 3 * channels.groups // 4]
    for unit, segments in channels.rows.items():
        W, decoded, ((_, size),) = given.weights[unit], made[unit][0].decode(), segments
        there = torch.tensor([row // size in kept[0] for row in range(len(W))])
        assert torch.equal(decoded[there], W[there])
        assert not decoded[~there].any()


def test_the_weights_that_are_left_are_quantized_together_with_their_width() -> None:
    given, _ = task(MLP)
    params = Params.model_validate({"keep": 0.5, "multiple": 4, "then": {"bits": [3, 8], "group_size": 6}})
    assert params.level_names() == ["width-50%+gptq-3b-g6", "width-50%+gptq-8b-g6"]
    made, whole = width(given, params), width(given, Params(keep=(0.5,), multiple=4))
    for unit in MLP.units:
        three, eight = made[unit]
        dense = kept_part(whole[unit][0]).decode()
        worse, better = ((kept_part(level).decode() - dense).norm() / dense.norm() for level in (three, eight))
        assert better < 0.02 < worse
        assert kept_part(three).recipe["bits"] == 3
        assert three.parameters == dense.numel()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"keep": 0}, "greater than 0"),
        ({"keep": []}, "at least 1"),
        ({"keep": 1.5}, "a share is below 1"),
        ({"keep": 4}, "say of which units"),
        ({"keep": 40, "units": "mlp"}, "keep 40 is no multiple of 32 channels"),
        ({"keep": [0.5, 0.5]}, "stands twice"),
        ({"keep": 0.5, "units": "block"}, "attention"),
        ({"keep": 0.5, "multiple": 0}, "greater than or equal to 1"),
        ({"keep": 0.5, "then": {"bits": 99}}, "bits"),
    ],
)
def test_a_width_that_makes_no_sense_is_refused_before_the_run(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Params.model_validate(given)


@pytest.mark.parametrize(
    ("given", "channels", "told"),
    [
        ({"keep": 3, "units": "attention"}, HEADS, "2 query heads share a key and a value head"),
        ({"keep": 8, "units": "attention"}, HEADS, "no less than the 8 heads"),
        ({"keep": 0.95, "units": "attention"}, HEADS, "no less than the 8 heads"),
        ({"keep": 0.5}, MLP, "no less than the 24 channels that it has, in multiples of 32"),
        ({"keep": 24, "units": "mlp", "multiple": 8}, MLP, "no less than the 24 channels"),
        ({"keep": [0.6, 0.7], "multiple": 8}, MLP, "keep 0.6 and 0.7 are the same 16 channels"),
    ],
)
def test_a_width_that_a_half_block_cannot_have_is_named(given: dict[str, Any], channels: Channels, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Params.model_validate(given).groups_kept(channels)


def test_a_share_that_is_rounded_is_told() -> None:
    params = Params(keep=(0.6, 0.3), multiple=8)
    assert params.rounded(MLP) == [
        f"keep {share} of 24 channels is {count} channels" for share, count in ((0.6, 16), (0.3, 8))
    ]
    assert params.rounded(HEADS) == ["keep 0.6 of 8 heads is 4 heads", "keep 0.3 of 8 heads is 2 heads"]


# --- in the stages ----------------------------------------------------------------------------------------------------

MENU = [
    {"method": "width", "units": "mlp", "keep": [0.8, 0.4], "multiple": 8},
    {"method": "width", "units": "attention", "keep": 0.5, "then": {"bits": 4, "group_size": 16}},
    {"method": "drop", "units": ["attention", "block"]},
    {"method": "dense"},
]


@pytest.fixture
def narrowed(make_bench: Callable[[Path], Any], model_folder: Callable[[str], Path]) -> Callable[..., tuple[Any, Any]]:
    """A bench with a family's model, and its database."""

    def make(family: str, menu: list[dict[str, Any]] = MENU, **params: Any) -> tuple[Any, Any]:
        bench = make_bench(model_folder(family))
        statistics = bench.run("calibrate").out
        return bench, bench.run("compress", {"menu": menu, **params}, statistics=statistics)

    return make


def test_a_narrow_half_block_costs_what_it_leaves_and_its_units_are_no_choices(
    narrowed: Callable[..., tuple[Any, Any]],
) -> None:
    _, made = narrowed("qwen2")
    index = DatabaseIndex(made.out)
    half = index.by_name["model.layers.1.mlp"]
    keep, wide, thin = (half.level(name).costs or {} for name in ("keep", "width-80%", "width-40%"))
    rows = {"width-80%": 32, "width-40%": 16}
    for name, costs in zip(rows, (wide, thin), strict=True):
        assert costs["parameters"] - keep["parameters"] == 3 * rows[name] * 32
        assert costs["bytes"] - keep["bytes"] == 3 * (rows[name] * 32 * 4 + 5)  # float32, and a bit for each of 40
        assert costs["flops"] == 2 * 3 * rows[name] * 32
        assert costs["depth"] == keep["depth"] == 0.5
    units = [unit for unit in index.units if unit.unit.parent == half.name]
    assert [unit.unit.kind for unit in units] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert not any(unit.level("width-80%").offered for unit in units)
    table = CostTable(index)
    number = {unit.name: row for row, unit in enumerate(index.units)}
    genome = [0] * len(index.units)
    genome[number[half.name]] = [level.name for level in half.levels].index("width-40%")
    other = list(genome)
    for unit in units:  # whatever they are, the half-block says what they have
        other[number[unit.name]] = 1
    assert table.candidate(genome) == table.candidate(other)
    assert table.canonical(other) == genome
    dense, thinner = table.describe([0] * len(genome)), table.describe(genome)
    assert dense["parameters"] - thinner["parameters"] == 3 * (40 - 16) * 32


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_a_narrow_candidate_is_the_model_with_zeros_for_what_went(
    narrowed: Callable[..., tuple[Any, Any]], tmp_path: Path, family: str
) -> None:
    from layerwise.stages.evaluate.evaluator import Evaluator
    from layerwise.stages.evaluate.scoring import Request
    from layerwise.stages.models.causal_lm import CausalLM

    bench, made = narrowed(family)
    database = Database(made.out, bench.model)
    wanted = {"attention": "width-50%+gptq-4b-g16", "mlp": "width-40%"}
    chosen = {
        unit.name: wanted[unit.unit.role]
        for unit in database.units
        if unit.unit.role in wanted and unit.unit.block != 1
    }
    genome = tuple(
        [level.name for level in unit.levels].index(chosen[unit.name]) if unit.name in chosen else 0
        for unit in database.units
    )
    ids = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(2))
    (score,) = Evaluator(CausalLM.load(bench.model), ids, database)(Request((genome,)))

    allocation = make_allocation(CostTable(database.index), genome, solver="hand", budget={"bits": 32})
    assert not any(f"{half}." in unit for half in chosen for unit in allocation.levels)
    (tmp_path / "allocations").mkdir()
    save_allocations(tmp_path / "allocations", [allocation])
    inputs = {"allocations": tmp_path / "allocations", "database": made.out}
    applied = bench.run("apply", {"pick": allocation.candidate}, **inputs).out
    names = [unit["unit"]["name"] for unit in json.loads((applied / "model.json").read_text())["units"]]
    assert names and not set(names) & set(chosen)
    dense, model = CausalLM.load(bench.model), CausalLM.load(ModelSource(bench.model.path, compressed=applied))
    for name in names:
        zeros = (model.weight(next(unit for unit in model.units if unit.name == name)) == 0).float().mean()
        assert zeros > 0.45
    p, q = (lm.logits(ids).double().log_softmax(-1) for lm in (dense, model))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert score["kl"]["mean"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    native = bench.run("export", {"format": "native"}, model=applied).out
    from layerwise.stages.export.native import load

    assert torch.equal(load(native).logits(ids), model.logits(ids))


def test_no_time_is_told_of_a_narrow_half_block_that_would_run_whole(narrowed: Callable[..., tuple[Any, Any]]) -> None:
    from layerwise.stages.latency.charging import is_timed, narrows
    from layerwise.stages.latency.speed import check_timed

    _, made = narrowed("llama", [MENU[0], MENU[3]])
    index = DatabaseIndex(made.out)
    half = index.by_name["model.layers.2.mlp"]
    assert [narrows(level) for level in half.levels] == [False, True, True]
    inside = [level for unit in index.units for level in unit.levels if "width" in level.name and not unit.is_parent]
    assert not any(is_timed(half, level) for level in inside)
    genome = [int(unit.name == half.name) for unit in index.units]
    allocation = make_allocation(CostTable(index), genome, solver="hand", budget={"bits": 32})
    with pytest.raises(UsageError, match=r"the first is model\.layers\.2\.mlp"):
        check_timed([allocation], index)
    check_timed([make_allocation(CostTable(index), [0] * len(genome), solver="hand", budget={"bits": 32})], index)


def test_what_cannot_be_narrowed_is_refused_or_left_out_by_name(
    narrowed: Callable[..., tuple[Any, Any]], model_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(UnsupportedModel, match="experts and routers have widths of their own") as caught:
        narrowed("mixtral")
    assert "leave mlp out" in str(caught.value.hint)
    with pytest.raises(UnsupportedModel, match="look at each other"):
        narrowed("olmoe", MENU[1:])
    menu = {"menu": [{"method": "width", "keep": 0.8, "multiple": 8}, {"method": "dense"}]}
    with pytest.raises(UsageError, match="no less than the 4 heads"):  # told before the run, too
        list(notes(CompressParams.model_validate(menu), ModelSource(model_folder("llama"))))
    with pytest.raises(UsageError, match="no less than the 4 heads"):
        narrowed("llama", [{"method": "width", "keep": 0.8, "multiple": 8}, {"method": "dense"}])
    with pytest.raises(UnsupportedModel, match="up_proj is not compressed here"):
        narrowed("llama", ignore=["up_proj"])


def test_equal_width_gives_all_half_blocks_of_a_role_one_level(narrowed: Callable[..., tuple[Any, Any]]) -> None:
    from layerwise.stages.allocate.allocation import load_allocations

    bench, made = narrowed("llama", [*MENU[:2], MENU[3]])
    profiled = bench.run("profile", {"metrics": ["kl"], "tokens": 64}, database=made.out)
    statuses = {
        (row["unit"].count(".") > 3, row["level"] == "dense", row["status"]) for row in profiled.rows["profile"]
    }
    # What is no choice of its own is not measured by itself.
    assert statuses == {(False, False, "ok"), (True, True, "ok"), (True, False, "not_offered")}
    profile = profiled.out
    settings = {"solver": "ilp", "budgets": {"parameters": ["30%", "60%"]}, "equal_width": True}
    for allocation in load_allocations(bench.run("allocate", settings, database=made.out, profile=profile).out):
        for role in ("self_attn", "mlp"):
            assert len({level for unit, level in allocation.levels.items() if unit.endswith(role)}) == 1


def test_equal_width_is_refused_where_one_half_block_cannot_be_narrower(
    narrowed: Callable[..., tuple[Any, Any]],
) -> None:
    bench, made = narrowed("llama", [MENU[0], MENU[3]], ignore=["model.layers.1.mlp.up_proj"])
    settings = {"solver": "uniform", "budgets": {"parameters": "50%"}, "equal_width": True}
    with pytest.raises(UsageError, match=r"layers\.1\.mlp cannot be narrower: .*up_proj is not compressed here"):
        bench.run("allocate", settings, database=made.out)
