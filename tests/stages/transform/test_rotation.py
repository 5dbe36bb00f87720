"""The rotation itself, and that a rotated model computes the same, as transformers loads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file

from layerwise.errors import UnsupportedModel
from layerwise.stages.transform.rotation import rotation_matrix

IDS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(9))

COMMON = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OPT = {
    "vocab_size": 256, "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": 1,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON),
    "llama of a width that is no power of two": ("LlamaConfig", COMMON | {"hidden_size": 48, "num_attention_heads": 6}),
    "qwen2, with biases": ("Qwen2Config", COMMON),
    "qwen3, tied, with norms of heads": ("Qwen3Config", COMMON | {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", COMMON | {"sliding_window": 8}),
    "phi3, with fused layers": ("Phi3Config", COMMON),
    "gemma, whose gain is 1 + w": ("GemmaConfig", COMMON | {"head_dim": 8}),
    "granite, with multipliers": (
        "GraniteConfig",
        COMMON | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    ),
    "opt, with LayerNorm and positions": ("OPTConfig", OPT),
    "opt, with projections around it": ("OPTConfig", OPT | {"word_embed_proj_dim": 16}),
    "gpt2, transposed": (
        "GPT2Config",
        {"vocab_size": 256, "n_embd": 32, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "phi, parallel, with a bias of the head": ("PhiConfig", COMMON),
    "mixtral": ("MixtralConfig", COMMON | EXPERTS),
    "qwen3-moe": ("Qwen3MoeConfig", COMMON | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}),
    "olmoe, with norms as wide as the stream": ("OlmoeConfig", COMMON | {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite-moe": ("GraniteMoeConfig", COMMON | EXPERTS),
    "gpt-oss, with biases of experts": ("GptOssConfig", COMMON | EXPERTS | {"head_dim": 16}),
    "mamba, without attention": (
        "MambaConfig",
        {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
}


@pytest.fixture
def new_model(tmp_path: Path) -> Callable[..., Path]:
    """A random model in a folder; gains and biases differ much from channel to channel."""

    def make(name: str, settings: dict[str, Any], edit: Callable[[Any], None] = lambda model: None, **how: Any) -> Path:
        import transformers

        folder = tmp_path / f"model-{len(list(tmp_path.glob('model-*')))}"
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
                else:
                    parameter.add_(torch.empty_like(parameter).normal_(0, 0.3))
            edit(model)
        model.to(how.pop("dtype", torch.float32)).save_pretrained(folder, **how)
        return folder

    return make


def rotate(new_bench: Callable[..., Any], folder: Path, **params: Any) -> Any:
    entry = {"method": "rotation", "seed": params.pop("seed", 0)}
    return new_bench(folder, data={}).run("transform", {"transforms": [entry], **params})


def loaded(folder: Path) -> Any:
    """As transformers loads it, and all that the folder holds."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def difference(one: Path, other: Path) -> float:
    with torch.no_grad():
        a, b = (loaded(folder)(input_ids=IDS).logits for folder in (one, other))
    assert a.std() > 0.05, "the model says something"
    return float((a - b).abs().max())


# --- the matrix ---


@pytest.mark.parametrize("keep_ones", [False, True])
@pytest.mark.parametrize("width", [1, 2, 33, 48, 64, 160])
def test_the_matrix_is_orthogonal_in_float64(width: int, keep_ones: bool) -> None:
    Q = rotation_matrix(width, 3, keep_ones=keep_ones)
    assert Q.dtype == torch.float64
    # An inner product of `width` terms in float64, and a few factors.
    torch.testing.assert_close(Q.T @ Q, torch.eye(width, dtype=torch.float64), rtol=0, atol=4e-16 * (width + 10))
    if keep_ones:
        ones = torch.ones(width, dtype=torch.float64)
        torch.testing.assert_close(Q @ ones, ones, rtol=0, atol=1e-14 * width)


def test_a_power_of_two_gives_the_hadamard_matrix_with_signs() -> None:
    Q, H = rotation_matrix(64, 0), torch.from_numpy(scipy.linalg.hadamard(64)).double() / 8
    rows, columns = Q[:, 0] * 8, Q[0] * Q[0, 0] * 64  # the first row and column of H are positive
    assert set(rows.tolist()) == set(columns.tolist()) == {-1.0, 1.0}
    assert torch.equal(Q, rows[:, None] * H * columns)
    assert torch.equal(Q, rotation_matrix(64, 0))
    assert not torch.equal(Q, rotation_matrix(64, 1))


