"""The `calibrate` stage: shards, what it tells of the units, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from layerwise.errors import UnsupportedModel
from layerwise.stages.calibrate.stage import CalibrateParams
from layerwise.stages.calibrate.statistics import Statistics


def test_every_unit_gets_a_row_and_a_hessian(chain: Callable[[str], Any], load_model: Callable[[str], Any]) -> None:
    made, lm = chain("gpt2"), load_model("gpt2")
    rows = made.stats.rows["units"]
    for row, unit in zip(rows, lm.units, strict=True):
        assert (row["unit"], row["kind"], row["block"]) == (unit.name, unit.kind, unit.block)
        assert (tuple(row["shape"]), row["n_weights"], row["group"]) == (unit.shape, unit.n_weights, unit.group)
    statistics = Statistics(made.stats.out)
    for described, unit in zip(statistics.units, lm.units, strict=True):
        H = statistics.hessian(described)
        assert H.shape == (unit.shape[1],) * 2
        assert torch.equal(H, H.T)
        assert (torch.linalg.eigvalsh(H.double()) > -1e-3 * H.diagonal().mean()).all()


def test_what_is_no_unit_is_counted_in_bytes(
    chain: Callable[[str], Any],
    new_bench: Callable[..., Any],
    load_model: Callable[[str], Any],
    model_folder: Callable[[str], Path],
) -> None:
    tied = new_bench(model_folder("qwen3")).run("calibrate", {"targets": ["mlp.down_proj"]})
    cases = {"llama": (chain("llama").stats, None), "qwen3": (tied, "mlp.down_proj")}
    for family, (stats, kind) in cases.items():
        index = json.loads((stats.out / "units.json").read_text())
        stored = load_file(model_folder(family) / "model.safetensors").values()
        units = sum(unit.n_weights for unit in load_model(family).units if kind in (None, unit.kind))
        assert index["rest_bytes"] == 4 * (sum(tensor.numel() for tensor in stored) - units)
        assert index["n_tokens"] == 12 * 16


@pytest.mark.parametrize("shards", [1, 3, 20])
def test_any_number_of_shards_sums_to_the_same(
    chain: Callable[[str], Any],
    new_bench: Callable[..., Any],
    model_folder: Callable[[str], Path],
    shards: int,
) -> None:
    expected, bench = Statistics(chain("llama").stats.out), new_bench(model_folder("llama"))
    found = Statistics(bench.run("calibrate", {"shards": shards, "batch_size": 5}).out)
    assert found.index["n_tokens"] == expected.index["n_tokens"]
    for unit in expected.units:
        H = expected.hessian(unit)
        torch.testing.assert_close(found.hessian(unit), H, rtol=1e-5, atol=1e-5 * H.abs().max().item())


def test_the_same_stage_gives_the_same_bytes(
    chain: Callable[[str], Any], new_bench: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    first, second = chain("llama").stats.out, new_bench(model_folder("llama")).run("calibrate").out
    files = sorted(file.name for file in first.iterdir())
    assert files == sorted(file.name for file in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def test_only_the_targets_are_calibrated(new_bench: Callable[..., Any], model_folder: Callable[[str], Path]) -> None:
    bench = new_bench(model_folder("llama"))
    made = bench.run("calibrate", {"targets": ["mlp.down_proj", "re:.*q_proj"], "ignore": ["re:.*layers\\.0\\."]})
    assert [row["unit"] for row in made.rows["units"]] == [
        f"model.layers.{block}.{kind}" for block in (1, 2) for kind in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert sorted(file.name for file in made.out.iterdir()) == [
        "block-1.safetensors", "block-2.safetensors", "units.json",
    ]  # fmt: skip
    with pytest.raises(UnsupportedModel, match="no unit is left"):
        bench.run("calibrate", {"targets": ["down_proj"]})


def test_a_pattern_that_is_none_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValidationError, match=r"'re:\[' is no regular expression"):
        CalibrateParams.model_validate({"targets": ["re:["]})
    with pytest.raises(ValidationError, match="targetz"):
        CalibrateParams.model_validate({"targetz": []})


def test_the_display_is_told_of_the_shards(chain: Callable[[str], Any]) -> None:
    assert [step for step in chain("llama").stats.progress if step[2] == "shards"] == [
        (0, 2, "shards"), (1, 2, "shards"), (2, 2, "shards"),
    ]  # fmt: skip
