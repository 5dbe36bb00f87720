"""Quantizes a model folder by llm-compressor's own GPTQ on the CPU; runs in its environment (`benchmarks/peers.py`).

    python llm_compressor_quantize.py model tokens.safetensors out --bits 2 --group-size 64 [--sym]

`out` gets `model.safetensors`, the weights that the quantized model computes with, and `about.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize and write."""
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--sym", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ids = load_file(given.tokens)["ids"]
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    weights = {
        "num_bits": given.bits,
        "type": "int",
        "symmetric": given.sym,
        "strategy": "group",
        "group_size": given.group_size,
        "actorder": "static",
    }
    recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    started = time.perf_counter()
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(given.model),
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
    )
    seconds = time.perf_counter() - started
    given.out.mkdir(parents=True, exist_ok=True)
    found = {name: tensor.detach().float().contiguous().clone() for name, tensor in model.named_parameters()}
    save_file(found, given.out / "model.safetensors")
    (given.out / "about.json").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")


if __name__ == "__main__":
    main()
