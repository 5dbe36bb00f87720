"""Quantizes a model folder by AutoRound's own program on the CPU; runs in its environment (`benchmarks/peers.py`).

    python auto_round_quantize.py model tokens.safetensors out --bits 2 --group-size 64 [--sym] [--dense-inputs]

`out` gets `model.safetensors`, the weights that the quantized model computes with, and `about.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize and write."""
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sym", action="store_true")
    parser.add_argument(
        "--dense-inputs", action="store_true", help="of every block, instead of the compressed prefix's"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ids = load_file(arguments.tokens)["ids"]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    started = time.perf_counter()
    quantizer = AutoRound(
        model,
        AutoTokenizer.from_pretrained(arguments.model),
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=arguments.sym,
        iters=arguments.steps,
        seqlen=ids.shape[1],
        nsamples=len(ids),
        batch_size=8,
        dataset=[row[None] for row in ids],
        enable_torch_compile=False,
        device_map="cpu",
        amp=False,
        enable_quanted_input=not arguments.dense_inputs,
    )
    quantized, _ = quantizer.quantize()
    seconds = time.perf_counter() - started
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().float().contiguous().clone() for name, tensor in quantized.named_parameters()}
    save_file(weights, arguments.out / "model.safetensors")
    (arguments.out / "about.json").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")


if __name__ == "__main__":
    main()
