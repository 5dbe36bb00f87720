"""The chain on a real, trained model: the public stories260K, which is used in place where it is there."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerwise.stages.allocate.allocation import load_allocations
from layerwise.stages.contract import TextSource

SHARED = Path(__file__).resolve().parents[3] / "shared"
STORIES = SHARED / "models" / "stories260k"

pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason=f"there is no {STORIES}")


@pytest.fixture
def stories(new_bench: Callable[..., Any]) -> Any:
    texts = {
        name: TextSource(name, (SHARED / "data" / f"tinystories_{name}.txt",), 128, tokens)
        for name, tokens in (("calibration", 4096), ("heldout", 2048))
    }
    return new_bench(STORIES, data=texts)


def test_gptq_beats_rounding_at_each_bit_width_and_groups_may_be_ragged(stories: Any) -> None:
    stats = stories.run("calibrate")
    units = {row["unit"]: tuple(row["shape"])[1] for row in stats.rows["units"] if row["status"] == "ok"}
    assert len(units) == 35
    assert set(units.values()) == {64, 172}
    assert {row["unit"] for row in stats.rows["units"]} - set(units) == {"lm_head"}, "tied to the embedding"
    bits = [2, 3, 4, 8]
    menu = [{"method": m, "bits": bits, "group_size": g} for g in (32, 128) for m in ("gptq", "rtn")]
    levels = stories.run("compress", {"menu": menu}, statistics=stats.out)
    errors: dict[str, float] = defaultdict(float)
    for row in levels.rows["levels"]:
        assert row["status"] == "ok"
        if row["level"] == "dense":
            continue
        errors[row["level"]] += row["output_error"]
        columns = 172 if row["unit"].endswith("down_proj") else 64
        groups = -(-columns // json.loads(row["recipe"])["group_size"])
        assert row["effective_bits"] == pytest.approx(row["bits"] + 16 * groups / columns)
    for group_size in (32, 128):
        for width in bits:
            suffix = f"{width}b-g{group_size}"
            assert errors[f"gptq-{suffix}"] < errors[f"rtn-{suffix}"]


def test_the_dense_allocation_is_exported_as_the_model_itself(stories: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stats = stories.run("calibrate", {"targets": ["re:model.layers"]})
    menu = [{"method": "rtn", "bits": 2, "group_size": 32}, {"method": "dense"}]
    levels = stories.run("compress", {"menu": menu}, statistics=stats.out)
    found = stories.run("allocate", {"solver": "uniform", "budgets": {"bits": [2, 32]}}, database=levels.out)
    coarse, dense = load_allocations(found.out)
    assert set(dense.levels.values()) == {"dense"}
    assert dense.kl == 0.0
    assert (coarse.kl or 0) > 0.01
    stored = load_file(STORIES / "model.safetensors")
    assert dense.sizes["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    applied = stories.run("apply", {"pick": "bits=32"}, allocations=found.out, database=levels.out)
    exported = stories.run("export", model=applied.out)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    told = []
    for folder in (STORIES, exported.out):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        told.append(tokenizer.decode(model.generate(**prompt, max_new_tokens=48, do_sample=False)[0]))
    assert told[0] == told[1]
    assert "Once upon a time, there was a little girl named Lily." in told[0]
