"""A transformed model goes through every stage behind it, and what went in compressed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from layerwise.stages.contract import ModelSource
from layerwise.stages.levels.database import Database
from layerwise.stages.models.compressed import Document, source_of
from layerwise.stages.transform.stage import TransformParams

IDS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(9))
ROTATION = {"transforms": [{"method": "rotation"}]}


def logits(folder: Path) -> torch.Tensor:
    """As transformers loads it."""
    return logits_of(loaded(folder))


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(input_ids=IDS).logits
    return answer


def rows_of(result: Any) -> dict[tuple[str, str], float]:
    return {(row["candidate"], row["metric"]): row["value"] for row in result.rows["metrics"]}


def test_a_rotated_model_goes_through_all_stages(
    model_folder: Callable[[str], Path], new_bench: Callable[..., Any]
) -> None:
    bench = new_bench(model_folder("qwen3"))
    rotated = bench.run("transform", ROTATION)
    stats = bench.run("calibrate", {"statistics": ["hessian"]}, model=rotated.out)
    menu = [{"method": "gptq", "bits": [3, 6], "group_size": 16}]
    levels = bench.run("compress", {"menu": menu}, statistics=stats.out)
    profile = bench.run("profile", database=levels.out)
    allocated = bench.run(
        "allocate", {"solver": "ilp", "budgets": {"bits": [4.5]}}, database=levels.out, profile=profile.out
    )
    applied = bench.run("apply", {"pick": "best"}, allocations=allocated.out, database=levels.out)
    scored = bench.run(
        "evaluate", allocations=allocated.out, database=levels.out, models=[rotated.out, applied.out]
    )  # fmt: skip
    found, (allocation,) = rows_of(scored), allocated.rows["allocations"]
    name = allocation["candidate"]
    assert {candidate for candidate, _ in found} == {"dense", "rotation", name, f"{name}@model"}
    # The divergence is a difference of logarithms of sums of exponentials in float32, of 4 to 8: one last bit of them.
    assert abs(found["rotation", "kl"]) < 5e-7
    assert found["rotation", "perplexity"] == pytest.approx(found["dense", "perplexity"], rel=1e-5)
    assert found["dense", "kl"] == pytest.approx(0, abs=1e-12)
    assert found[f"{name}@model", "kl"] == pytest.approx(found[name, "kl"], rel=1e-4)
    assert found[name, "kl"] > 1e-4

    exported = bench.run("export", model=applied.out)
    database, expected = Database(levels.out, bench.model), loaded(rotated.out / "base")
    chosen = dict(zip(allocation["units"], allocation["levels"], strict=True))
    assert len(set(chosen.values())) == 2
    for unit, level in chosen.items():
        expected.get_submodule(unit).weight.data = database.level(unit, level).decode()
    torch.testing.assert_close(logits(exported.out), logits_of(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(rotated.out / "base"), logits(bench.model.path), rtol=0, atol=1e-4)


def test_evaluated_alone_a_transformed_model_stands_beside_the_dense_one(
    model_folder: Callable[[str], Path], new_bench: Callable[..., Any]
) -> None:
    """Whose perplexity is that of the workflow's model, not that of what was compared with it."""
    bench = new_bench(model_folder("llama"))
    found = rows_of(bench.run("evaluate", models=bench.run("transform", ROTATION).out))
    assert {candidate for candidate, _ in found} == {"dense", "rotation"}
    assert (found["dense", "kl"], found["dense", "agreement"]) == (pytest.approx(0, abs=1e-12), 1.0)


@pytest.fixture
def applied(model_folder: Callable[[str], Path], new_bench: Callable[..., Any]) -> Callable[..., Any]:
    """A bench, and a compressed model made on it at three bits."""

    def make(menu: list[dict[str, Any]], budget: dict[str, Any]) -> Any:
        bench = new_bench(model_folder("llama"))
        levels = bench.run("compress", {"menu": menu})
        profile = bench.run("profile", database=levels.out)
        allocated = bench.run(
            "allocate", {"solver": "ilp", "budgets": budget}, database=levels.out, profile=profile.out
        )  # fmt: skip
        return bench, bench.run("apply", {"pick": "best"}, allocations=allocated.out, database=levels.out)

    return make


