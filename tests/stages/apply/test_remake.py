"""Levels made again behind the compressed prefix, against a loop over a copy of the model with hooks of torch's."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from layerwise.errors import DataError
from layerwise.stages.apply.packed import read_packed
from layerwise.stages.apply.remade import set_aside
from layerwise.stages.apply.remake import Given, _made, _Pair
from layerwise.stages.apply.stage import ApplyParams
from layerwise.stages.compress.gptq import Params as GptqParams
from layerwise.stages.compress.gptq import quantized
from layerwise.stages.contract import TextSource
from layerwise.stages.levels.database import Database
from layerwise.stages.levels.level import Level
from layerwise.stages.models.causal_lm import CausalLM
from layerwise.stages.models.compressed import CompressedModel

STEPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
SHARE = 0.5


@pytest.fixture(scope="module")
def applied(chain: Callable[[str], Any]) -> Callable[..., Any]:
    """A family's allocation at 3 bits as a model, with levels made again unless told otherwise; made once."""
    made: dict[Any, Any] = {}

    def get(family: str, **params: Any) -> Any:
        key = family, *sorted(params.items())
        if key not in made:
            found = chain(family)
            if family not in made:
                made[family] = found.allocate({"solver": "ilp", "budgets": {"bits": 3.0}})
            inputs = {"allocations": made[family].out, "database": found.levels.out}
            made[key] = found.bench.run("apply", {"pick": "best", "remake": True} | params, **inputs)
        return made[key]

    return get


def remade_of(result: Any) -> dict[str, Any]:
    about: dict[str, Any] = CompressedModel(result.out).document.about["remade"]
    return about


def tokens_of(bench: Any) -> Tensor:
    from layerwise.stages.data.text import cut, encode

    source = bench.data["calibration"]
    return torch.from_numpy(cut(encode(source, bench.model.path), source)).long()


def rows_in(lm: Any, block: int, hidden: Tensor, ids: Tensor, name: str) -> Tensor:
    """(tokens, in), the inputs of a layer while its block runs."""
    rows: list[Tensor] = []
    handle = lm.module(name).register_forward_pre_hook(lambda module, args: rows.append(args[0].flatten(0, -2)))
    lm.run_block(block, hidden, lm.begin(ids))
    handle.remove()
    return torch.cat(rows).double()


def target_of(W: Tensor, X: Tensor, X_hat: Tensor) -> Tensor:
    """Least squares in float64, towards half of the way from what the weight makes of X̂ to what it makes of X."""
    lam = 0.01 * (X_hat * X_hat).sum(0).mean()
    rows = torch.cat([X_hat, lam.sqrt() * torch.eye(X.shape[1], dtype=torch.float64)])
    wanted = torch.cat([(SHARE * X + (1 - SHARE) * X_hat) @ W.double().T, lam.sqrt() * W.double().T])
    return torch.from_numpy(np.linalg.lstsq(rows.numpy(), wanted.numpy(), rcond=None)[0].T)


def test_every_level_is_the_one_that_a_plain_loop_makes(
    chain: Callable[[str], Any], applied: Callable[..., Any]
) -> None:
    made, result = chain("llama"), applied("llama")
    artifact, database = CompressedModel(result.out), Database(made.levels.out, made.bench.model)
    document, ids = artifact.document.about, tokens_of(made.bench)
    aside = torch.tensor(set_aside(len(ids)))
    dense_lm = CausalLM.load(made.bench.model)
    lm = CausalLM(copy.deepcopy(dense_lm.model))
    dense = prefix = lm.begin(ids).hidden
    compared, differing = 0, 0
    for block, said in enumerate(document["remade"]["blocks"]):
        units = {unit.name: unit for unit in lm.units if unit.block == block}
        chosen = {name: database.level(name, document["allocation"]["levels"][name]) for name in units}
        for name, unit in units.items():
            lm.overwrite(unit, chosen[name].decode())
        as_it_was = lm.run_block(block, prefix, lm.begin(ids))
        levels = dict(chosen)
        for step in STEPS:
            names = [name for leaf in step for name in units if name.endswith(f".{leaf}")]
            here = ~aside
            X = rows_in(dense_lm, block, dense[here], ids[here], names[0])
            X_hat = rows_in(lm, block, prefix[here], ids[here], names[0])
            for name in names:
                if chosen[name].recipe["method"] != "gptq" or torch.equal(X, X_hat):
                    assert name in said["kept"]
                    continue
                T = target_of(dense_lm.weight(units[name]), X, X_hat)
                params = GptqParams(bits=chosen[name].recipe["bits"], group_size=16)
                (levels[name],) = quantized(T, X_hat.T @ X_hat, params)
                assert name in said["remade"]
            for name in names:
                lm.overwrite(units[name], levels[name].decode())
        expected = dense_lm.run_block(block, dense, dense_lm.begin(ids))
        found = lm.run_block(block, prefix, lm.begin(ids))
        errors = [
            float((answer - expected)[aside].square().sum() / expected[aside].square().sum())
            for answer in (as_it_was, found)
        ]
        assert said["better"] is (said["after"] < said["before"])
        assert [said["before"], said["after"]] == pytest.approx(errors, rel=2e-2)  # a code or two may differ
        for name, unit in units.items():
            expected_level = levels[name] if said["better"] and name in said["remade"] else chosen[name]
            if document["remade"]["written"]:
                compared += unit.n_weights
                differing += int((artifact.level(name).decode() != expected_level.decode()).sum())
            lm.overwrite(unit, expected_level.decode())
        dense, prefix = expected, lm.run_block(block, prefix, lm.begin(ids))
    assert compared, "the model with levels made again was written"
    assert differing <= 0.005 * compared  # sums of float32 in another order turn a code now and then


