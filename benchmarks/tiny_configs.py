"""Tiny configurations of every causal family that the installed transformers knows, made by one rule.

A family's configuration class says which sizes it has; those are set to small values that fit one another, by their
names. What a class derives from them (layer types, head sizes) it derives itself. Only what the rule cannot know stands
under `OWN`.
"""

from __future__ import annotations

from typing import Any

DEPTH, WIDTH, HEADS, VOCABULARY, POSITIONS = 4, 32, 4, 256, 64
"""Four blocks, so that families with blocks of several kinds have some of each."""

HEAD = WIDTH // HEADS

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "dim_model"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "lru_width", "attention_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "feed_forward_size", "d_inner", "n_inner", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_experts_intermediate_size"), 24),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), DEPTH),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), DEPTH),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "index_n_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), HEAD),
    **dict.fromkeys(("dim_head", "d_head", "kv_channels", "attention_head_size", "index_head_dim"), HEAD),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), HEAD),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "adapter_rank", "rotary_dim"), HEAD),
    "qk_head_dim": 2 * HEAD,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "num_shared_experts", "n_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 256),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), POSITIONS),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "context_length"), POSITIONS),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 8),
    **dict.fromkeys(("local_attention", "attention_chunk_size"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_headdim", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "gated_norm_rank", "router_hidden_size"), 8),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), None),
    "pad_token_id": 1,
}
"""By the name of a setting. Names that mean another thing in some family are set there, under `OWN`."""

OWN: dict[str, dict[str, Any]] = {
    "dots3_note": {"num_key_value_heads": HEADS},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}
"""By family, what the rule cannot know."""


def tiny_config(family: str) -> Any:
    """A tiny configuration of a family, by its `model_type`."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family](**_settings(CONFIG_MAPPING[family], OWN.get(family, {})))


def _settings(kind: Any, own: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a class of configurations has, those of its sub-configurations included."""
    try:
        known = {**kind().to_dict(), **dict.fromkeys(kind.attribute_map)}
    except ValueError:  # defaults that contradict one another
        known = dict.fromkeys(getattr(kind, "__annotations__", {}))
    settings = {name: value for name, value in SIZES.items() if name in known}
    if {"kv_lora_rank", "num_key_value_heads"} <= set(known):  # latent attention, where no two heads share keys
        settings["num_key_value_heads"] = HEADS
    hints = getattr(kind, "__annotations__", {})
    for name in ("bos_token_id", "eos_token_id"):
        if name in settings and "None" not in str(hints.get(name, "None")):
            settings[name] = 0
    for name in kind.sub_configs:
        part = getattr(kind(), name, None)
        if part is not None:
            settings[name] = _settings(type(part), own.get(name, {})) | {"model_type": part.model_type}
    return settings | {name: value for name, value in own.items() if name not in kind.sub_configs}
