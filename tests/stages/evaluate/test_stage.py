"""The `evaluate` stage: figures on held-out text, against a plain run of each model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.errors import NotFinite, UsageError
from layerwise.stages.allocate.allocation import load_allocations
from layerwise.stages.data.text import cut, encode
from layerwise.stages.levels.database import Database
from layerwise.stages.models.compressed import CompressedModel


def plain_figures(lm: Any, model: Any, ids: torch.Tensor) -> dict[str, float]:
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (lm.model, model))
    nll = -q[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return {
        "perplexity": math.exp(nll),
        "kl": kl,
        "agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    }


@pytest.fixture(scope="module")
def searched(chain: Callable[[str], Any]) -> Callable[[str], Any]:
    """Two allocations of a family."""
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            made[family] = chain(family).allocate({"solver": "greedy", "budgets": {"bits": [2.5, 3.5]}})
        return made[family]

    return get


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_allocations_and_the_dense_model_are_measured_as_plainly_run(
    chain: Callable[[str], Any],
    searched: Callable[[str], Any],
    load_model: Callable[[str], Any],
    rebuilt: Callable[..., Any],
    family: str,
) -> None:
    made, lm = chain(family), load_model(family)
    found = made.bench.run("evaluate", allocations=[searched(family).out], database=made.levels.out)
    text = made.bench.data["heldout"]
    ids = torch.from_numpy(cut(encode(text, made.bench.model.path), text)).long()
    database = Database(made.levels.out, made.bench.model)
    rows = {(row["candidate"], row["metric"]): row for row in found.rows["metrics"]}
    allocations = {allocation.candidate: allocation.levels for allocation in load_allocations(searched(family).out)}
    assert {candidate for candidate, _ in rows} == {"dense", *allocations}
    for candidate, levels in {"dense": {}, **allocations}.items():
        model = rebuilt(lm.model, {unit: database.level(unit, level).decode() for unit, level in levels.items()})
        for metric, value in plain_figures(lm, model, ids).items():
            row = rows[candidate, metric]
            tolerance = 1e-5 * (value if metric == "perplexity" else 1)
            assert row["value"] == pytest.approx(value, abs=tolerance)
            assert (row["data"], row["n_tokens"], row["status"]) == ("heldout", 96, "ok")
            assert row["stderr"] >= 0
    assert rows["dense", "kl"]["value"] == 0.0


def test_a_float32_model_has_the_figures_of_its_allocation_under_a_name_of_its_own(
    chain: Callable[[str], Any], searched: Callable[[str], Any]
) -> None:
    made, folders = chain("gpt2"), searched("gpt2")
    models = [
        made.bench.run("apply", {"pick": pick}, allocations=folders.out, database=made.levels.out).out
        for pick in ("bits=2.5", "bits=3.5")
    ]
    alone = made.bench.run("evaluate", models=models)
    beside = made.bench.run("evaluate", allocations=folders.out, database=made.levels.out, models=models[:1])
    by_levels = made.bench.run("evaluate", allocations=folders.out, database=made.levels.out)
    documents = [json.loads((result.out / "metrics.json").read_text()) for result in (alone, beside, by_levels)]
    candidates = [CompressedModel(model).document.about["allocation"]["candidate"] for model in models]
    named = [f"{candidate}@model" for candidate in candidates]
    assert [set(document) for document in documents] == [
        {"dense", *named},
        {"dense", *candidates, named[0]},
        {"dense", *candidates},
    ]
    by_model, both, by_level = documents
    assert both == by_level | {named[0]: by_model[named[0]]}
    for name, candidate in zip(named, candidates, strict=True):
        assert by_model[name] == by_level[candidate]


def test_the_mean_of_every_sequence_is_kept(chain: Callable[[str], Any], searched: Callable[[str], Any]) -> None:
    made = chain("llama")
    inputs = {"allocations": searched("llama").out, "database": made.levels.out}
    found = made.bench.run("evaluate", {"metrics": ["kl"], "batch_tokens": 32}, **inputs)
    for score in json.loads((found.out / "metrics.json").read_text()).values():
        assert set(score) == {"kl"}
        assert len(score["kl"]["sequences"]) == 6
        assert math.fsum(score["kl"]["sequences"]) / 6 == pytest.approx(score["kl"]["mean"], rel=1e-12)


def test_the_error_of_a_perplexity_follows_from_that_of_its_logarithm(
    chain: Callable[[str], Any], searched: Callable[[str], Any]
) -> None:
    made = chain("llama")
    inputs = {"allocations": searched("llama").out, "database": made.levels.out}
    found = made.bench.run("evaluate", {"metrics": ["perplexity"], "data": "calibration"}, **inputs)
    scores = json.loads((found.out / "metrics.json").read_text())
    for row in found.rows["metrics"]:
        measured = scores[row["candidate"]]["nll"]
        upper, lower = (math.exp(measured["mean"] + sign * 1e-4 * measured["stderr"]) for sign in (1, -1))
        assert row["stderr"] == pytest.approx((upper - lower) / 2e-4, rel=1e-6)
        assert (row["data"], row["n_tokens"]) == ("calibration", 192)


def test_a_perplexity_beyond_any_number_is_a_row_without_a_value(
    chain: Callable[[str], Any],
    new_bench: Callable[..., Any],
    searched: Callable[[str], Any],
    model_folder: Callable[[str], Path],
    edited_model: Callable[..., Path],
) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] *= 1e5  # logits of millions: finite, but hopeless

    bench = new_bench(edited_model(model_folder("llama"), edit))
    inputs = {"allocations": searched("llama").out, "database": chain("llama").levels.out}
    for row in bench.run("evaluate", **inputs).rows["metrics"]:
        assert (row["status"], row["value"] is None) == (
            ("nan", True) if row["metric"] == "perplexity" else ("ok", False)
        )


def test_nothing_to_evaluate_is_refused(chain: Callable[[str], Any], searched: Callable[[str], Any]) -> None:
    made = chain("llama")
    with pytest.raises(UsageError, match="nothing to evaluate"):
        made.bench.run("evaluate", database=made.levels.out)
    with pytest.raises(UsageError, match="allocations need the database"):
        made.bench.run("evaluate", allocations=searched("llama").out)


def test_a_dense_model_that_is_not_finite_is_an_error(
    chain: Callable[[str], Any],
    new_bench: Callable[..., Any],
    searched: Callable[[str], Any],
    model_folder: Callable[[str], Path],
    edited_model: Callable[..., Path],
) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][0] = math.nan

    bench = new_bench(edited_model(model_folder("llama"), edit))
    with pytest.raises(NotFinite, match=r"gives NaN or Inf on this text: model\.norm\.weight has 1 of \d+ values"):
        bench.run("evaluate", allocations=searched("llama").out, database=chain("llama").levels.out)
