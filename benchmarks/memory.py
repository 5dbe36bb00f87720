"""How much memory the main path needs: a random Llama of 300 M parameters, every process watched.

    python benchmarks/memory.py      # writes benchmarks/results/memory.md

The bound is the size of the model plus 2 GB for any one process; the driver must stay far below the model. Memory is
the proportional set size (PSS), sampled four times a second: pages of the memory-mapped checkpoint that several
processes share are counted once in all. Ray's own processes are left out of the rows and named below the table.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
from machine import header

HERE = Path(__file__).parent
TEXT = HERE.parent / "workflows" / "demo" / "calibration.txt"
TOKENIZER = HERE.parent / "workflows" / "demo" / "model"
WORKFLOW = """
version: 1
name: memory
model: {model}
data:
  calibration: {{text: {text}, tokens: 2Ki, sequence_length: 512}}
  heldout: {{text: {heldout}, tokens: 512, sequence_length: 512}}
stages:
  statistics: {{uses: calibrate}}
  levels: {{uses: compress, needs: [statistics], with: {{menu: [{{method: gptq, bits: [4]}}]}}}}
  search: {{uses: allocate, needs: [levels], with: {{solver: uniform, budgets: {{bits: [4]}}}}}}
  score: {{uses: evaluate, needs: [levels, search]}}
"""
SECONDS_BETWEEN_SAMPLES = 0.25


def make_model(folder: Path) -> int:
    """Save a random Llama with about 300 M parameters; gives its size in bytes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def role(process: psutil.Process, driver: int) -> str:
    """What a process is, for the table."""
    if process.pid == driver:
        return "driver"
    name = " ".join(process.cmdline()[:3])
    return "worker" if name.startswith("ray::") else "Ray itself"


def watch(command: list[str]) -> tuple[dict[str, int], str, float]:
    """Run a command; gives the greatest PSS of any one process by role, what it said, and its seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        running = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ)
        peaks: dict[str, int] = defaultdict(int)
        tree = psutil.Process(running.pid)
        while running.poll() is None:
            for process in [tree, *tree.children(recursive=True)]:
                try:
                    kind = role(process, running.pid)
                    peaks[kind] = max(peaks[kind], process.memory_full_info().pss)
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            time.sleep(SECONDS_BETWEEN_SAMPLES)
        said.seek(0)
        text = said.read()
    if running.returncode:
        raise SystemExit(text)
    return dict(peaks), text, time.perf_counter() - started


def main() -> None:
    """Measure and write the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = make_model(folder / "model")
        heldout = TEXT.with_name("heldout.txt")
        workflow = folder / "memory.yaml"
        workflow.write_text(WORKFLOW.format(model=folder / "model", text=TEXT, heldout=heldout), encoding="utf-8")
        command = [sys.executable, "-m", "layerwise", "run", str(workflow), "--results", str(folder / "results")]
        peaks, said, took = watch(command)
    bound = size + 2e9
    lines = [
        "# Memory of the main path",
        "",
        *header("memory.py", ["layerwise", "torch", "ray", "transformers"]),
        f"- random Llama, {size / 4e6:.0f} M parameters, {size / 1e9:.2f} GB in float32; bound: {bound / 1e9:.2f} GB",
        f"- calibrate, compress (GPTQ, 4 bits), allocate, evaluate: {took:.0f} s",
        "",
        "| process | greatest PSS, GB | share of the bound |",
        "|---|---|---|",
        *(f"| {kind} | {peak / 1e9:.2f} | {peak / bound:.2f} |" for kind, peak in sorted(peaks.items())),
        "",
        "```",
        said.strip(),
        "```",
    ]
    text = "\n".join(lines) + "\n"
    (HERE / "results" / "memory.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
