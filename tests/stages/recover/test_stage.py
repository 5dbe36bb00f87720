"""`recover` over whole models: what it writes loads, is evaluated and exported, and holds what was promised."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerwise.errors import UsageError
from layerwise.stages.evaluate.model_levels import ModelLevels
from layerwise.stages.export.native import FILE, load
from layerwise.stages.levels.adapted import below
from layerwise.stages.models.causal_lm import CausalLM
from layerwise.stages.models.compressed import CompressedModel, source_of
from layerwise.stages.recover.params import RecoverParams, mistakes
from layerwise.stages.recover.stage import STAGE

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(5))
EORA = {"method": "eora", "rank": 2}


@pytest.fixture(scope="module")
def applied(in_turn: Callable[..., Any]) -> Callable[[str], Any]:
    """A family's model at dense, 3 bits and half pruned in turn, with a part dropped: bench, artifact, statistics."""
    found: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in found:
            made = in_turn(family, dropped=True)
            model = made.bench.run("apply", {"pick": made.allocation.candidate}, **made.inputs)
            params = {"statistics": ["hessian"], "targets": ["blocks", "head", "embedding"]}
            found[family] = made, model.out, made.bench.run("calibrate", params).out
        return found[family]

    return get


@pytest.mark.parametrize("family", ["llama", "gpt2", "granitemoe"])
def test_a_repaired_model_loads_and_is_nearer_to_the_dense_one_and_takes_its_stated_bytes(
    applied: Callable[[str], Any], load_model: Callable[[str], Any], family: str
) -> None:
    made, folder, statistics = applied(family)
    repaired = made.bench.run("recover", {"repairs": [EORA]}, model=folder, statistics=statistics)
    before, after = CompressedModel(folder), CompressedModel(repaired.out)
    assert after.document.about["repairs"] == ["eora-r2"]
    assert after.document.about["allocation"] == before.document.about["allocation"]
    weights = [entry.unit for entry in after.document.units if not entry.unit.is_parent]
    assert len(weights) > 3
    added = 0
    for unit in weights:
        assert torch.equal(below(after.level(unit.name)).decode(), before.level(unit.name).decode())
        added += 2 * 2 * sum(unit.shape)
    assert [entry.unit for entry in before.document.units] == [entry.unit for entry in after.document.units]
    assert any(entry.unit.is_parent for entry in after.document.units), "what is dropped stays dropped"

    dense = load_model(family).logits(IDS).log_softmax(-1)
    said = [
        CausalLM.load(source_of(one, made.bench.model)).logits(IDS).log_softmax(-1) for one in (folder, repaired.out)
    ]
    worse, better = (float((dense.exp() * (dense - one)).sum(-1).mean()) for one in said)
    assert 0 < better < worse

    scores = made.bench.run("evaluate", models=[folder, repaired.out])
    metrics = json.loads((scores.out / "metrics.json").read_text())
    candidate = made.allocation.candidate
    assert set(metrics) == {"dense", f"{candidate}@model", f"{candidate}@eora-r2"}
    assert metrics[f"{candidate}@eora-r2"]["kl"]["mean"] < metrics[f"{candidate}@model"]["kl"]["mean"]

    sizes = []
    for model in (folder, repaired.out):
        out = made.bench.run("export", {"format": "native"}, model=model).out
        sizes.append(sum(tensor.nbytes for tensor in load_file(out / FILE).values()))
    assert torch.equal(load(out).logits(IDS).log_softmax(-1), said[1])
    assert sizes[1] == sizes[0] + added
    told = {
        row["step"]: row["value"]
        for row in repaired.rows["recovery"]
        if row["unit"] is None and row["metric"] == "bytes"
    }
    assert told[1] == told[0] + added


def test_repairs_are_made_one_after_another_and_what_does_not_fit_one_is_told(applied: Callable[[str], Any]) -> None:
    made, folder, statistics = applied("llama")
    params = {"repairs": [EORA, {"method": "refit"}], "targets": ["blocks"]}
    repaired = made.bench.run("recover", params, model=folder, statistics=statistics)
    before, after = CompressedModel(folder), CompressedModel(repaired.out)
    assert after.document.about["repairs"] == ["eora-r2", "refit"]
    rows = repaired.rows["recovery"]
    for unit in before.levels:
        if unit.startswith("model.layers") and not before.recipe(unit)["encoding"].startswith(("keep", "drop")):
            errors = [row["value"] for row in rows if row["unit"] == unit and row["metric"] == "output_error"]
            assert len(errors) == 4
            assert errors[0] > errors[1] == errors[2] >= errors[3]
        else:
            assert after.levels[unit] == before.levels[unit]


def test_models_before_and_after_are_levels_of_one_model(applied: Callable[[str], Any]) -> None:
    made, folder, _ = applied("llama")
    svd = made.bench.run("recover", {"repairs": [{"method": "svd", "rank": 1}]}, model=folder)
    levels = ModelLevels([folder, svd.out])
    assert levels.model(made.bench.model) == made.bench.model


def test_a_repair_that_fits_nothing_is_refused_before_any_work(applied: Callable[[str], Any]) -> None:
    made, folder, statistics = applied("llama")
    bench = made.bench
    columns = [{"method": "rtn", "bits": 2, "group_size": 8, "group_along": "outputs"}]
    levels = bench.run("compress", {"menu": columns}).out
    chosen = bench.run("allocate", {"solver": "uniform", "budgets": {"bits": 2}}, database=levels).out
    along = bench.run("apply", {"pick": "smallest"}, allocations=chosen, database=levels).out
    with pytest.raises(UsageError, match=r"refit fits none of the \d+ levels: model\S+: its groups lie along outputs"):
        bench.run("recover", {"repairs": [EORA, {"method": "refit"}]}, model=along, statistics=statistics)
    turned = bench.run("transform", {"transforms": [{"method": "rotation"}]}).out
    with pytest.raises(UsageError, match="no unit of the model is compressed"):
        bench.run("recover", {"repairs": [{"method": "svd"}]}, model=turned)
    other = bench.run("calibrate", {"statistics": ["hessian"]}, model=turned).out
    with pytest.raises(UsageError, match="statistics are of another model"):
        bench.run("recover", {"repairs": [EORA]}, model=folder, statistics=other)


def test_statistics_that_are_missing_are_told_before_the_run() -> None:
    params = RecoverParams.model_validate({"repairs": [{"method": "svd"}, EORA]})
    assert params.needs_statistics == ["hessian"]
    assert list(mistakes(params, {})) == [
        (("repairs", 1, "method"), "eora needs hessian: add a `calibrate` stage to needs")
    ]
    assert STAGE.check is mistakes
