"""Trains a third model for `quantization.py`: a Llama of another width, depth and seed than those at hand.

    python benchmarks/small_llama.py --text TEXT --tokenizer FOLDER --out FOLDER      # minutes on one core

Its weights are not kept in the repository: they depend on the machine's arithmetic, and the script makes alike ones.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerwise.stages.contract import TextSource
from layerwise.stages.data.text import cut, encode

LENGTH, BATCH, PEAK, SEED = 128, 16, 3e-3, 7


def main() -> None:
    """Train, and write a model folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model folder whose tokenizer is taken")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    torch.manual_seed(SEED)
    source = TextSource("training", (given.text,), LENGTH, None)
    tokens = torch.from_numpy(cut(encode(source, given.tokenizer), source)).long()
    config = LlamaConfig(
        vocab_size=int(tokens.max()) + 1, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    started = time.perf_counter()
    for step in range(given.steps):
        rate = PEAK * min(1, (step + 1) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / given.steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = tokens[torch.randint(len(tokens), (BATCH,))]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    model.save_pretrained(given.out)
    for file in given.tokenizer.glob("*token*"):
        shutil.copy(file, given.out)


if __name__ == "__main__":
    main()
