"""A tiny random model and two texts on the disk, to run stages on."""

from __future__ import annotations

import random
from pathlib import Path

from layerwise.stages.contract import ModelSource, TextSource


def tiny_model(folder: Path) -> ModelSource:
    """A random Llama of two blocks, 14 units, whose tokens are bytes.

    Its weights are ten times as large as usual, so that levels differ in what they cost in quality.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=40,  # ragged groups of 16
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2, generator=generator)
    model.save_pretrained(folder)
    return ModelSource(folder)


def tiny_texts(folder: Path) -> dict[str, TextSource]:
    """`calibration` and `heldout`: eight sequences each of 32 random letters."""
    texts = {}
    for seed, name in enumerate(("calibration", "heldout")):
        letters = random.Random(seed)
        path = folder / f"{name}.txt"
        path.write_text("".join(letters.choice("abcdefgh ") for _ in range(300)), encoding="utf-8")
        texts[name] = TextSource(name, (path,), 32, 256)
    return texts
