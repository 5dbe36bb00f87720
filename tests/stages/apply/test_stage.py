"""The `apply` stage: levels stay encoded as they were made, and the model is the one that was chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerwise.errors import UsageError
from layerwise.stages.allocate.allocation import load_allocations
from layerwise.stages.evaluate.model_levels import ModelLevels
from layerwise.stages.levels.database import Database
from layerwise.stages.models.causal_lm import CausalLM
from layerwise.stages.models.compressed import CompressedModel, source_of

IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def searched(chain: Callable[[str], Any]) -> Callable[[str], Any]:
    """Allocations of a family at three budgets."""
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            made[family] = chain(family).allocate({"solver": "ilp", "budgets": {"bits": [2.4, 3.0, 3.6]}})
        return made[family]

    return get


@pytest.fixture
def apply(chain: Callable[[str], Any], searched: Callable[[str], Any]) -> Callable[..., Any]:
    def run(family: str, pick: str = "knee") -> Any:
        made = chain(family)
        inputs = {"allocations": searched(family).out, "database": made.levels.out}
        return made.bench.run("apply", {"pick": pick}, **inputs)

    return run


def tensors_of(folder: Path, unit: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "units" / f"{unit}.safetensors")


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("any_family", ["llama", "gpt2", "qwen3", "mixtral", "granitemoe", "bloom"], indirect=True)
def test_a_model_keeps_its_levels_encoded_and_takes_the_bytes_that_were_predicted(
    in_turn: Callable[..., Any], model_folder: Callable[[str], Path], any_family: str, dropped: bool
) -> None:
    made = in_turn(any_family, dropped=dropped)
    artifact = made.bench.run("apply", {"pick": made.allocation.candidate}, **made.inputs)
    document = json.loads((artifact.out / "model.json").read_text())
    assert document["about"]["allocation"]["candidate"] == made.allocation.candidate
    held = {entry["unit"]["name"]: entry["level"] for entry in document["units"]}
    changed = {unit: level for unit, level in made.allocation.levels.items() if level not in ("dense", "keep")}
    assert held == changed
    assert {file.name for file in (artifact.out / "units").iterdir()} == {f"{unit}.safetensors" for unit in held}
    stored = load_file(model_folder(any_family) / "model.safetensors")
    size = sum(tensor.nbytes for name, tensor in stored.items() if not made.is_dropped(name))
    for unit, level in held.items():
        written, offered = tensors_of(artifact.out, unit), tensors_of(made.levels.out, unit)
        assert set(written) == {name for name in offered if name.startswith(f"{level}/")}
        for name, tensor in written.items():
            assert tensor.dtype == offered[name].dtype
            assert torch.equal(tensor, offered[name])
        if level != "drop":
            rows, columns = made.shapes[unit]
            size += sum(tensor.nbytes for tensor in written.values()) - 4 * rows * columns  # float32 before
    assert made.allocation.sizes["bytes"] == size


@pytest.mark.parametrize(
    "any_family", ["llama", "gpt2", "opt", "mixtral", "granitemoe", "gptj", "bloom"], indirect=True
)
def test_a_model_that_is_loaded_says_what_the_allocation_says_and_one_rebuilt_by_hand(
    in_turn: Callable[..., Any],
    load_model: Callable[[str], Any],
    rebuilt: Callable[..., Any],
    any_family: str,
) -> None:
    made = in_turn(any_family, dropped=True)
    artifact = made.bench.run("apply", {"pick": made.allocation.candidate}, **made.inputs)
    lm, database = load_model(any_family), Database(made.levels.out, made.bench.model)
    gone = [unit for unit, level in made.allocation.levels.items() if level == "drop"]
    weights = {
        unit: database.level(unit, level).decode()
        for unit, level in made.allocation.levels.items()
        if level not in ("drop", "keep", "dense")
    }
    assert gone
    assert len(weights) > 3
    with torch.no_grad():
        expected = rebuilt(lm.model, weights, gone)(input_ids=IDS, use_cache=False).logits
        found = CausalLM.load(source_of(artifact.out, made.bench.model)).logits(IDS)
    scale = float(expected.abs().max())
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * scale)  # float32, another order of sums
    assert not torch.allclose(expected, lm.logits(IDS), rtol=0, atol=1e-2 * scale)

    scores = made.bench.run("evaluate", models=[artifact.out], **made.inputs)
    metrics = json.loads((scores.out / "metrics.json").read_text())
    by_levels, by_model = (metrics[name] for name in (made.allocation.candidate, f"{made.allocation.candidate}@model"))
    assert by_levels["kl"]["mean"] > 0.01
    for metric, measured in by_levels.items():
        assert by_model[metric]["sequences"] == pytest.approx(measured["sequences"], abs=1e-6)


@pytest.mark.parametrize("how", ["knee", "best", "smallest"])
def test_the_pick_is_one_of_the_allocations(
    apply: Callable[..., Any], searched: Callable[[str], Any], how: str
) -> None:
    picked = CompressedModel(apply("llama", how).out).document.about["allocation"]
    found = load_allocations(searched("llama").out)
    assert picked["candidate"] in {allocation.candidate for allocation in found}
    if how != "knee":
        key = {"best": lambda a: a.kl, "smallest": lambda a: a.sizes["bits"]}[how]
        assert picked["candidate"] == min(found, key=key).candidate
    again = CompressedModel(apply("llama", picked["candidate"][:6]).out).document.about["allocation"]
    assert again == picked


def test_a_pick_that_fits_nothing_is_refused(apply: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=r"pick: 'bits=7' fits no allocation; there are bits=2\.4"):
        apply("llama", "bits=7")


def test_a_database_of_another_compress_stage_is_refused(
    chain: Callable[[str], Any], searched: Callable[[str], Any]
) -> None:
    made = chain("llama")
    menu = [
        {"method": "gptq", "bits": [2, 4], "group_size": 16, "block_size": 7, "damp_percent": 0.01},
        {"method": "rtn", "bits": 3, "group_size": 32, "sym": False},
    ]
    names = [level.name for level in Database(made.levels.out, made.bench.model).units[0].levels]
    other = made.bench.run("compress", {"menu": menu}, statistics=made.stats.out)
    said = [level.name for level in Database(other.out, made.bench.model).units[0].levels]
    assert said == names, "nothing in the names tells"
    with pytest.raises(UsageError, match="was made with another database"):
        made.bench.run("apply", allocations=searched("llama").out, database=other.out)
    with pytest.raises(UsageError, match="was made with another database"):
        made.bench.run("evaluate", allocations=searched("llama").out, database=other.out)


def test_models_side_by_side_are_levels_of_their_units(apply: Callable[..., Any]) -> None:
    folders = [apply("gpt2", pick).out for pick in ("bits=2.4", "bits=3.6")]
    models = ModelLevels(folders)
    for unit in models.unit_names:
        assert models.weight(unit, 0) is None
        for number, folder in enumerate(folders):
            weight = models.weight(unit, number + 1)
            assert weight is not None
            assert torch.equal(weight, CompressedModel(folder).level(unit).decode())
