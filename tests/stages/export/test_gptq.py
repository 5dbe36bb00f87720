"""`gptq` and `gptq_v2`: words and overrides against a reader written from the format's description, and the folder
against GPTQModel where it is installed."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import ModelSource
from layerwise.stages.export.gptq import layout, packed_tensors, why_not
from layerwise.stages.export.shards import layout_of
from layerwise.stages.levels.database import Database
from layerwise.stages.levels.grid import grid_level

IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(9))

MENU = [
    {"method": "rtn", "bits": [2, 3, 4, 8], "group_size": 16},
    {"method": "rtn", "bits": [4, 8], "group_size": -1},
    {"method": "rtn", "bits": 4, "group_size": 16, "sym": False},
    {"method": "rtn", "bits": 4, "group_size": -1, "sym": False},
    {"method": "magnitude", "sparsity": 0.5},
    {"method": "dense"},
]


@pytest.fixture(scope="module")
def made(make_exportable: Callable[..., Any]) -> Callable[..., Any]:
    """A `model` artifact of a family in which each unit has the level that a function of it names."""
    return make_exportable(MENU)


def mixed(unit: Any) -> str:
    """2, 3, 4 and 8 bits in groups and rows, pruned and dense, alike in what is fused."""
    last = unit.name.rpartition(".")[2]
    if unit.role not in ("linear", "head") or (unit.block is None and len(unit.positions) > 1):
        return "dense"
    if unit.block is None:
        return "rtn-8b-g16"
    if last in ("q_proj", "k_proj", "v_proj"):
        return ("rtn-2b-g16", "rtn-4b-g16", "dense")[unit.block]
    if last in ("gate_proj", "up_proj"):
        return ("rtn-8b-g16", "rtn-4b-row", "rtn-4b-row")[unit.block]
    if last == "down_proj":
        return ("rtn-4b-row", "magnitude-50%", "rtn-8b-row")[unit.block]
    return "rtn-3b-g16" if last == "o_proj" else "dense"


def mixed_with_zero_points(unit: Any) -> str:
    level = mixed(unit)
    return f"{level}-asym" if level in ("rtn-4b-g16", "rtn-4b-row") else level


THREE = [*((0, 3 * i) for i in range(10)), None, *((1, 1 + 3 * i) for i in range(10)), None,
         *((2, 2 + 3 * i) for i in range(10))]  # fmt: skip
"""Word and shift of 32 values of 3 bits; the two without are split between words."""


def values(words: list[int], bits: int) -> list[int]:
    """The values of a line of words: 32 / bits of them in each, or 32 in three."""
    words = [word & 0xFFFFFFFF for word in words]
    if bits != 3:
        return [word >> (bits * i) & ((1 << bits) - 1) for word in words for i in range(32 // bits)]
    found = []
    for a, b, c in zip(words[::3], words[1::3], words[2::3], strict=True):
        split = iter((a >> 30 | (b & 1) << 2, b >> 31 | (c & 3) << 1))
        for place in THREE:
            found.append(next(split) if place is None else (a, b, c)[place[0]] >> place[1] & 7)
    return found


def decoded(tensors: Mapping[str, torch.Tensor], module: str, bits: int, version: int) -> torch.Tensor:
    """The weight (out, in) that the tensors of a layer stand for."""
    q = torch.tensor([values(column, bits) for column in tensors[f"{module}.qweight"].T.tolist()]).T
    zero = torch.tensor([values(row, bits) for row in tensors[f"{module}.qzeros"].tolist()]) + (version == 1)
    group = tensors[f"{module}.g_idx"].long()
    return ((q - zero[group]) * tensors[f"{module}.scales"].double()[group]).T.float()


def arguments_of(config: Mapping[str, Any], module: str) -> dict[str, Any] | None:
    """What a reader takes a module to be: rules that exclude first, then the first that matches; None if dense."""
    own = {name: config[name] for name in ("bits", "group_size", "sym", "desc_act")}
    for rule in config["dynamic"]:
        if rule.startswith("-:") and re.match(rule.removeprefix("-:"), module):
            return None
    for rule, arguments in config["dynamic"].items():
        if rule.startswith("+:") and re.match(rule.removeprefix("+:"), module):
            return own | arguments
    return own


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral"])
@pytest.mark.parametrize("format_", ["gptq", "gptq_v2"])
def test_what_a_reader_makes_of_the_folder_is_the_decoded_model(
    made: Callable[..., Any], tmp_path: Path, family: str, format_: str
) -> None:
    from transformers import AutoModelForCausalLM

    from layerwise.stages.models.causal_lm import CausalLM

    version = 2 if format_ == "gptq_v2" else 1
    choose = mixed if version == 1 else mixed_with_zero_points
    bench, applied = made(family, choose)
    out = bench.run("export", {"format": format_}, model=applied.out).out
    database = Database(next(iter(bench.folder.glob("*-compress"))) / "out", bench.model)
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert quantization == json.loads((out / "quantize_config.json").read_text())
    assert (quantization["quant_method"], quantization["checkpoint_format"]) == ("gptq", format_)
    tensors = load_file(out / "model.safetensors")
    packed = set()
    for unit in database.units:
        level, module = choose(unit.unit), unit.name
        arguments = arguments_of(quantization, module)
        if not level.startswith("rtn"):
            assert arguments is None or unit.unit.role != "linear", module
            continue
        recipe = database.level(module, level).recipe
        size = recipe["group_size"]
        assert arguments == {"bits": recipe["bits"], "group_size": size, "sym": recipe["sym"], "desc_act": False}
        weight = decoded(tensors, module, recipe["bits"], version)
        assert torch.equal(weight, database.level(module, level).decode()), module
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{module}.q")}
        own |= {name: tensors[name] for name in (f"{module}.scales", f"{module}.g_idx")}
        assert layout_of(own) == {f"{module}.{name}": entry for name, entry in layout(unit.unit, recipe).items()}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in own} | {f"{module}.weight": weight}
        packed.add(module)
        fused = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}.get(module.rpartition(".")[2])
        if fused is not None:
            assert arguments_of(quantization, f"{module.rpartition('.')[0]}.{fused}") == arguments
    assert {arguments_of(quantization, module)["bits"] for module in packed} >= {2, 3, 4}  # type: ignore[index]
    assert quantization["lm_head"] == ("lm_head" in packed)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, local_files_only=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    with torch.no_grad():
        expected = CausalLM.load(ModelSource(bench.model.path, compressed=applied.out)).logits(IDS)
        found = theirs.eval()(input_ids=IDS, use_cache=False).logits
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="GPTQModel is not installed")
@pytest.mark.parametrize("format_", ["gptq", "gptq_v2"])
def test_gptqmodel_loads_the_folder_and_says_what_the_decoded_model_says(
    made: Callable[..., Any], format_: str
) -> None:
    from gptqmodel import BACKEND, GPTQModel
    from transformers import AutoTokenizer

    from layerwise.stages.models.causal_lm import CausalLM

    def choose(unit: Any) -> str:
        level = (mixed if format_ == "gptq" else mixed_with_zero_points)(unit)
        return level if unit.block is not None else "dense"

    bench, applied = made("llama", choose)
    out = bench.run("export", {"format": format_}, model=applied.out).out
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.pad_token = "!"  # it wants one
    tokenizer.save_pretrained(out)
    model = GPTQModel.load(str(out), device="cpu", backend=BACKEND.GPTQ_TORCH)
    dtype = next(model.model.parameters()).dtype
    with torch.no_grad():
        expected = CausalLM.load(ModelSource(bench.model.path, compressed=applied.out)).logits(IDS)
        found = model.model(input_ids=IDS, use_cache=False).logits.float()
    bound = 0.02 if dtype == torch.bfloat16 else 0.005  # of three blocks that compute in it
    assert float((found - expected).abs().max() / expected.abs().max()) <= bound


@pytest.mark.parametrize(
    ("level", "where", "why"),
    [
        ("rtn-4b-g16-asym", "layers.", "a zero point of 0 has no code; `format: gptq_v2`"),
        ("rtn-8b-g16", "layers.0.mlp.down_proj", "or a whole row, not of 8"),
        ("rtn-3b-g16", "k_proj", "16 × 32 of 3 bits do not"),
        ("rtn-4b-g16", "q_proj", "serving engines join block 0, self_attn.q_proj"),
        ("rtn-4b-g16", "embed_tokens", "this embedding is none"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(
    made: Callable[..., Any], level: str, where: str, why: str
) -> None:
    bench, applied = made("llama", lambda unit: level if where in unit.name and unit.block in (0, None) else "dense")
    with pytest.raises(UnsupportedModel, match=re.escape(why)):
        bench.run("export", {"format": "gptq"}, model=applied.out)
    last = max(bench.folder.glob("*-export"))
    assert not list((last / "out").iterdir())


def test_widths_and_orders_are_told_from_the_recipe_alone(load_model: Callable[..., Any]) -> None:
    unit = next(unit for unit in load_model("llama").units if unit.name.endswith("0.mlp.down_proj"))
    grid = {"encoding": "grid", "bits": 4, "group_size": -1, "sym": True}
    assert why_not(unit, grid) is None
    for change, why in (
        ({"bits": 5}, "not for 5"), ({"scaled_inputs": True}, "scaled inputs"), ({"encoding": "trellis"}, "trellis"),
        ({"desc_act": True, "group_size": 16}, "not of 8"),
    ):  # fmt: skip
        assert why in (why_not(unit, grid | change) or "")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_columns_that_are_grouped_in_another_order_keep_their_groups(bits: int, sym: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (32, 64), generator=generator)
    scale = (torch.rand((32, 4), generator=generator) + 0.1).half().float()
    zero = torch.full((32, 4), 2 ** (bits - 1)) if sym else torch.randint(0, 2**bits, (32, 4), generator=generator)
    group = (torch.arange(64) // 16)[torch.randperm(64, generator=generator)]
    recipe = {"method": "hand", "bits": bits, "group_size": 16, "sym": sym, "desc_act": True}
    level = grid_level("hand", recipe, codes, scale=scale, zero=zero, group=group)
    for version in (1, 2) if sym else (2,):
        tensors = {f"m.{name}": tensor for name, tensor in packed_tensors(level, version=version).items()}
        assert torch.equal(tensors["m.g_idx"].long(), group)
        assert torch.equal(decoded(tensors, "m", bits, version), level.decode())
