"""Train the demo model: a small Llama on the documentation that comes with Python.

The workflows and tests of this repository need a real language model that is small enough to commit and to compress
in seconds on a CPU, with layers that differ in how much harm their compression does. A random model has no such
differences, and a downloaded one needs a network. So this script makes one from text that every Python has: the
docstrings of the standard library (parsed from its source files, which are not imported) and the language reference
in ``pydoc_data.topics``. The text depends on the Python version and the weights on the machine's arithmetic; a
retrained model is therefore alike, not equal.

Measured with 4000 steps (18 epochs) on Python 3.11.7, losses in nats per token, the training loss with dropout:

    step   train  held-out
     250   5.916     5.115
     500   4.522     4.402
    1000   3.762     4.015
    1500   3.368     3.866
    2000   3.064     3.803
    2500   2.820     3.768
    3000   2.595     3.751
    3500   2.447     3.745
    4000   2.364     3.751

The held-out loss falls until step 3500 and then stays; more steps would only memorise.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import math
import re
import sysconfig
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
SEQ_LEN = 256
BATCH = 8  # small, because an epoch is only 450 thousand tokens and steps are what a short training lacks
PEAK_LR = 3e-3
WEIGHT_DECAY = 0.1
DROPOUT = 0.1
REPORT_EVERY = 250
HELDOUT_CHARS = 180_000
CALIBRATION_CHARS = 340_000
LARGE_CHARS = 40_000  # a bigger package would be most of a small set, so it goes to the training set
MIN_CHARS = 40  # shorter docstrings say nothing; shorter paragraphs may recur
END_OF_TEXT = "<|endoftext|>"
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data", "encodings", "sitecustomize.py"}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "_aix_support", "_osx_support", "msilib")


def docstrings(source: bytes) -> list[str]:
    """Return the docstrings of one source file in the order of its lines, short ones left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source)
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_CHARS:
                found.append((node.body[0].lineno, text))
    return [text for _, text in sorted(found)]


def collect_documents() -> dict[str, str]:
    """Return one document per top-level module or package and one per topic of the language reference, by name."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[str]] = {}
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if SKIPPED.isdisjoint(relative.parts) and not relative.parts[0].startswith(SKIPPED_PREFIXES):
            parts.setdefault(relative.parts[0].removesuffix(".py"), []).extend(docstrings(path.read_bytes()))
    documents = {name: "\n\n".join(texts) for name, texts in sorted(parts.items())}
    documents |= {f"topic {name}": inspect.cleandoc(text) for name, text in sorted(topics.items())}
    return documents


def split(documents: dict[str, str]) -> dict[str, list[str]]:
    """Deal whole documents to the held-out, the calibration and the training set, in this order.

    Documents come in the order of their name's CRC-32, which is arbitrary but fixed, and go to the first set that is
    not full. A paragraph that was seen before (white space aside) is dropped, so that no two sets share one.
    """
    sets: dict[str, list[str]] = {"heldout": [], "calibration": [], "train": []}
    wanted = {"heldout": HELDOUT_CHARS, "calibration": CALIBRATION_CHARS}
    seen: set[str] = set()
    large = [name for name, text in documents.items() if len(text) > LARGE_CHARS]
    small = sorted(documents.keys() - set(large), key=lambda name: zlib.crc32(name.encode()))
    for name in small + large:
        kept = []
        for paragraph in re.split(r"\n\s*\n", documents[name]):
            words = " ".join(paragraph.split())
            if len(words) <= MIN_CHARS or words not in seen:
                kept.append(paragraph.rstrip())
            seen.add(words)
        text = "\n\n".join(kept).strip()
        open_sets = [key for key, size in wanted.items() if sum(map(len, sets[key])) < size and name not in large]
        if len(text) >= MIN_CHARS:
            sets[open_sets[0] if open_sets else "train"].append(text)
    return sets


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with 2048 entries on the training documents."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def new_model(vocab_size: int) -> LlamaForCausalLM:
    """Return the untrained model; 6 blocks, because a search needs units to choose between."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def heldout_loss(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """Return the mean cross-entropy in nats over non-overlapping sequences, each on its own."""
    model.eval()
    parts = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN).split(BATCH)
    with torch.no_grad():
        total = sum(float(model(input_ids=ids, labels=ids).loss) * len(ids) for ids in parts)
    model.train()
    return total / (len(tokens) // SEQ_LEN)


def learning_rate(step: int, steps: int) -> float:
    """Return the rate as a share of its peak: a linear warm-up over a twentieth of the steps, then a cosine to zero."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def batches(tokens: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches for ever; every epoch cuts the text at other places, so that no sequence comes twice."""
    while True:
        start = int(torch.randint(SEQ_LEN, (1,), generator=generator))
        n_sequences = (len(tokens) - start) // SEQ_LEN
        sequences = tokens[start : start + n_sequences * SEQ_LEN].view(n_sequences, SEQ_LEN)
        order = torch.randperm(n_sequences, generator=generator)
        for chosen in order.split(BATCH):
            if len(chosen) == BATCH:
                yield sequences[chosen]


def drop(module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Apply dropout to what a block adds to the stream; a hook, because Llama's own config has none for it."""
    return torch.nn.functional.dropout(output, DROPOUT, module.training)


def train(model: LlamaForCausalLM, tokens: Tensor, heldout: Tensor, steps: int) -> None:
    """Train in place and print the losses in nats per token; the training loss is the mean since the line before."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    gains = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    parts = [part for block in model.model.layers for part in (block.self_attn.o_proj, block.mlp)]
    hooks = [part.register_forward_hook(drop) for part in parts]
    losses: list[float] = []
    began = time.monotonic()
    model.train()
    endless = batches(tokens, torch.Generator().manual_seed(SEED))
    for step, ids in enumerate(itertools.islice(endless, steps), start=1):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % REPORT_EVERY == 0 or step == steps:
            took = time.monotonic() - began
            left = took / step * (steps - step)
            report = f"train {sum(losses) / len(losses):.3f}  held-out {heldout_loss(model, heldout):.3f}"
            print(f"step {step:5d}  {report}  {took:5.0f} s, {left:5.0f} s left", flush=True)
            losses.clear()
    for hook in hooks:
        hook.remove()


def main() -> None:
    """Make the texts, the tokenizer and the model, and write them into one folder."""
    parser = argparse.ArgumentParser(description="Train the demo model on Python's own documentation.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write into (default: here)")
    parser.add_argument("--steps", type=int, default=4000, help="batches to train on (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(arguments.threads)

    sets = split(collect_documents())
    tokenizer = train_tokenizer(sets["train"])
    texts = {name: "\n\n".join(documents) + "\n" for name, documents in sets.items()}
    tokens = {name: torch.tensor(tokenizer(text)["input_ids"]) for name, text in texts.items()}
    for name, text in texts.items():
        print(f"{name}: {len(sets[name])} documents, {len(text)} characters, {len(tokens[name])} tokens")

    model = new_model(len(tokenizer))
    print(f"{model.num_parameters()} parameters, {arguments.steps * BATCH * SEQ_LEN / len(tokens['train']):.1f} epochs")
    train(model, tokens["train"], tokens["heldout"], arguments.steps)

    model.half().save_pretrained(arguments.out / "model")
    tokenizer.save_pretrained(arguments.out / "model")
    for name in ("calibration", "heldout"):
        (arguments.out / f"{name}.txt").write_text(texts[name], encoding="utf-8")


if __name__ == "__main__":
    main()
