"""The `profile` stage: one unit changed at a time, against doing just that by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.errors import NotFinite
from layerwise.stages.data.text import cut, encode
from layerwise.stages.levels.database import Database


def profile_of(result: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((result.out / "profile.json").read_text())
    return document


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_kl_is_that_of_the_model_with_one_weight_replaced(
    chain: Callable[[str], Any], load_model: Callable[[str], Any], rebuilt: Callable[..., Any], family: str
) -> None:
    made, lm = chain(family), load_model(family)
    database, document = Database(made.levels.out, made.bench.model), profile_of(made.profile)
    text = made.bench.data["calibration"]
    ids = torch.from_numpy(cut(encode(text, made.bench.model.path), text)).long()
    reference = lm.logits(ids).double().log_softmax(-1)
    units = [unit for unit in lm.units if unit.block is not None]
    assert document["units"] == [unit.name for unit in units]
    for row in (0, len(units) // 2, len(units) - 1):
        for column in (1, 3):
            changed = rebuilt(lm.model, {units[row].name: database.weight(units[row].name, column)})
            with torch.no_grad():
                found = changed(input_ids=ids).logits.double().log_softmax(-1)
            expected = (reference.exp() * (reference - found)).sum(-1).mean().item()
            assert document["metrics"]["kl"][row][column] == pytest.approx(expected, abs=1e-5)


def test_every_unit_level_and_metric_has_a_row(chain: Callable[[str], Any]) -> None:
    made = chain("llama")
    rows, document = made.profile.rows["profile"], profile_of(made.profile)
    assert len(rows) == 21 * 4 * 3
    for row in rows:
        unit = document["units"].index(row["unit"])
        level = document["levels"][unit].index(row["level"])
        assert row["value"] == document["metrics"][row["metric"]][unit][level]
        assert row["status"] == "ok"
        if row["level"] == "dense":
            assert (level, row["value"], row["n_tokens"]) == (0, 0.0, None)
        else:
            measured = row["metric"] == "kl"
            assert (row["n_tokens"], row["stderr"] is None) == ((192, False) if measured else (None, True))
    assert document["evaluated_tokens"] == 21 * 3 * 192


def test_errors_of_the_database_are_taken_over(chain: Callable[[str], Any]) -> None:
    made = chain("llama")
    expected = {(row["unit"], row["level"]): row for row in made.levels.rows["levels"]}
    for row in made.profile.rows["profile"]:
        if row["metric"] != "kl":
            assert row["value"] == expected[row["unit"], row["level"]][row["metric"]]
            assert (row["value"] == 0) == (row["level"] == "dense")


def test_without_kl_no_model_is_loaded(chain: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = chain("llama")
    monkeypatch.delattr("layerwise.stages.models.causal_lm.CausalLM.load")
    found = made.bench.run("profile", {"metrics": ["weight_nmse"]}, database=made.levels.out)
    assert list(profile_of(found)["metrics"]) == ["weight_nmse"]
    assert profile_of(found)["evaluated_tokens"] == 0


def test_fewer_tokens_can_be_asked_for(chain: Callable[[str], Any]) -> None:
    made = chain("gpt2")
    found = made.bench.run("profile", {"metrics": ["kl"], "tokens": 32}, database=made.levels.out)
    assert {row["n_tokens"] for row in found.rows["profile"] if row["level"] != "dense"} == {32}


def test_levels_that_could_not_be_made_have_a_row_that_says_so(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path], edited_model: Callable[..., Path]
) -> None:
    sound = new_bench(model_folder("gpt2"))
    stats = sound.run("calibrate")

    def edit(tensors: dict[str, Any]) -> None:  # after calibration, so that only these two units are lost
        tensors["transformer.h.0.mlp.c_fc.weight"][0, 0] = math.nan
        tensors["transformer.h.2.mlp.c_proj.weight"][0, 0] = math.inf

    broken = new_bench(edited_model(model_folder("gpt2"), edit))
    levels = broken.run(
        "compress", {"menu": [{"method": "rtn", "bits": [3, 4], "group_size": 16}]}, statistics=stats.out
    )
    found = sound.run("profile", database=levels.out)
    lost = [row for row in found.rows["profile"] if row["status"] == "nan"]
    assert {row["unit"] for row in lost} == {"transformer.h.0.mlp.c_fc", "transformer.h.2.mlp.c_proj"}
    made = [row for row in lost if row["level"] != "dense"]
    assert len(made) == 2 * 2 * 3
    assert all(row["value"] is None for row in lost)
    with pytest.raises(NotFinite, match="the dense model gives NaN or Inf on this text"):
        broken.run("profile", database=levels.out)


def test_a_broken_embedding_is_an_error_of_the_dense_model(
    chain: Callable[[str], Any],
    new_bench: Callable[..., Any],
    model_folder: Callable[[str], Path],
    edited_model: Callable[..., Path],
) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"][:] = math.nan

    bench = new_bench(edited_model(model_folder("llama"), edit))
    with pytest.raises(NotFinite, match=r"gives NaN or Inf on this text: model\.embed_tokens\.weight has") as caught:
        bench.run("profile", {"metrics": ["kl"]}, database=chain("llama").levels.out)
    assert caught.value.hint is not None


def test_what_was_lost_before_is_taken_off(
    chain: Callable[[str], Any], load_model: Callable[[str], Any], rebuilt: Callable[..., Any]
) -> None:
    """Levels of a pruned model: each one's own harm is what it adds to the pruning's, against the dense model."""
    bench, lm = chain("llama").bench, load_model("llama")
    pruned = bench.run("compress", {"menu": [{"method": "magnitude", "sparsity": 0.4}]})
    allocated = bench.run("allocate", {"solver": "uniform", "budgets": {"parameters": "0%"}}, database=pruned.out)
    applied = bench.run("apply", {"pick": "best"}, allocations=allocated.out, database=pruned.out)
    menu = [{"method": "rtn", "bits": 2, "group_size": 16}, {"method": "drop", "units": ["mlp"]}, {"method": "dense"}]
    levels = bench.run("compress", {"menu": menu}, model=applied.out)
    document = profile_of(bench.run("profile", {"metrics": ["kl"]}, database=levels.out))

    text = bench.data["calibration"]
    ids = torch.from_numpy(cut(encode(text, bench.model.path), text)).long()
    reference = lm.logits(ids).double().log_softmax(-1)
    database = Database(levels.out, bench.model)
    kept = {
        unit.name: weight * (weight.abs() > weight.abs().flatten().kthvalue(round(0.4 * weight.numel())).values)
        for unit in lm.units
        if unit.block is not None
        for weight in [lm.weight(unit)]
    }

    def harm(weights: dict[str, Any], dropped: list[str]) -> float:
        with torch.no_grad():
            found = rebuilt(lm.model, weights, dropped)(input_ids=ids).logits.double().log_softmax(-1)
        value: float = (reference.exp() * (reference - found)).sum(-1).mean().item()
        return value

    before = harm(kept, [])
    assert before > 0.01
    for row, name in enumerate(document["units"]):
        assert document["metrics"]["kl"][row][0] == 0.0
        if name.startswith("model.layers.1."):
            parent = name.endswith("mlp")
            alone = harm(kept, [name]) if parent else harm(kept | {name: database.weight(name, 1)}, [])
            assert document["metrics"]["kl"][row][1] == pytest.approx(alone - before, abs=1e-5)