def test_keeping_the_ones_leaves_all_entries_about_as_large() -> None:
    """The reflection changes entries of 1/16 by some 1/256; of a basis with the ones in it one would be 1/16 and 1."""
    assert rotation_matrix(256, 0, keep_ones=True).abs().max() < 2 / 16


# --- what it leaves as it is ---


@pytest.mark.parametrize("model", MODELS)
def test_a_rotated_model_computes_the_same(
    new_model: Callable[..., Path], new_bench: Callable[..., Any], model: str
) -> None:
    folder = new_model(*MODELS[model])
    made = rotate(new_bench, folder)
    assert difference(folder, made.out / "base") < 1e-4
    old, new = (loaded(path).get_input_embeddings().weight.detach().double() for path in (folder, made.out / "base"))
    if "projections" not in model:  # there the embedding is not in the stream
        assert (new - old).norm() > 0.5 * old.norm()
        torch.testing.assert_close(new @ new.T, old @ old.T, rtol=1e-4, atol=1e-5)  # rows are turned: float32
    (exact, stored) = made.rows["metrics"]
    assert (exact["candidate"], exact["metric"], stored["metric"]) == (
        "rotation", "logit_difference", "stored_logit_difference",
    )  # fmt: skip
    assert 0 < exact["value"] == stored["value"] < 1e-4


def test_norms_in_front_of_what_reads_have_no_gain_left(
    new_model: Callable[..., Path], new_bench: Callable[..., Any]
) -> None:
    for name, left in (("llama", 1), ("gemma, whose gain is 1 + w", 0)):
        made = rotate(new_bench, new_model(*MODELS[name]))
        gains = [value for key, value in load_file(made.out / "base" / "model.safetensors").items() if "norm" in key]
        assert len(gains) == 5
        assert all(bool((gain == left).all()) for gain in gains)


def test_another_seed_is_another_model_of_the_same_function(
    new_model: Callable[..., Path], new_bench: Callable[..., Any]
) -> None:
    folder = new_model(*MODELS["llama"])
    again, first, second = (rotate(new_bench, folder, seed=seed) for seed in (0, 0, 5))
    files = [made.out / "base" / "model.safetensors" for made in (again, first, second)]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert second.rows["metrics"][0]["candidate"] == "rotation-seed5"
    assert difference(first.out / "base", second.out / "base") < 1e-4


# --- what is refused ---

BLOOM = {"vocab_size": 256, "hidden_size": 32, "n_layer": 2, "n_head": 4}
XGLM = {"vocab_size": 256, "d_model": 32, "ffn_dim": 40, "num_layers": 2, "attention_heads": 4}
GEMMA2 = COMMON | {"head_dim": 16, "sliding_window": 8}


def _no_gain_in_one_channel(model: Any) -> None:
    model.transformer.ln_f.weight[3] = 0


