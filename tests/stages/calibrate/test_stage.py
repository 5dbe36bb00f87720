"""The `calibrate` stage: shards, what it gathers and tells of the units, how it is read again, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from layerwise.errors import UnsupportedModel, UsageError
from layerwise.stages import find_stage
from layerwise.stages.calibrate import collect as collect_module
from layerwise.stages.calibrate.stage import CalibrateParams
from layerwise.stages.calibrate.statistics import Statistics
from layerwise.stages.compress.params import CompressParams
from layerwise.stages.contract import ModelSource
from layerwise.stages.models.survey import take_survey

ALL = {"targets": ["blocks", "head", "embedding"], "statistics": ["hessian", "channels", "fisher"]}


def test_every_weight_gets_a_row_and_every_selected_unit_a_hessian(
    chain: Callable[[str], Any], load_model: Callable[[str], Any]
) -> None:
    made, lm = chain("gpt2"), load_model("gpt2")
    rows = {row["unit"]: row for row in made.stats.rows["units"]}
    assert list(rows) == [*(unit.name for unit in lm.units), "transformer.wpe.weight"]
    for unit in lm.units:
        row = rows[unit.name]
        assert (row["kind"], row["role"], row["block"], row["parent"]) == (
            unit.kind,
            unit.role,
            unit.block,
            unit.parent,
        )
        assert (tuple(row["shape"]), row["n_weights"], row["group"]) == (unit.shape, unit.n_weights, unit.group)
        assert row["status"] == ("ok" if unit.block is not None else "not selected")
    positions = rows["transformer.wpe.weight"]
    assert (positions["status"], positions["n_weights"], positions["block"]) == ("no unit", 64 * 32, None)
    assert "outside of the blocks" in positions["error"]
    statistics = Statistics(made.stats.out)
    assert statistics.survey == take_survey(lm, ModelSource(made.bench.model.path))
    assert statistics.index["n_tokens"] == 12 * 16
    for unit in lm.units:
        if unit.block is None:
            continue
        H = statistics.tensor(unit, "hessian")
        assert H.shape == (unit.shape[1],) * 2
        assert torch.equal(H, H.T)
        assert (torch.linalg.eigvalsh(H.double()) > -1e-3 * H.diagonal().mean()).all()


@pytest.fixture
def calibrated(new_bench: Callable[..., Any], model_folder: Callable[[str], Path]) -> Callable[..., Statistics]:
    def get(family: str, **params: Any) -> Statistics:
        return Statistics(new_bench(model_folder(family)).run("calibrate", params).out)

    return get


@pytest.mark.parametrize("family", ["llama", "qwen3moe"])
def test_any_number_of_shards_comes_to_the_same(
    calibrated: Callable[..., Statistics], load_model: Callable[[str], Any], family: str
) -> None:
    whole = calibrated(family, shards=1, **ALL)
    for shards in (3, 20):  # twelve sequences: some shards are empty, and some experts see nothing of a shard
        found = calibrated(family, shards=shards, batch_size=5, **ALL)
        assert found.index["n_tokens"] == whole.index["n_tokens"] == 12 * 16
        assert found.counts == whole.counts
        for unit in load_model(family).units:
            for name in ALL["statistics"]:
                expected = whole.tensor(unit, name)
                tolerance = 1e-5 * expected.abs().max().item()
                torch.testing.assert_close(found.tensor(unit, name), expected, rtol=1e-4, atol=tolerance)


def test_a_unit_that_is_looked_up_has_neutral_statistics(
    calibrated: Callable[..., Statistics], load_model: Callable[[str], Any]
) -> None:
    statistics = calibrated("llama", **ALL)
    (embedding,) = [unit for unit in load_model("llama").units if unit.role == "embedding"]
    assert torch.equal(statistics.tensor(embedding, "hessian"), 12 * 16 * torch.eye(32))
    channels = statistics.tensor(embedding, "channels")
    assert torch.equal(channels[[0, 1, 3]], torch.full((3, 32), 12.0 * 16))
    assert torch.equal(channels[2], torch.ones(32))
    assert statistics.tensor(embedding, "fisher").max() > 0, "gradients reach it like any other"
    assert embedding.name not in statistics.counts


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_tied_head_is_calibrated_where_it_multiplies(
    calibrated: Callable[..., Statistics], load_model: Callable[[str], Any], family: str
) -> None:
    lm = load_model(family)
    statistics = calibrated(family, targets=["head"])
    (head,) = [unit for unit in lm.units if unit.role == "head"]
    assert statistics.selected == [head.name]
    assert statistics.counts == {head.name: 12 * 16}
    assert [path.name for path in (statistics.folder / "hessian").iterdir()] == ["part-4.safetensors"]
    H = statistics.tensor(head, "hessian")
    assert H.shape == (32, 32)
    assert H.diagonal().min() > 0


def test_what_the_menus_need_is_gathered_unless_the_workflow_says_what() -> None:
    fill = find_stage("calibrate").fill
    assert fill is not None
    gptq, rtn, block = (
        CompressParams.model_validate({"menu": [{"method": method, "bits": 4}]})
        for method in ("gptq", "rtn", "gptq_sequential")
    )
    both = ["hessian", "block_inputs"]
    for behind, expected in (((), []), ((rtn,), []), ((gptq,), ["hessian"]), ((block, rtn, gptq), both)):
        assert fill(CalibrateParams(), behind).statistics == expected
    told = CalibrateParams(statistics=["fisher", "hessian", "fisher"])
    assert told.statistics == ["hessian", "fisher"], "each once, in the order of the table"
    assert fill(told, [block]) is told
    assert [module.rpartition(".")[2] for module in told.sources()] == ["hessian", "fisher"]


def test_only_what_is_needed_is_gathered(
    calibrated: Callable[..., Statistics], load_model: Callable[[str], Any]
) -> None:
    unit = load_model("llama").units[1]
    statistics = calibrated("llama", statistics=["channels"], targets=["q_proj"])
    assert {path.name for path in statistics.folder.iterdir()} == {"statistics.json", "channels"}
    assert statistics.gathered == ("channels",)
    with pytest.raises(UsageError, match="the statistics have no hessian, only channels") as caught:
        statistics.tensor(unit, "hessian")
    assert "add hessian to `statistics`" in (caught.value.hint or "")
    other = next(unit for unit in load_model("llama").units if unit.kind == "mlp.up_proj")
    with pytest.raises(UsageError, match=f"unit {re.escape(other.name)} was not calibrated"):
        statistics.tensor(other, "channels")
    with pytest.raises(UsageError, match="the statistics have no block_inputs, only channels"):
        statistics.hidden(0)
    nothing = calibrated("llama", statistics=[])
    with pytest.raises(UsageError, match="the statistics have no hessian, only none"):
        nothing.tensor(unit, "hessian")


def test_hidden_states_come_back_in_the_order_of_the_text(calibrated: Callable[..., Statistics]) -> None:
    one, many = (calibrated("gemma2", shards=shards, statistics=["block_inputs"]) for shards in (1, 11))
    for position in range(4):
        ids, hidden = many.hidden(position)
        expected_ids, expected = one.hidden(position)
        assert torch.equal(ids, expected_ids)
        assert ids.shape == (12, 16)
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)


def test_an_interrupted_stage_goes_on_where_it_was(
    new_bench: Callable[..., Any], model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"shards": 3, "statistics": ["hessian", "block_inputs"]}
    expected = new_bench(model_folder("mixtral")).run("calibrate", params).out
    bench, plain, ran = new_bench(model_folder("mixtral")), collect_module.collect, []

    def dies(network: Any, units: Any, sequences: Any, folder: Path, *, shard: int, **rest: Any) -> Any:
        ran.append(shard)
        if ran == [0, 1]:
            raise KeyboardInterrupt
        return plain(network, units, sequences, folder, shard=shard, **rest)

    monkeypatch.setattr(collect_module, "collect", dies)
    with pytest.raises(KeyboardInterrupt):
        bench.run("calibrate", params)
    found = bench.run("calibrate", params, again=True).out
    assert ran == [0, 1, 1, 2]
    files = sorted(path.relative_to(expected) for path in expected.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(found) for path in found.rglob("*") if path.is_file())
    assert all((expected / name).read_bytes() == (found / name).read_bytes() for name in files)


def test_only_the_targets_are_calibrated(new_bench: Callable[..., Any], model_folder: Callable[[str], Path]) -> None:
    bench = new_bench(model_folder("llama"))
    made = bench.run("calibrate", {"targets": ["down_proj", "re:.*q_proj"], "ignore": ["re:.*layers\\.0\\."]})
    expected = [f"model.layers.{block}.{kind}" for block in (1, 2) for kind in ("self_attn.q_proj", "mlp.down_proj")]
    assert Statistics(made.out).selected == expected
    assert [row["unit"] for row in made.rows["units"] if row["status"] == "ok"] == expected
    assert len(made.rows["units"]) == 23, "the others are told of, too"
    assert sorted(str(file.relative_to(made.out)) for file in made.out.rglob("*") if file.is_file()) == [
        "hessian/part-2.safetensors", "hessian/part-3.safetensors", "statistics.json",
    ]  # fmt: skip
    with pytest.raises(UnsupportedModel, match="targets: 'downproj' names no unit"):
        bench.run("calibrate", {"targets": ["downproj"]})


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"targets": ["re:["]}, r"'re:\[' is no regular expression"),
        ({"ignore": ["re:("]}, r"'re:\(' is no regular expression"),
        ({"targetz": []}, "targetz"),
        ({"statistics": ["hesian"]}, r"unknown statistic 'hesian' \(did you mean 'hessian'\?\)"),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(params: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        CalibrateParams.model_validate(params)


def test_the_display_is_told_of_the_shards(chain: Callable[[str], Any]) -> None:
    assert [step for step in chain("llama").stats.progress if step[2] == "shards"] == [
        (0, 2, "shards"), (1, 2, "shards"), (2, 2, "shards"),
    ]  # fmt: skip
