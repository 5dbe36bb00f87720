"""`compressed_tensors`: words and configuration against an unpacker written from the format's description, and the
folder against transformers with the library itself."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import ModelSource
from layerwise.stages.levels.database import Database

IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(9))

MENU = [
    {"method": "rtn", "bits": [4, 8, 3, 6], "group_size": 16},
    {"method": "rtn", "bits": 4, "group_size": -1},
    {"method": "rtn", "bits": 4, "group_size": 16, "sym": False},
    {"method": "rtn", "bits": 4, "group_size": 16, "scale_bits": 6},
    {"method": "magnitude", "sparsity": 0.5},
    {"method": "dense"},
]


@pytest.fixture(scope="module")
def made(make_exportable: Callable[..., Any]) -> Callable[..., Any]:
    """A `model` artifact of a family in which each unit has the level that a function of it names."""
    return make_exportable(MENU)


def mixed(unit: Any) -> str:
    """4 bits, 8 bits, other widths, whole rows, quantized scales, pruned and dense, alike in what is fused."""
    last = unit.name.rpartition(".")[2]
    if unit.block is None:
        return "rtn-8b-g16" if unit.role == "head" and len(unit.positions) == 1 else "dense"
    if unit.role != "linear":  # experts in stacked parameters
        return "dense"
    if last in ("q_proj", "k_proj", "v_proj"):
        return ("rtn-4b-g16", "rtn-3b-g16", "dense")[unit.block]
    if last in ("gate_proj", "up_proj"):
        return ("rtn-8b-g16", "rtn-4b-row", "rtn-6b-g16")[unit.block]
    return ("rtn-4b-g16-s6", "magnitude-50%", "rtn-4b-g16")[unit.block]


def unpacked(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Signed integers (rows, n): each row one stream of bits, least significant first, as the description has it."""
    rows = []
    for row in words.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row))
        rows.append([((stream >> (bits * i)) & ((1 << bits) - 1)) - (1 << (bits - 1)) for i in range(n)])
    return torch.tensor(rows)