def test_a_compressed_model_is_decoded_into_the_base(applied: Callable[..., Any]) -> None:
    bench, model = applied([{"method": "rtn", "bits": [2, 4], "group_size": 16}], {"bits": [3.5]})
    rotated = bench.run("transform", ROTATION, model=model.out)
    exported = bench.run("export", model=model.out)
    assert (logits(exported.out) - logits(bench.model.path)).abs().max() > 0.1
    torch.testing.assert_close(logits(rotated.out / "base"), logits(exported.out), rtol=0, atol=1e-4)
    document = Document.load(rotated.out)
    assert not document.units
    assert document.about["of"]["allocation"] == Document.load(model.out).about["allocation"]
    assert source_of(rotated.out, bench.model) == ModelSource(rotated.out / "base")


def test_what_a_compressed_model_has_dropped_stays_dropped(applied: Callable[..., Any]) -> None:
    menu = [{"method": "rtn", "bits": [4], "group_size": 16}, {"method": "drop", "units": ["attention", "block"]}]
    bench, model = applied(menu, {"bits": [2.5]})
    dropped = {entry.unit.name for entry in Document.load(model.out).units if entry.unit.is_parent}
    assert dropped
    rotated = bench.run("transform", ROTATION, model=model.out)
    assert {entry.unit.name for entry in Document.load(rotated.out).units} == dropped
    found = rows_of(bench.run("evaluate", models=[model.out, rotated.out]))
    (name,) = {candidate for candidate, _ in found if candidate.endswith("@model")}
    assert found["rotation", "kl"] == pytest.approx(found[name, "kl"], rel=1e-4)
    assert found[name, "kl"] > 0.01


def test_rotation_helps_rounding_where_some_channels_stand_out(
    model_folder: Callable[[str], Path], edited_model: Callable[..., Path], new_bench: Callable[..., Any]
) -> None:
    """Two channels of the stream that everything reads with large weights: they widen the grid of their group, and the
    others are rounded away. Gains and weights together are random, so folding the gains alone does not help."""

    def outliers(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if any(reader in name for reader in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                tensor[:, [5, 20]] *= 6

    bench = new_bench(edited_model(model_folder("llama"), outliers))
    menu = [{"method": "rtn", "bits": [3], "group_size": 32}]
    kl = {}
    for name, inputs in (("plain", {}), ("rotated", {"model": bench.run("transform", ROTATION).out})):
        levels = bench.run("compress", {"menu": menu}, **inputs)
        allocated = bench.run("allocate", {"solver": "uniform", "budgets": {"bits": [3]}}, database=levels.out)
        (allocation,) = allocated.rows["allocations"]
        assert set(allocation["levels"]) == {"rtn-3b-g32"}
        scored = bench.run("evaluate", allocations=allocated.out, database=levels.out)
        kl[name] = rows_of(scored)[allocation["candidate"], "kl"]
    assert kl["rotated"] < kl["plain"]


def test_parameters_are_checked_and_part_of_the_key() -> None:
    params = TransformParams.model_validate(ROTATION)
    assert params.material() == {
        "transforms": [{"method": "rotation", "seed": 0, "impl": 1}], "tolerance": 1e-4,
    }  # fmt: skip
    assert list(params.sources()) == ["layerwise.stages.transform.rotation"]
    for wrong in (
        {"transforms": []},
        {"transforms": [{"method": "smooth"}]},
        {"transforms": [{"method": "rotation", "seed": -1}]},
        {**ROTATION, "tolerance": 0},
    ):
        with pytest.raises(ValidationError):
            TransformParams.model_validate(wrong)