@pytest.mark.parametrize(
    ("name", "settings", "edit", "reason"),
    [
        ("Gemma2Config", GEMMA2, None, r"layers\.0\.post_attention_layernorm stands between a branch and the residual"),
        ("BloomConfig", BLOOM, None, r"word_embeddings_layernorm stands between a branch and the residual stream"),
        ("OPTConfig", OPT | {"do_layer_norm_before": False}, None, r"layers\.0 changes the residual stream itself"),
        ("XGLMConfig", XGLM, None, r"what the model computes: its logits differ by up to \d"),  # tables of sines
        ("GPT2Config", MODELS["gpt2, transposed"][1], _no_gain_in_one_channel, "bias in channels whose gain is zero"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_rotated_is_refused_before_anything_is_written(
    new_model: Callable[..., Path],
    new_bench: Callable[..., Any],
    name: str,
    settings: dict[str, Any],
    edit: Callable[[Any], None] | None,
    reason: str,
) -> None:
    bench = new_bench(new_model(name, settings, edit or (lambda model: None)), data={})
    with pytest.raises(UnsupportedModel, match=reason) as refused:
        bench.run("transform", {"transforms": [{"method": "rotation"}]})
    assert refused.value.hint
    assert not list((bench.folder / "01-transform" / "out").iterdir())


def test_a_norm_behind_a_branch_is_in_nobodys_way_while_its_gain_is_even(
    new_model: Callable[..., Path], new_bench: Callable[..., Any]
) -> None:
    """It is refused for what it does, not for the name of its family."""

    def even(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "post_" in name:
                parameter.fill_(0.7)

    folder = new_model("Gemma2Config", GEMMA2, even)
    assert difference(folder, rotate(new_bench, folder).out / "base") < 1e-4


def test_a_wrong_rotation_is_found_out(
    new_model: Callable[..., Path], new_bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_model(*MODELS["llama"])
    skewed = rotation_matrix(32, 0) + 1e-4
    monkeypatch.setattr("layerwise.stages.transform.rotation.rotation_matrix", lambda *_, **__: skewed)
    with pytest.raises(UnsupportedModel, match=r"logits differ by up to .*, with tolerance 0\.0001"):
        rotate(new_bench, folder)
    assert 1e-4 < rotate(new_bench, folder, tolerance=0.1).rows["metrics"][0]["value"] < 0.1


def test_a_folder_that_loads_as_another_model_is_found_out(
    new_model: Callable[..., Path], new_bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_model(*MODELS["qwen3, tied, with norms of heads"])
    monkeypatch.setattr("layerwise.stages.transform.folder.Layout.added", lambda *_: [])  # the head is forgotten
    with pytest.raises(UnsupportedModel, match="the folder loads as another model"):
        rotate(new_bench, folder)


# --- how it is written ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_names_and_dtype_are_those_of_the_checkpoint(
    new_model: Callable[..., Path], new_bench: Callable[..., Any], dtype: torch.dtype
) -> None:
    """Mixtral keeps every expert in tensors of its own, which transformers stacks when it loads them."""
    settings = MODELS["mixtral"][1] | {"tie_word_embeddings": True}
    folder = new_model("MixtralConfig", settings, dtype=dtype, max_shard_size="20KB")
    base = rotate(new_bench, folder).out / "base"
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(file.name for file in base.iterdir()) == sorted(file.name for file in folder.iterdir())
    before, after = ({name: load_file(path / name) for name in files} for path in (folder, base))
    index = json.loads((base / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {tensor: file for file in files for tensor in after[file]}
    everything = [tensor for tensors in after.values() for tensor in tensors.values()]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in everything)
    added = after[files[-1]].pop("lm_head.weight")
    assert {name: sorted(tensors) for name, tensors in before.items()} == {
        name: sorted(tensors) for name, tensors in after.items()
    }
    tensors = {name: tensor for file in files for name, tensor in after[file].items()}
    assert {tensor.dtype for tensor in (*tensors.values(), added)} == {dtype}
    old = {name: tensor for file in files for name, tensor in before[file].items()}
    Q, exact = rotation_matrix(32, 0), {"rtol": torch.finfo(dtype).eps, "atol": 1e-7}  # the last bit, through float32
    E, gain = old["model.embed_tokens.weight"].double(), old["model.norm.weight"].double()
    torch.testing.assert_close(tensors["model.embed_tokens.weight"], (E @ Q).to(dtype), **exact)
    torch.testing.assert_close(added, (E * gain @ Q).to(dtype), **exact)
    up, down = (f"model.layers.1.block_sparse_moe.experts.3.{name}.weight" for name in ("w3", "w2"))
    gain = old["model.layers.1.post_attention_layernorm.weight"].double()
    torch.testing.assert_close(tensors[up], (old[up].double() * gain @ Q).to(dtype), **exact)
    torch.testing.assert_close(tensors[down], (Q.T @ old[down].double()).to(dtype), **exact)
    assert loaded(base).config.tie_word_embeddings is False


def test_half_precision_is_measured_but_does_not_count_as_another_model(
    new_model: Callable[..., Path], new_bench: Callable[..., Any]
) -> None:
    folder = new_model(*MODELS["llama"], dtype=torch.bfloat16)
    made = rotate(new_bench, folder)
    exact, stored = (row["value"] for row in made.rows["metrics"])
    assert exact < 1e-4 < 100 * 1e-4 < stored
    assert stored == pytest.approx(difference(folder, made.out / "base"), rel=1)  # of other tokens


def test_a_tie_stays_where_both_change_alike(new_model: Callable[..., Path], new_bench: Callable[..., Any]) -> None:
    """Once the final norm has no gain, the head is turned as the embedding is."""

    def plain(model: Any) -> None:
        model.model.norm.weight.fill_(1)

    folder = new_model(*MODELS["qwen3, tied, with norms of heads"], plain)
    made = rotate(new_bench, folder)
    assert "lm_head.weight" not in load_file(made.out / "base" / "model.safetensors")
    assert difference(folder, made.out / "base") < 1e-4
