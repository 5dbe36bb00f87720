"""A Llama of 1.1 billion weights in bfloat16 through `calibrate` and `compress`, with the memory of every process.

    python benchmarks/larger_than_memory.py      # writes benchmarks/results/larger_than_memory.md after each part

The model is random and written shard by shard. It is computed in float32, so loaded whole it would take twice its
file; no process may have more than 3 GB resident. Everything runs in one process (`--executor inline`), which is then
charged with the driver, too. Memory is the resident set, pages of mapped files included, from the kernel's own
high-water mark.

`calibrate` is killed (SIGKILL) when half of the blocks are done and goes on; then it is run elsewhere in one go, and
must leave the same bytes. On one core GPTQ takes minutes for each block, so it is shown on the unit that takes most,
with 5,632 inputs; all units are rounded to nearest. Few tokens do: memory depends on them by the hidden states of a
batch alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import header
from safetensors.torch import save_file

HERE = Path(__file__).parent
DEMO = HERE.parent / "workflows" / "demo"
BLOCKS, WIDTH, INNER, HEADS, KEYS, VOCABULARY = 22, 2048, 5632, 32, 4, 32000
"""TinyLlama's shape."""
LIMIT_BYTES = 3e9
SECONDS_BETWEEN_SAMPLES = 0.2
WORKFLOW = """
version: 1
name: larger
model: {model}
data:
  calibration: {{text: {text}, tokens: {tokens}, sequence_length: {length}}}
stages:
  stats: {{uses: calibrate, with: {{shards: 1, batch_size: 1, statistics: [hessian]}}}}
"""
LARGEST = """
  largest:
    uses: compress
    needs: [stats]
    with: {targets: [model.layers.0.mlp.down_proj], menu: [{method: gptq, bits: [4], group_size: 128}]}
"""
ROUNDED = """
  rounded: {uses: compress, with: {menu: [{method: rtn, bits: [4], group_size: 128, grid: minmax}]}}
"""
TOKENS, LENGTH = 128, 64


