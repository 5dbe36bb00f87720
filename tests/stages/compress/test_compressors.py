"""What every compressor promises, ours and those of other packages alike."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import NotFinite, UsageError
from layerwise.stages.calibrate import statistic_names
from layerwise.stages.compress import Task, compressor_names, find_compressor
from layerwise.stages.compress.block_run import BlockRun
from layerwise.stages.levels.database import describe_levels
from layerwise.stages.levels.level import Level
from layerwise.stages.models.network import Unit, View

MENUS: dict[str, list[dict[str, Any]]] = {
    "dense": [{}],
    "rtn": [{"bits": [2, 4, 8], "group_size": 8}, {"bits": 3, "group_size": -1, "sym": False}],
    "gptq": [
        {"bits": [2, 4, 8], "group_size": 8},
        {"bits": 3, "group_size": -1, "sym": False, "desc_act": True},
        {"bits": [3, 5], "group_size": 7, "desc_act": True},
        {"bits": [3, 5], "group_size": 7, "desc_act": "static", "sym": False},
    ],
    "gptq_sequential": [{"bits": [2, 8], "group_size": 8}],
    "magnitude": [{"sparsity": [0.3, 0.5, 0.875]}, {"sparsity": 0.5}],
    "drop": [{}, {"units": "block"}],
}
CASES = [(name, menu) for name in MENUS for menu in MENUS[name]]
WEIGHTS = [(name, menu) for name, menu in CASES if name not in ("dense", "drop")]


def named(cases: list[tuple[str, dict[str, Any]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("name", "menu"), [pytest.param(name, menu, id=f"{name}-{json.dumps(menu)}") for name, menu in cases]
    )


@dataclass(frozen=True)
class Case:
    """A method with its parameters, and what it works on."""

    run: Callable[..., Mapping[str, list[Level]]]
    params: Any
    task: Task
    statistics: dict[str, Tensor]

    def made(self, **changed: Any) -> Mapping[str, list[Level]]:
        return self.run(replace(self.task, **changed), self.params)


@pytest.fixture
def case(load_model: Callable[[str], Any]) -> Callable[[str, dict[str, Any]], Case]:
    """One unit (6, 20) with correlated inputs; a block of a tiny model; or half-blocks."""

    def get(name: str, menu: dict[str, Any]) -> Case:
        compressor = find_compressor(name)
        params = compressor.params.model_validate({"method": name, **menu})
        generator = torch.Generator().manual_seed(0)
        if params.scope == "block":
            return Case(compressor.run, params, _block_task(load_model("llama")), {})
        if params.parents():
            units = {role: Unit(role, role, role, 0, (0, 0), (0,)) for role in params.parents()}
            return Case(compressor.run, params, Task({}, _never, units), {})
        X = torch.randn((20, 20), generator=generator) @ torch.randn((20, 100), generator=generator)
        statistics = {"hessian": X @ X.T}
        weight = torch.randn((6, 20), generator=generator)

        def statistic(unit: str, kind: str) -> Tensor:
            assert kind in params.needs, f"{name} does not say that it needs {kind}"
            return statistics[kind]

        unit = Unit("u", "u", "linear", 0, (6, 20), (0,), View("u.weight"))
        return Case(compressor.run, params, Task({"u": weight}, statistic, {"u": unit}), statistics)

    return get


def _never(unit: str, kind: str) -> Tensor:
    raise AssertionError("nothing is known of it")


def _block_task(lm: Any) -> Task:
    ids = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(1))
    stream = lm.begin(ids)
    inputs = lm.run_block(0, stream.hidden, stream)
    units = [unit for unit in lm.units if unit.block == 1]
    block = BlockRun(lm, 1, units, ids, inputs, lm.run_block(1, inputs, stream))
    weights = {unit.name: lm.weight(unit).clone() for unit in units}
    return Task(weights, _never, {unit.name: unit for unit in units}, block=block)


def identical(first: Mapping[str, list[Level]], second: Mapping[str, list[Level]]) -> bool:
    pairs = [
        (a, b) for unit in first for a, b in zip(first[unit], second[unit], strict=True)
    ]  # fmt: skip
    return first.keys() == second.keys() and all(
        a.recipe == b.recipe
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)
        for a, b in pairs
    )


def test_every_compressor_of_the_table_is_tried_here() -> None:
    assert set(MENUS) == set(compressor_names())


@named(CASES)
def test_every_unit_gets_its_levels_in_the_order_of_their_announced_names(
    case: Callable[..., Case], name: str, menu: dict[str, Any]
) -> None:
    one = case(name, menu)
    made = one.made()
    assert set(made) == set(one.task.units)
    assert all([level.name for level in levels] == one.params.level_names() for levels in made.values())
    assert set(one.params.needs) <= set(statistic_names())
    bits = one.params.nominal_bits()
    if bits is not None:
        assert all([level.bits for level in levels] == list(bits) for levels in made.values())
    assert one.params.offers_unchanged == (name == "dense")


@named(WEIGHTS)
def test_what_it_works_on_is_not_changed_and_the_same_gives_the_same(
    case: Callable[..., Case], name: str, menu: dict[str, Any]
) -> None:
    one, other = case(name, menu), case(name, menu)
    made = one.made()
    assert all(torch.equal(weight, other.task.weights[unit]) for unit, weight in one.task.weights.items())
    assert all(torch.equal(tensor, other.statistics[kind]) for kind, tensor in one.statistics.items())
    assert identical(made, one.made())
    assert identical(made, other.made())


@named(CASES)
def test_a_level_says_how_it_was_made_in_json_and_decodes_to_the_shape_of_its_weight(
    case: Callable[..., Case], name: str, menu: dict[str, Any]
) -> None:
    one = case(name, menu)
    for unit, levels in one.made().items():
        for level in levels:
            assert json.loads(json.dumps(level.recipe, allow_nan=False)) == level.recipe
            assert level.recipe["method"] == name
            assert level.shape == one.task.units[unit].shape
            if level.n_weights:
                assert level.decode().shape == level.shape
                assert level.decode().dtype == torch.float32
                assert level.bits <= level.effective_bits <= 8 * level.size_bytes / level.n_weights


@named(WEIGHTS)
def test_what_makes_levels_of_bfloat16_weights_in_any_layout_sees_their_values(
    case: Callable[..., Case], name: str, menu: dict[str, Any]
) -> None:
    one = case(name, menu)
    stored = {unit: weight.bfloat16() for unit, weight in one.task.weights.items()}
    widened = {unit: weight.float() for unit, weight in stored.items()}
    turned = {unit: weight.T.contiguous().T for unit, weight in widened.items()}
    plain = one.made(weights=widened)
    for other in (one.made(weights=stored), one.made(weights=turned)):
        for unit, levels in plain.items():
            for level, same in zip(levels, other[unit], strict=True):
                assert torch.equal(level.decode(), same.decode())


@named(WEIGHTS)
def test_what_was_pruned_stays_pruned(case: Callable[..., Case], name: str, menu: dict[str, Any]) -> None:
    one = case(name, menu)
    keep = {unit: weight.abs() > weight.abs().median() for unit, weight in one.task.weights.items()}
    pruned = {unit: weight * keep[unit] for unit, weight in one.task.weights.items()}
    for unit, levels in one.made(weights=pruned, keep=keep).items():
        for level in levels:
            assert not level.decode()[~keep[unit]].any()
            assert level.parameters <= keep[unit].sum()
            assert level.recipe["encoding"] in ("mask", "masked_grid")


@named(WEIGHTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(
    case: Callable[..., Case], name: str, menu: dict[str, Any], bad: float
) -> None:
    one = case(name, menu)
    unit = next(reversed(one.task.weights))
    one.task.weights[unit][2, 3] = bad
    values = one.task.weights[unit].numel()
    with pytest.raises(NotFinite, match=f"the weight has 1 NaN or Inf among its {values} values"):
        one.made()


@named(WEIGHTS)
def test_the_error_falls_with_the_bits(case: Callable[..., Case], name: str, menu: dict[str, Any]) -> None:
    one = case(name, menu)
    for unit, made in one.made().items():
        levels = sorted(made, key=lambda level: level.bits)
        entries = describe_levels(levels, one.task.weights[unit], one.statistics.get("hessian"))
        errors = [entry.output_error if one.statistics else entry.weight_nmse for entry in entries]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 0


@named(CASES)
def test_a_fallback_makes_as_many_levels_and_needs_nothing(
    case: Callable[..., Case], name: str, menu: dict[str, Any]
) -> None:
    one = case(name, menu)
    fallback = one.params.fallback()
    if fallback is None:
        assert not one.params.needs, "a unit that no token reached would get no level at all"
        return
    assert not fallback.needs
    assert fallback.scope == "unit"
    assert len(fallback.level_names()) == len(one.params.level_names())
    assert fallback.nominal_bits() == one.params.nominal_bits()


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown method 'gtpq' \\(did you mean 'gptq'\\?\\)"):
        find_compressor("gtpq")


def test_menus_are_checked_without_loading_torch() -> None:
    stages = [f"layerwise.stages.{name}.stage" for name in ("compress", "calibrate")]
    modules = [
        "layerwise.stages.levels.database", *stages, *(f"layerwise.stages.compress.{name}" for name in MENUS),
    ]  # fmt: skip
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
