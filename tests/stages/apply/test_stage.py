"""The `apply` and `export` stages: the decoded weights, in a folder that transformers loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layerwise.stages.apply.model import AppliedModel, AppliedModels
from safetensors.torch import load_file

from layerwise.errors import UsageError
from layerwise.stages.allocate.allocation import load_allocations
from layerwise.stages.levels.database import Database

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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compressed_model_holds_the_decoded_weights_as_the_checkpoint_would(
    chain: Callable[[str], Any], model_folder: Callable[[str], Path], apply: Callable[..., Any], family: str
) -> None:
    made, applied = chain(family), apply(family, "bits=3")
    database = Database(made.levels.out)
    document = json.loads((applied.out / "allocation.json").read_text())
    assert document["allocation"]["budget"] == "bits=3"
    written, stored = (
        load_file(applied.out / "weights.safetensors"),
        load_file(model_folder(family) / "model.safetensors"),
    )
    assert set(written) == set(document["tensors"].values())
    for unit, tensor in document["tensors"].items():
        decoded = database.decode(unit, document["allocation"]["levels"][unit])
        assert torch.equal(written[tensor], decoded.T if family == "gpt2" else decoded)
        assert (written[tensor].dtype, written[tensor].shape) == (stored[tensor].dtype, stored[tensor].shape)


@pytest.mark.parametrize("how", ["knee", "best", "smallest"])
def test_the_pick_is_one_of_the_allocations(
    apply: Callable[..., Any], searched: Callable[[str], Any], how: str
) -> None:
    picked = AppliedModel(apply("llama", how).out).allocation
    found = load_allocations(searched("llama").out)
    assert picked["candidate"] in {allocation.candidate for allocation in found}
    if how != "knee":
        key = {"best": lambda a: a.kl, "smallest": lambda a: a.bits}[how]
        assert picked["candidate"] == min(found, key=key).candidate
    assert AppliedModel(apply("llama", picked["candidate"][:6]).out).allocation == picked


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
    names = [level["level"] for level in Database(made.levels.out).units[0]["levels"]]
    other = made.bench.run("compress", {"menu": menu}, statistics=made.stats.out)
    assert [level["level"] for level in Database(other.out).units[0]["levels"]] == names, "nothing in the names tells"
    with pytest.raises(UsageError, match="was made with another database"):
        made.bench.run("apply", allocations=searched("llama").out, database=other.out)
    with pytest.raises(UsageError, match="was made with another database"):
        made.bench.run("evaluate", allocations=searched("llama").out, database=other.out)


def test_models_side_by_side_are_levels_of_their_units(apply: Callable[..., Any]) -> None:
    folders = [apply("gpt2", pick).out for pick in ("bits=2.4", "bits=3.6")]
    models = AppliedModels(folders)
    for unit in models.unit_names:
        for level, folder in enumerate(folders):
            model = AppliedModel(folder)
            assert torch.equal(models.weight(unit, level), model.read(model.tensors[unit]))


# --- export ---


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_exported_folder_loads_with_transformers_and_says_what_the_decoded_weights_say(
    chain: Callable[[str], Any], load_model: Callable[[str], Any], apply: Callable[..., Any], family: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made, applied = chain(family), apply(family)
    exported = made.bench.run("export", model=applied.out)
    model, info = AutoModelForCausalLM.from_pretrained(exported.out, output_loading_info=True, local_files_only=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    database, expected = Database(made.levels.out), copy.deepcopy(load_model(family).model)
    levels = json.loads((exported.out / "layerwise.json").read_text())["levels"]
    for row in database.units:
        number = [level["level"] for level in row["levels"]].index(levels[row["unit"]])
        expected.get_submodule(row["unit"]).weight.data = database.weight(row["unit"], number).contiguous()
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, expected(input_ids=IDS).logits)
        assert not torch.equal(expected(input_ids=IDS).logits, load_model(family).logits(IDS))
    assert AutoTokenizer.from_pretrained(exported.out)("the cat")["input_ids"]


def test_everything_that_is_no_unit_is_exported_unchanged(
    chain: Callable[[str], Any], model_folder: Callable[[str], Path], apply: Callable[..., Any]
) -> None:
    made, applied = chain("llama"), apply("llama")
    exported, units = made.bench.run("export", model=applied.out), set(AppliedModel(applied.out).tensors.values())
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder("llama"), exported.out))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor) == (name not in units)
    assert {file.name for file in exported.out.iterdir()} == {
        *(file.name for file in model_folder("llama").iterdir()), "layerwise.json",
    }  # fmt: skip


def test_shards_and_half_precision_survive_the_whole_chain(
    model_folder: Callable[[str], Path], new_bench: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "half"
    half = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.bfloat16)
    half.save_pretrained(folder, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(model_folder("llama")).save_pretrained(folder)
    bench = new_bench(folder)
    stats = bench.run("calibrate")
    menu = [{"method": "rtn", "bits": 4, "group_size": 16}, {"method": "dense"}]
    levels = bench.run("compress", {"menu": menu}, statistics=stats.out)
    assert {row["bits"] for row in levels.rows["levels"]} == {4, 16}
    found = bench.run("allocate", {"solver": "uniform", "budgets": {"bits": 16}}, database=levels.out)
    (allocation,) = load_allocations(found.out)
    assert allocation.kl == 0.0
    assert allocation.bytes == _tensor_bytes(folder)
    applied = bench.run("apply", allocations=found.out, database=levels.out)
    exported = bench.run("export", model=applied.out)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        assert _tensors(exported.out / file.name) == _tensors(file)


def _tensors(file: Path) -> dict[str, tuple[str, bytes]]:
    return {name: (str(t.dtype), t.view(torch.uint8).numpy().tobytes()) for name, t in load_file(file).items()}


def _tensor_bytes(folder: Path) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for file in folder.glob("*.safetensors")
        for tensor in load_file(file).values()
    )