def test_with_nothing_compressed_before_it_a_level_comes_out_as_it_was(
    chain: Callable[[str], Any], load_model: Callable[[str], Any]
) -> None:
    made = chain("llama")
    bench = made.bench
    stats = bench.run("calibrate", {"shards": 1, "statistics": ["hessian"]})
    entry = {"method": "gptq", "bits": [2, 3], "group_size": 16}
    database = Database(bench.run("compress", {"menu": [entry]}, statistics=stats.out).out, bench.model)
    lm, ids = load_model("llama"), tokens_of(bench)
    hidden = lm.begin(ids).hidden
    units = [unit for unit in lm.units if unit.block == 0]
    pair = _Pair(lm, 0, units, ids, hidden, hidden, ())
    for unit in units:
        level = database.level(unit.name, "gptq-3b-g16")
        given = Given(unit, lm.weight(unit), level, GptqParams.model_validate(entry).again(level.name))
        inputs = pair.inputs({}, unit, torch.ones(len(ids), dtype=torch.bool))
        assert not inputs.changed
        assert isinstance(_made(given, inputs, SHARE), str), "it is kept"
        forced = _made(given, replace(inputs, changed=True), SHARE)
        assert isinstance(forced, Level)
        assert forced.name == level.name
        assert {name: tensor.tolist() for name, tensor in forced.tensors.items()} == {
            name: tensor.tolist() for name, tensor in level.tensors.items()
        }


@pytest.mark.parametrize("any_family", ["llama", "gpt2", "mixtral"], indirect=True)
def test_it_takes_the_same_bytes_and_the_better_model_is_written(
    applied: Callable[..., Any], chain: Callable[[str], Any], any_family: str
) -> None:
    plain, result = applied(any_family, remake=False), applied(any_family)
    models = CompressedModel(plain.out), CompressedModel(result.out)
    assert models[0].levels == models[1].levels
    for unit in models[0].levels:
        first, second = (model.level(unit) for model in models)
        assert first.size_bytes == second.size_bytes
        assert {n: (t.dtype, t.shape) for n, t in first.tensors.items()} == {
            n: (t.dtype, t.shape) for n, t in second.tensors.items()
        }
    remade = remade_of(result)
    assert remade["text"] == "calibration (sequences set aside)"
    assert remade["written"] is (remade["kl_after"] < remade["kl_before"])
    assert remade["written"] is (any_family == "llama"), "both ways are seen; the other models are worth too few tokens"
    rows = {row["candidate"]: row["value"] for row in result.rows["metrics"]}
    candidate = models[1].document.about["allocation"]["candidate"]
    assert rows == {candidate: remade["kl_before"], f"{candidate}@remade": remade["kl_after"]}
    wrote = "the levels made again" if remade["written"] else "the levels as they were"
    assert f"wrote {wrote}" in result.progress[-1][2]
    changed = [unit for unit in models[0].levels if not torch.equal(*(model.level(unit).decode() for model in models))]
    assert set(changed) <= {name for block in remade["blocks"] if block["better"] for name in block["remade"]}
    assert len(changed) > 3 if remade["written"] else not changed


def test_with_steps_levels_are_made_of_what_their_weights_have_become(applied: Callable[..., Any]) -> None:
    plain, moved = applied("llama"), applied("llama", steps=10)
    first, second = (remade_of(result)["blocks"][0] for result in (plain, moved))
    assert first["remade"] == second["remade"], (
        "the same units, those whose inputs are the dense model's not among them"
    )
    assert first["before"] == second["before"]
    assert first["after"] != second["after"]


