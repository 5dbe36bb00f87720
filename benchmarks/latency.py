"""Whether measured parts add up to measured wholes: predicted and measured forward passes of packed models.

    taskset -c 1 python benchmarks/latency.py [--model wide]      # writes benchmarks/results/latency-cpu.md

Runs `latency.yaml` on the embedded demo model, whose layers take microseconds, and on a wide one of random weights,
whose layers are bound by memory as those of real models are. Every allocation that the solver chose is packed, run by
the kernels that the table of times chooses, and timed as a whole. The stages time on one thread by process CPU time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import header

from layerwise.pipeline.display import open_display
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.workflow import load_workflow

HERE = Path(__file__).parent
DEMO = HERE.parent / "workflows" / "demo" / "model"
WIDE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
"""69 M weights in the blocks: no cache holds them in float32."""


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description="Compare predicted and measured forward passes.")
    parser.add_argument("--model", action="append", choices=["demo", "wide"], help="default: both")
    parser.add_argument("--results", type=Path, help="results folder to keep; a temporary one without")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as in `layerwise run -s`")
    arguments = parser.parse_args()
    lines = ["# Forward passes, predicted from their parts and measured", "", *_about()]
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.model or ["demo", "wide"]:
            folder = DEMO if model == "demo" else write_wide_model(Path(scratch) / "wide")
            settings = [f"name=latency-{model}", f"model={folder}", *arguments.set]
            workflow = load_workflow(HERE / "latency.yaml", sets=settings)
            run = Run(workflow, arguments.results or Path(scratch) / "results", open_display())
            run.execute("inline", sys.argv)
            lines += ["", f"## {model}", "", *report(run.folder / "stages")]
    text = "\n".join(lines) + "\n"
    (HERE / "results" / "latency-cpu.md").write_text(text, encoding="utf-8")
    print(text)


def write_wide_model(folder: Path) -> Path:
    """A random Llama with the demo's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(DEMO)
    for name, value in WIDE.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def _about() -> list[str]:
    return [
        *header("latency.py", ["layerwise", "torch", "transformers"]),
        "- process CPU time on one thread, medians; predicted = times of the chosen levels + rest of the model",
        "- error = predicted / measured - 1; dense is the model as transformers runs it; drift = the same dense model, "
        "timed in turns with this one, over when the parts were timed",
    ]


def report(stages: Path) -> Iterator[str]:
    """The tables of one model, as Markdown."""
    for times in sorted(stages.glob("times@*")):
        name = times.name.removeprefix("times@")
        latency = json.loads((times / "latency.json").read_text(encoding="utf-8"))
        yield from (f"### {name}: {latency['batch']} x {latency['tokens']} tokens", "", *_wholes(stages, name, latency))
        yield from ("", *_parts(latency, json.loads((times / "table.json").read_text(encoding="utf-8"))), "")


def _wholes(stages: Path, name: str, latency: dict[str, Any]) -> Iterator[str]:
    speed = json.loads((stages / f"speed@{name}" / "speed.json").read_text(encoding="utf-8"))
    allocations = json.loads((stages / f"search@{name}" / "allocations.json").read_text(encoding="utf-8"))
    by_candidate = {row["candidate"]: row for row in allocations}
    yield "| budget | bits | bytes | predicted ms | measured ms | error | drift | dense / measured | status |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|---|"
    dense = speed["dense"]["median_ms"]
    for candidate, found in speed.items():
        row = by_candidate.get(candidate, {"budget": "dense", "sizes": {}})
        sizes = [f"{row['sizes'][name]:.6g}" if name in row["sizes"] else "" for name in ("bits", "bytes")]
        predicted = "" if found["predicted_ms"] is None else f"{found['predicted_ms']:.2f}"
        error = "" if found["error"] is None else f"{found['error']:+.1%}"
        drift = "" if found["drift"] is None else f"{found['drift']:.2f}"
        yield (
            f"| {row['budget']} | {' | '.join(sizes)} | {predicted} | {found['median_ms']:.2f} | {error} | {drift} "
            f"| {dense / found['median_ms']:.2f} | {found['status']} |"
        )
    yield ""
    per_megabyte = 1e9 * latency["rest_ms_per_byte"]
    yield (
        f"The rest of the model takes {latency['rest_ms']:.3f} ms, and {per_megabyte:.2f} us more for each MB of "
        "weights that goes through the caches, which is charged to the levels."
    )


def _parts(latency: dict[str, Any], table: dict[str, Any]) -> Iterator[str]:
    """Every shape and level with what it is charged, beside the best dense product."""
    yield "| n | k | level | charged ms | best dense product alone, ms |"
    yield "|--:|--:|---|--:|--:|"
    best: dict[tuple[int, int], float] = {}
    for row in table["rows"]:
        if row["label"] == "dense":
            shape = (row["n"], row["k"])
            best[shape] = min(best.get(shape, row["median_ms"]), row["median_ms"])
    seen = set()
    for shape, names, times in zip(latency["shapes"], latency["levels"], latency["ms"], strict=True):
        n, k = shape
        for level, ms in zip(names, times, strict=True):
            if (n, k, level) not in seen and ms is not None:
                seen.add((n, k, level))
                yield f"| {n} | {k} | {level} | {ms:.4f} | {best[n, k]:.4f} |"


if __name__ == "__main__":
    main()