def decoded(
    tensors: Mapping[str, torch.Tensor],
    module: str,
    arguments: Mapping[str, Any],
    scale_dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """The weight that the tensors of a layer stand for."""
    rows, columns = tensors[f"{module}.weight_shape"].tolist()
    q = unpacked(tensors[f"{module}.weight_packed"], arguments["num_bits"], columns)
    scale = tensors[f"{module}.weight_scale"].to(scale_dtype).double()
    group = torch.arange(columns) // (arguments["group_size"] or columns)
    zero = torch.zeros(rows, scale.shape[1])
    if not arguments["symmetric"]:
        stored = tensors[f"{module}.weight_zero_point"]
        zero = unpacked(stored.T, arguments["num_bits"], rows).T
    return ((q - zero[:, group]) * scale[:, group]).float()


def arguments_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Quantization arguments by target; no target may be named twice."""
    groups = config["quantization_config"]["config_groups"].values()
    pairs = [(name, group["weights"]) for group in groups for name in group["targets"]]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])  # plain; q/k/v with bias; tied head
def test_packed_words_scales_and_configuration_say_what_the_levels_decode_to(
    made: Callable[..., Any], family: str
) -> None:
    bench, applied = made(family, mixed)
    out = bench.run("export", {"format": "compressed-tensors", "any_bits": True}, model=applied.out).out
    database = Database(next(iter(bench.folder.glob("*-compress"))) / "out", bench.model)
    config = json.loads((out / "config.json").read_text())
    tensors, stored = load_file(out / "model.safetensors"), load_file(bench.model.path / "model.safetensors")
    targets = arguments_of(config)
    ignored = config["quantization_config"]["ignore"]
    assert {arguments["num_bits"] for arguments in targets.values()} == {3, 4, 6, 8}
    seen = set()
    for unit in database.units:
        level, module = mixed(unit.unit), unit.name
        weight = database.level(module, level).decode()
        if level.startswith("rtn"):
            assert torch.equal(decoded(tensors, module, targets[module]), weight), module
            assert f"{module}.weight" not in tensors
            seen.add(module)
        elif f"{module}.weight" in stored:
            assert torch.equal(tensors[f"{module}.weight"], weight)
            assert unit.unit.role == "embedding" or module in ignored or unit.unit.block is None
    assert seen == set(targets) and not seen & set(ignored)
    rest = [name for name in stored if name.removesuffix(".weight") not in seen]
    assert all(name in tensors and tensors[name].dtype == stored[name].dtype for name in rest)
    assert "sparsity_config" not in config["quantization_config"]


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_transformers_loads_the_folder_and_says_what_the_decoded_model_says(
    made: Callable[..., Any], family: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from layerwise.stages.models.causal_lm import CausalLM

    bench, applied = made(family, mixed)
    settings = {"format": "compressed_tensors", "any_bits": True, "shard_bytes": "20kB"}
    out = bench.run("export", settings, model=applied.out).out
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    tensors = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    targets = arguments_of(json.loads((out / "config.json").read_text()))
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 0.005)):
        ours = CausalLM.load(ModelSource(bench.model.path, dtype, compressed=applied.out))
        if dtype == "bfloat16":  # readers round scales to the dtype that they load in; our levels know float16 alone
            for module, arguments in targets.items():
                ours.module(module).weight.data.copy_(decoded(tensors, module, arguments, torch.bfloat16))
        theirs, info = AutoModelForCausalLM.from_pretrained(
            out, dtype=getattr(torch, dtype), output_loading_info=True, local_files_only=True
        )
        assert not info["unexpected_keys"] and not info["missing_keys"]
        with torch.no_grad():
            expected = ours.logits(IDS).float()
            found = theirs.eval()(input_ids=IDS, use_cache=False).logits.float()
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error <= bound, (dtype, error)
    assert AutoTokenizer.from_pretrained(out)("the cat")["input_ids"]


@pytest.mark.parametrize(
    ("level", "where", "why"),
    [
        ("rtn-4b-g16-asym", "layers.", "does not reload asymmetric"),
        ("rtn-3b-g16", "layers.", "only 4 and 8 bits load everywhere, not 3"),
        ("rtn-4b-g16", "q_proj", "serving engines join block 0, self_attn.q_proj"),
        ("rtn-4b-g16", "embed_tokens", "this embedding is none"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(
    made: Callable[..., Any], level: str, where: str, why: str
) -> None:
    def choose(unit: Any) -> str:
        return level if where in unit.name and unit.block in (0, None) else "dense"

    bench, applied = made("llama", choose)
    with pytest.raises(UnsupportedModel, match=why):
        bench.run("export", {"format": "compressed_tensors"}, model=applied.out)
    last = max(bench.folder.glob("*-export"))
    assert not list((last / "out").iterdir())


@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_dense_experts_that_transformers_would_not_load_are_written_only_where_it_is_asked_for(
    made: Callable[..., Any], family: str
) -> None:
    bench, applied = made(family, mixed)
    with pytest.raises(UnsupportedModel, match="does not load experts that stay dense"):
        bench.run("export", {"format": "compressed_tensors", "any_bits": True}, model=applied.out)
    settings = {"format": "compressed_tensors", "any_bits": True, "dense_experts": True}
    tensors = load_file(bench.run("export", settings, model=applied.out).out / "model.safetensors")
    stored = load_file(bench.model.path / "model.safetensors")
    experts = [name for name in stored if ".experts." in name]
    assert experts and all(torch.equal(tensors[name], stored[name]) for name in experts)


def test_an_encoding_without_a_place_in_the_format_is_told_from_the_recipe_alone(
    load_model: Callable[..., Any],
) -> None:
    from layerwise.stages.export.compressed_tensors import why_not

    unit = next(unit for unit in load_model("llama").units if unit.role == "linear")
    grid = {"encoding": "grid", "bits": 4, "group_size": 16, "sym": True}
    assert why_not(unit, grid) is None
    assert "no place for encoding trellis" in (why_not(unit, {"encoding": "trellis"}) or "")
    for change, why in (
        ({"desc_act": True}, "another order"), ({"scaled_inputs": True}, "scaled inputs"),
        ({"group_along": "outputs"}, "along inputs only"),
    ):  # fmt: skip
        assert why in (why_not(unit, grid | change) or "")


def test_zero_points_are_packed_along_rows_where_they_are_forced(made: Callable[..., Any]) -> None:
    def choose(unit: Any) -> str:
        return "rtn-4b-g16-asym" if unit.block is not None else "dense"

    bench, applied = made("llama", choose)
    out = bench.run("export", {"format": "compressed_tensors", "asymmetric": True}, model=applied.out).out
    database = Database(next(iter(bench.folder.glob("*-compress"))) / "out", bench.model)
    tensors = load_file(out / "model.safetensors")
    for module, arguments in arguments_of(json.loads((out / "config.json").read_text())).items():
        assert torch.equal(decoded(tensors, module, arguments), database.level(module, "rtn-4b-g16-asym").decode())


def test_pruned_and_quantized_levels_have_a_code_of_zero_where_they_are_pruned() -> None:
    from layerwise.stages.export.compressed_tensors import packed_tensors
    from layerwise.stages.levels.masked_grid import masked_grid_level

    generator = torch.Generator().manual_seed(1)
    for sym in (True, False):
        codes = torch.randint(0, 16, (5, 40), generator=generator)
        zero = torch.full((5, 5), 8) if sym else torch.randint(0, 16, (5, 5), generator=generator)
        keep = torch.rand((5, 40), generator=generator) < 0.5
        scale = torch.rand((5, 5), generator=generator).half().float()
        recipe = {"method": "hand", "bits": 4, "group_size": 8, "sym": sym, "sparsity": 0.5}
        level = masked_grid_level("hand", recipe, codes, keep=keep, scale=scale, zero=zero)
        tensors = {f"m.{name}": tensor for name, tensor in packed_tensors(level).items()}
        found = decoded(tensors, "m", {"num_bits": 4, "group_size": 8, "symmetric": sym})
        assert torch.equal(found, level.decode())