def test_both_losses_are_those_of_the_models(applied: Callable[..., Any], chain: Callable[[str], Any]) -> None:
    bench = chain("llama").bench
    lm, ids = CausalLM.load(bench.model), tokens_of(bench)
    ids = ids[torch.tensor(set_aside(len(ids)))]
    expected = lm.logits(ids).double().log_softmax(-1)
    found = []
    for result in (applied("llama", remake=False), applied("llama")):
        other = CausalLM.load(bench.model)
        CompressedModel(result.out).install(other)
        log_q = other.logits(ids).double().log_softmax(-1)
        found.append(float((expected.exp() * (expected - log_q)).sum(-1).mean()))
    remade = remade_of(applied("llama"))
    assert [remade["kl_before"], remade["kl_after"]] == pytest.approx(found, rel=1e-3, abs=1e-6)


def test_what_cannot_be_made_again_stays_and_says_why(in_turn: Callable[..., Any]) -> None:
    made = in_turn("llama", dropped=True)  # nearest, pruned and dropped parts, embedding and head among them
    results = [
        made.bench.run("apply", {"pick": made.allocation.candidate} | more, **made.inputs)
        for more in ({}, {"remake": True})
    ]
    remade = remade_of(results[1])
    assert remade["written"] is False
    assert [block["remade"] for block in remade["blocks"]] == [[], [], []]
    reasons = {why for block in remade["blocks"] for why in block["kept"].values()}
    assert reasons == {"its method makes no level from a Hessian alone"}
    assert "wrote the levels as they were" in results[1].progress[-1][2]
    files = [sorted(result.out.glob("units/*")) for result in results]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_experts_get_the_inputs_of_the_prefix(applied: Callable[..., Any]) -> None:
    made = {name for block in remade_of(applied("mixtral"))["blocks"] for name in block["remade"]}
    assert any(".experts." in name for name in made)


def test_the_packed_form_is_of_the_levels_made_again(applied: Callable[..., Any]) -> None:
    result = applied("llama", packed=True)
    model, packed = CompressedModel(result.out), read_packed(result.out)
    assert remade_of(result)["written"]
    for unit, weight in packed.items():
        assert torch.equal(weight.dense(), model.level(unit).decode()), unit


def test_an_interrupted_stage_goes_on_to_the_same_bytes(
    chain: Callable[[str], Any], applied: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, whole = chain("llama"), applied("llama")
    inputs = {
        "allocations": made.allocate({"solver": "ilp", "budgets": {"bits": 3.0}}).out,
        "database": made.levels.out,
    }
    worked_on: list[int] = []
    from layerwise.stages.apply import remake as module

    real = module.remake_block

    def interrupted(network: Any, index: int, *rest: Any) -> Any:
        worked_on.append(index)
        if worked_on == [0, 1, 2]:
            raise KeyboardInterrupt
        return real(network, index, *rest)

    monkeypatch.setattr(module, "remake_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.bench.run("apply", {"pick": "best", "remake": True}, **inputs)
    result = made.bench.run("apply", {"pick": "best", "remake": True}, again=True, **inputs)
    assert worked_on == [0, 1, 2, 2], "finished blocks are not made again"
    for file in sorted(whole.out.glob("units/*")):
        assert file.read_bytes() == (result.out / "units" / file.name).read_bytes()
    assert json.loads((whole.out / "model.json").read_text()) == json.loads((result.out / "model.json").read_text())


def test_another_text_can_judge(applied: Callable[..., Any]) -> None:
    remade = remade_of(applied("llama", judge="heldout"))
    assert remade["text"] == "heldout"
    assert remade["kl_before"] != remade_of(applied("llama"))["kl_before"]


def test_one_sequence_is_too_few(chain: Callable[[str], Any], new_bench: Callable[..., Any]) -> None:
    made = chain("llama")
    text = made.bench.data["calibration"]
    one = {"calibration": TextSource("calibration", text.paths, text.sequence_length, text.sequence_length)}
    bench = new_bench(made.bench.model.path, data=one)
    allocations = made.allocate({"solver": "ilp", "budgets": {"bits": 3.0}}).out
    with pytest.raises(DataError, match=r"data\.calibration: 1 sequence .* must be set aside"):
        bench.run("apply", {"pick": "best", "remake": True}, allocations=allocations, database=made.levels.out)


def test_every_eighth_sequence_is_set_aside() -> None:
    assert [sum(set_aside(n)) for n in (1, 2, 7, 8, 15, 16, 64)] == [0, 1, 1, 1, 1, 2, 8]
    assert not any(set_aside(16)[:7])


def test_parameters_of_what_is_not_asked_for_are_refused_and_change_no_key() -> None:
    assert ApplyParams.model_validate({}).material() == {"pick": "knee"}
    assert ApplyParams.model_validate({"remake": True}).data == "calibration"
    for more in ({"data": "calibration"}, {"judge": "heldout"}, {"tokens": 5}, {"residual": 1}, {"steps": 1}):
        with pytest.raises(ValidationError, match="add remake: true"):
            ApplyParams.model_validate(more)
    with pytest.raises(ValidationError, match="judge is the text"):
        ApplyParams.model_validate({"remake": True, "judge": "calibration"})
