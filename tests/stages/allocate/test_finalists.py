"""Finalists of `allocate`, repaired and compared: their figures are those of the models that a user makes by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from layerwise.results.frontier import after_repair
from layerwise.stages.allocate.allocation import load_allocations
from layerwise.stages.allocate.finalists import changed_ranks
from layerwise.stages.allocate.stage import AllocateParams, mistakes
from layerwise.stages.apply.pick import pick
from layerwise.stages.models.compressed import CompressedModel

SEARCH = {
    "solver": "evolve", "budgets": {"bits": [2.5, 3.0]}, "generations": 3, "offspring": 6,
    "survivors_per_selection": [2, 1], "tokens_per_selection": [32, 96],
}  # fmt: skip
EORA = {"method": "eora", "rank": 2}


def test_the_best_repaired_finalist_is_chosen_and_its_figures_are_those_of_the_repaired_model(
    chain: Callable[[str], Any],
) -> None:
    made = chain("llama")
    bench, statistics = made.bench, made.bench.run("calibrate", {"statistics": ["hessian"]}).out
    inputs = {"database": made.levels.out, "profile": made.profile.out, "statistics": statistics}
    found = bench.run("allocate", {**SEARCH, "finalists": 3, "recover": EORA}, **inputs)
    allocations, rows = load_allocations(found.out), found.rows["allocations"]
    repaired = {row["candidate"] for row in found.rows["recovery"]}
    assert 3 <= len(repaired) <= 6
    for allocation, row in zip(allocations, rows, strict=True):
        assert (row["repair"], row["finalists"]) == ("eora-r2", 3)
        assert row["recovered_kl"] == allocation.recovered_kl < allocation.kl
        inputs = {"allocations": found.out, "database": made.levels.out}
        model = bench.run("apply", {"pick": allocation.candidate}, **inputs).out
        after = bench.run("recover", {"repairs": [EORA]}, model=model, statistics=statistics).out
        scores = bench.run("evaluate", {"data": "calibration"}, models=[after]).out
        measured = json.loads((scores / "metrics.json").read_text())[f"{allocation.candidate}@eora-r2"]
        assert row["recovered_kl"] == pytest.approx(measured["kl"]["mean"], rel=1e-5)
        sizes = [
            sum(one.level(unit).size_bytes for unit in one.levels)
            for one in (CompressedModel(after), CompressedModel(model))
        ]
        assert row["recovered_bytes"] - row["bytes"] == sizes[0] - sizes[1] > 0
        assert row["unrepaired_kl"] <= allocation.kl
        assert row["recovered_effective_bits"] > row["effective_bits"]
    best = min(allocations, key=lambda one: one.recovered_kl or 0)
    assert pick(allocations, "best") == best


def test_a_budget_whose_finalists_the_repair_does_not_fit_keeps_its_allocation(chain: Callable[[str], Any]) -> None:
    made = chain("llama")
    given = {"solver": "uniform", "budgets": {"bits": 3}}
    plain = made.allocate(given).rows["allocations"]
    found = made.allocate({**given, "recover": {"method": "finetune", "steps": 1}})
    (row,), (left,) = found.rows["allocations"], found.rows["recovery"]
    assert row["candidate"] == plain[0]["candidate"] == left["candidate"]
    assert row.get("recovered_kl") is None
    assert left["status"] == "left"
    assert "finetune fits none of the" in left["error"]


def test_ranks() -> None:
    assert changed_ranks([1.0, 2.0, 3.0], [0.1, 0.2, 0.3]) == 0
    assert changed_ranks([1.0, 2.0, 3.0], [0.2, 0.1, 0.3]) == 2
    assert changed_ranks([1.0, 1.0], [float("inf"), float("inf")]) == 0


def test_a_frontier_is_compared_at_equal_bytes() -> None:
    import pandas as pd

    frame = pd.DataFrame(
        {
            "unrepaired_bytes": [100, 200, 300],
            "unrepaired_kl": [1.0, 0.5, 0.2],
            "recovered_bytes": [110, 220, 310],
            "recovered_kl": [0.9, 0.6, 0.1],
        }
    )
    assert after_repair(frame) == (2, 3), "at 220 bytes the model of 200 without a repair is better"


@pytest.mark.parametrize(
    ("given", "where", "text"),
    [
        ({"finalists": 4}, ("finalists",), "say which"),
        ({"recover": EORA}, ("recover", "method"), "eora needs hessian: add a `calibrate` stage"),
        ({"recover": {"method": "svd"}, "format": "gptq"}, ("recover", "method"), "gptq holds no adapters"),
    ],
)
def test_what_cannot_be_compared_is_told_before_the_run(given: Any, where: tuple[str, ...], text: str) -> None:
    params = AllocateParams.model_validate({"solver": "uniform", "budgets": {"bits": 3}, **given})
    found = dict(mistakes(params, {}))
    assert text in found[where]


def test_defaults() -> None:
    params = AllocateParams.model_validate({"budgets": {"bits": 3}, "recover": {"method": "perp"}})
    assert (params.finalists, params.repair_data) == (8, "calibration")
    assert AllocateParams.model_validate(params.model_dump(mode="json")) == params
    plain = AllocateParams.model_validate({"budgets": {"bits": 3}})
    assert not {"finalists", "recover", "repair_data"} & set(plain.material())
    assert params.material() != params.model_copy(update={"finalists": 2}).material()
