"""Fewer heads and channels: a smaller model that transformers loads, and that says what the one with zeros says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.errors import UnsupportedModel
from layerwise.stages.allocate.allocation import make_allocation, save_allocations
from layerwise.stages.allocate.costs import CostTable
from layerwise.stages.contract import ModelSource
from layerwise.stages.levels.database import DatabaseIndex

IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(9))
MENU = [
    {"method": "width", "units": "mlp", "keep": [0.8, 0.4], "multiple": 8},
    {"method": "width", "units": "attention", "keep": 0.5},
    {"method": "width", "units": "mlp", "keep": 0.6, "multiple": 8, "then": {"bits": 4, "group_size": 8}},
    {"method": "drop", "units": ["block"]},
    {"method": "dense"},
]
BOTH = {"attention": "width-50%", "mlp": "width-80%"}


@pytest.fixture
def narrow(make_bench: Callable[[Path], Any], tmp_path: Path) -> Callable[..., tuple[Any, Any]]:
    """A bench and the `model` artifact of a folder with levels of parents: by role, or by name before that."""

    def make(folder: Path, levels: Mapping[str, str], menu: list[dict[str, Any]] = MENU) -> tuple[Any, Any]:
        bench = make_bench(folder)
        made = bench.run("compress", {"menu": menu}, statistics=bench.run("calibrate").out)
        table = CostTable(DatabaseIndex(made.out))
        genome = [
            [level.name for level in unit.levels].index(levels[key]) if (key := _key(unit.unit, levels)) else 0
            for unit in table.units
        ]
        allocation = make_allocation(table, genome, solver="hand", budget={"bits": 32})
        (tmp_path / "allocations").mkdir()
        save_allocations(tmp_path / "allocations", [allocation])
        inputs = {"allocations": tmp_path / "allocations", "database": made.out}
        return bench, bench.run("apply", {"pick": allocation.candidate}, **inputs)

    return make


def _key(unit: Any, levels: Mapping[str, str]) -> str | None:
    return next((key for key in (unit.name, unit.role) if key in levels), None)


def loaded(out: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, local_files_only=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def difference(model: Any, bench: Any, applied: Any) -> float:
    """To the model with zeros, in the largest of its logits."""
    from layerwise.stages.models.causal_lm import CausalLM

    with torch.no_grad():
        expected = CausalLM.load(ModelSource(bench.model.path, compressed=applied.out)).logits(IDS)
        found = model(input_ids=IDS, use_cache=False).logits
        generated = model.generate(IDS[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)  # with a cache
    assert generated.shape == (2, 9)
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("family", "levels"),
    [
        ("llama", BOTH), ("qwen2", BOTH), ("qwen3", BOTH), ("mistral", BOTH), ("gemma2", BOTH), ("phi3", BOTH),
        ("llama", {"mlp": "width-60%+gptq-4b-g8"}), ("qwen2", {"model.layers.1": "drop", **BOTH}),
        ("gpt2", {"mlp": "width-40%"}), ("opt", {"mlp": "width-80%"}), ("gptj", {"mlp": "width-80%"}),
        ("mixtral", {"attention": "width-50%"}),
    ],
)  # fmt: skip
def test_a_narrow_model_is_a_smaller_one_of_the_same_words(
    narrow: Callable[..., Any], model_folder: Callable[[str], Path], family: str, levels: dict[str, str]
) -> None:
    menu = [MENU[1], *MENU[3:]] if family == "mixtral" else MENU
    bench, applied = narrow(model_folder(family), levels, menu)
    out = bench.run("export", model=applied.out).out
    model = loaded(out)
    before = loaded(bench.model.path)
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, before)]
    assert sizes[0] < sizes[1]
    if "mlp" in levels:
        width = {"width-80%": 32, "width-60%+gptq-4b-g8": 24, "width-40%": 16}[levels["mlp"]]
        known = model.config.to_dict()
        (key,) = {"intermediate_size", "n_inner", "ffn_dim"} & known.keys()
        assert known[key] == width
    if "attention" in levels:
        assert model.config.num_attention_heads == before.config.num_attention_heads // 2
        assert model.config.num_key_value_heads == 1
    assert difference(model, bench, applied) <= 1e-4


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj"])
def test_a_family_whose_heads_always_fill_the_hidden_state_is_refused(
    narrow: Callable[..., Any], model_folder: Callable[[str], Path], family: str
) -> None:
    bench, applied = narrow(model_folder(family), {"attention": "width-50%"})
    with pytest.raises(UnsupportedModel, match="cannot say what is left") as caught:
        bench.run("export", model=applied.out)
    assert "native" in str(caught.value.hint)


def test_half_blocks_that_are_not_equally_narrow_are_refused_or_filled_up(
    narrow: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    levels = {"model.layers.0.mlp": "width-40%", "mlp": "width-80%"}
    bench, applied = narrow(model_folder("qwen2"), levels)
    with pytest.raises(
        UnsupportedModel, match=r"layers\.0\.mlp keeps 16 of 40 channels, and another keeps 32"
    ) as caught:
        bench.run("export", model=applied.out)
    widest, own = 3 * 3 * 32 * 32 * 4, 3 * (16 + 32 + 32) * 32 * 4
    assert f"to 32 of 40: {widest:,} bytes of those weights in the place of {own:,}" in str(caught.value.hint)
    model = loaded(bench.run("export", {"pad": True}, model=applied.out).out)
    assert model.config.intermediate_size == 32
    assert difference(model, bench, applied) <= 1e-4


def test_a_half_block_that_stays_whole_leaves_the_others_their_zeros(
    narrow: Callable[..., Any], model_folder: Callable[[str], Path]
) -> None:
    levels = {"model.layers.0.self_attn": "keep", **BOTH}
    bench, applied = narrow(model_folder("llama"), levels)
    with pytest.raises(UnsupportedModel, match="1 of 3 blocks keep all"):
        bench.run("export", model=applied.out)
    model = loaded(bench.run("export", {"pad": True}, model=applied.out).out)
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (4, 32)
    assert difference(model, bench, applied) <= 1e-4


def test_shards_hold_what_is_left_and_the_index_its_bytes(
    narrow: Callable[..., Any], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    loaded(model_folder("qwen2")).save_pretrained(folder, max_shard_size="9KB")  # biases stand apart from weights
    for file in model_folder("qwen2").glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    bench, applied = narrow(folder, BOTH)
    out = bench.run("export", model=applied.out).out
    model = loaded(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    # transformers counts a tied head twice, and this one is not
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert difference(model, bench, applied) <= 1e-4


@pytest.mark.parametrize(("kind", "taken"), [("Llama", False), ("Qwen2", True)])
def test_three_of_four_heads_are_what_the_configuration_makes_of_them(
    narrow: Callable[..., Any], model_folder: Callable[[str], Path], tmp_path: Path, kind: str, taken: bool
) -> None:
    """Llama's wants a hidden size that is a multiple of the number of heads; others do not ask."""
    import transformers

    folder = tmp_path / "four"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=256, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in model_folder("llama").glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    menu = [{"method": "width", "units": "attention", "keep": 0.75}, {"method": "dense"}]
    bench, applied = narrow(folder, {"attention": "width-75%"}, menu)
    if not taken:
        with pytest.raises(UnsupportedModel, match="not a multiple of the number of attention heads") as caught:
            bench.run("export", model=applied.out)
        assert "it takes 1, 2, 4; `pad: true` fills up with zeros to 4" in str(caught.value.hint)
    model = loaded(bench.run("export", {"pad": not taken}, model=applied.out).out)
    assert model.config.num_attention_heads == (3 if taken else 4)
    assert difference(model, bench, applied) <= 1e-4