def make_model(folder: Path) -> int:
    """Write the model, one shard for each block and one for the rest; gives its bytes."""
    from transformers import AutoTokenizer, LlamaConfig

    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (0.02 * torch.randn(rows, columns, generator=generator)).bfloat16()

    ones = torch.ones(WIDTH, dtype=torch.bfloat16)
    index: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    folder.mkdir()
    outside = {"model.embed_tokens.weight": matrix(VOCABULARY, WIDTH), "lm_head.weight": matrix(VOCABULARY, WIDTH)}
    write("outside.safetensors", outside | {"model.norm.weight": ones})
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (WIDTH * KEYS // HEADS, WIDTH),
        "self_attn.v_proj": (WIDTH * KEYS // HEADS, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    for block in range(BLOCKS):
        path = f"model.layers.{block}"
        tensors = {f"{path}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        norms = {f"{path}.{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        write(f"block-{block:02}.safetensors", tensors | norms)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, num_key_value_heads=KEYS, max_position_embeddings=2048, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    AutoTokenizer.from_pretrained(DEMO / "model").save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@dataclass(frozen=True)
class Sample:
    """Of a process at work: seconds since its start, bytes resident, the most until then, and what it last said."""

    seconds: float
    resident: int
    most: int
    said: str


def watched(command: list[str], told: Path) -> Iterator[tuple[subprocess.Popen[bytes], Sample]]:
    """Run a command and sample it until it ends."""
    started = time.perf_counter()
    with told.open("wb") as stream:
        running = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ)
        while running.poll() is None:
            try:
                lines = Path(f"/proc/{running.pid}/status").read_text().splitlines()
                told_of = [line.split() for line in lines if line.startswith(("VmRSS", "VmHWM"))]
                kib = {name.rstrip(":"): int(size) for name, size, _ in told_of}
            except (OSError, ValueError):
                kib = {}
            if kib:
                said = (told.read_text(errors="replace").strip().splitlines() or [""])[-1]
                seconds = time.perf_counter() - started
                yield running, Sample(seconds, 1024 * kib["VmRSS"], 1024 * kib["VmHWM"], said)
            time.sleep(SECONDS_BETWEEN_SAMPLES)


def run(workflow: Path, results: Path, kill: Callable[[], bool] = lambda: False) -> list[Sample]:
    """Run the workflow into a results folder, until it ends or `kill` says so."""
    told = workflow.with_suffix(".told")
    options = ["--results", str(results), "--executor", "inline"]
    command = [sys.executable, "-m", "layerwise", "run", str(workflow), *options]
    samples, killed = [], False
    for running, sample in watched(command, told):
        samples.append(sample)
        if not killed and kill():
            running.send_signal(signal.SIGKILL)
            killed = True
    text = told.read_text(errors="replace")
    if running.returncode and not killed:
        raise SystemExit(text)
    return samples


def progress(results: Path) -> int:
    """The block that an unfinished `calibrate` has come to; -1 before any."""
    found = [json.loads(file.read_text())["position"] for file in results.rglob("hidden/0/progress.json")]
    return max(found, default=-1)


def statistics(results: Path) -> dict[str, str]:
    """SHA-256 of every file of the statistics artifact."""
    folder = next(results.glob("runs/*/stages/stats")).resolve()
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def thinned(samples: list[Sample], count: int = 24) -> list[Sample]:
    """As many samples, spread evenly."""
    return [samples[number * (len(samples) - 1) // (count - 1)] for number in range(count)]


PARTS = (
    "calibrate, killed",
    "calibrate, gone on",
    "compress, GPTQ of the largest unit",
    "compress, all units rounded",
    "calibrate, in one go",
)
"""The runs, in their order."""


def page(size: int, facts: list[str], runs: dict[str, list[Sample]]) -> float:
    """Write what is known by now; gives the most resident memory of any process so far."""
    most = max(samples[-1].most for samples in runs.values())
    lines = [
        "# A model larger than memory",
        "",
        *header("larger_than_memory.py", ["layerwise", "torch", "transformers"]),
        f"- random Llama, {size / 2e9:.2f} billion weights, {size / 1e9:.2f} GB in bfloat16, {size / 5e8:.2f} GB in "
        f"float32, in which it is computed; {TOKENS} tokens",
        f"- most resident memory of any process: {most / 1e9:.2f} GB (limit {LIMIT_BYTES / 1e9:.0f} GB)",
        *(f"- {fact}" for fact in facts),
        "",
        "| run | seconds | most resident, GB |",
        "|---|---|---|",
        *(f"| {name} | {samples[-1].seconds:.0f} | {samples[-1].most / 1e9:.2f} |" for name, samples in runs.items()),
        *(f"| {name} | not run | |" for name in PARTS if name not in runs),
    ]
    for name, samples in runs.items():
        lines += [
            "",
            f"The trace of {name}:",
            "",
            "| second | resident, GB | most so far, GB | what it last said |",
            "|---|---|---|---|",
        ]
        for sample in thinned(samples):
            sizes = f"{sample.resident / 1e9:.2f} | {sample.most / 1e9:.2f}"
            lines.append(f"| {sample.seconds:.0f} | {sizes} | {sample.said} |")
    (HERE / "results" / "larger_than_memory.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[: 12 + len(runs)]), flush=True)
    return most


def main() -> None:
    """Measure and write the page."""
    runs: dict[str, list[Sample]] = {}
    facts: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = make_model(folder / "model")
        text = WORKFLOW.format(model=folder / "model", text=DEMO / "calibration.txt", tokens=TOKENS, length=LENGTH)
        flows = {"alone": text, "largest": text + LARGEST, "rounded": text + ROUNDED}
        alone, largest, rounded = (folder / f"{name}.yaml" for name in flows)
        for name, content in flows.items():
            (folder / f"{name}.yaml").write_text(content, encoding="utf-8")

        results = folder / "results"
        runs[PARTS[0]] = run(alone, results, lambda: progress(results) >= BLOCKS // 2)
        left_at = progress(results)
        assert BLOCKS // 2 <= left_at < BLOCKS, "it was not killed in the middle"
        runs[PARTS[1]] = run(alone, results)
        facts.append(f"killed when block {left_at} of {BLOCKS} was next, it went on there")
        page(size, facts, runs)
        for part, flow in ((PARTS[2], largest), (PARTS[3], rounded)):
            runs[part] = run(flow, results)
            page(size, facts, runs)
        runs[PARTS[4]] = run(alone, folder / "other")
        expected, found = statistics(folder / "other"), statistics(results)
        assert found == expected, "a calibrate that was killed left other bytes"
        facts.append(f"its {len(found)} files of statistics are, byte by byte, those of a calibrate in one go")
    most = page(size, facts, runs)
    assert most < LIMIT_BYTES, "a process had more memory than it may"


if __name__ == "__main__":
    main()
