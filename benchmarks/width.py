"""Fewer heads and channels: what they cost in quality, and that the exported model is smaller, the same, and faster.

    python benchmarks/width.py [equal] [each] [--models demo stories260k] [--results FOLDER]
                                       # writes benchmarks/results/width-equal.md and width-each-<model>.md

`equal`: the time of a forward pass of a random Llama whose layers are large enough to time, dense and exported at three
quarters of its heads and channels, in turns; and what widths lose that are equal in all blocks, with the correction by
least squares and without. `each`: the workflow `width.yaml`, where each block may be as wide as it needs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import header
from real_models import OVERRIDES, SHARED, at_hand

from layerwise.kernels.timing import Sampling, time_cpu
from layerwise.pipeline.display import open_display
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.workflow import load_workflow
from layerwise.results.frontier import frontier_table
from layerwise.stages.allocate.allocation import make_allocation, save_allocations
from layerwise.stages.allocate.costs import CostTable
from layerwise.stages.contract import ModelSource, TextSource
from layerwise.stages.levels.database import DatabaseIndex
from layerwise.stages.models.causal_lm import CausalLM
from layerwise.testing import Bench

HERE = Path(__file__).parent
DEMO = HERE.parent / "workflows" / "demo"
WORKFLOW = HERE.parent / "workflows" / "width.yaml"
MENUS: dict[str, dict[str, Any]] = {
    "demo": {"attention": {"keep": 0.5}, "mlp": {"keep": [0.75, 0.5], "multiple": 32}},
    "stories260k": {"attention": {"keep": [0.75, 0.5]}, "mlp": {"keep": [0.75, 0.5], "multiple": 4}},
}
"""Two key-value heads of the demo model allow one half; 172 channels of the other allow 128 and 88 in fours."""
WIDTHS: dict[str, list[dict[str, str]]] = {
    "demo": [{"mlp": "width-75%"}, {"mlp": "width-75%", "attention": "width-50%"}],
    "stories260k": [
        {"mlp": "width-75%"},
        {"attention": "width-75%"},
        {"mlp": "width-75%", "attention": "width-75%"},
        {"mlp": "width-50%", "attention": "width-50%"},
    ],
}
SETS: dict[str, list[str]] = {
    "demo": [],
    "stories260k": [
        "params.attention=[0.25,0.5,0.75]",
        "stages.levels.with.menu.0.multiple=4",
        "stages.folder.with.pad=true",
    ],
}
TIMED = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16}
TIMED |= {"num_key_value_heads": 8, "head_dim": 48, "max_position_embeddings": 512}
TOKENS = (1, 128)
PARTS = ("equal", "each")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Narrower half-blocks.")
    parser.add_argument("parts", nargs="*", choices=PARTS, help="default: both")
    parser.add_argument("--models", nargs="*", choices=list(OVERRIDES), default=list(OVERRIDES))
    parser.add_argument("--results", type=Path, default=HERE.parent / "layerwise-results")
    arguments = parser.parse_args()
    models = list(at_hand(arguments.models))
    if "equal" in (arguments.parts or PARTS):
        with tempfile.TemporaryDirectory() as scratch:
            lines = [*_of_time(Path(scratch)), *_of_quality(Path(scratch), models)]
        _write("width-equal", "Fewer heads and channels, as many in every block", lines)
    for model in models if "each" in (arguments.parts or PARTS) else ():
        lines = _of_blocks(model, arguments.results)
        _write(f"width-each-{model}", f"Fewer heads and channels, as wide as each block needs: {model}", lines)


def _write(name: str, title: str, lines: list[str]) -> None:
    text = "\n".join([f"# {title}", "", *header("width.py", ["layerwise", "torch", "transformers"]), "", *lines])
    (HERE / "results" / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def _bench(folder: Path, model: Path, texts: Mapping[str, Path], length: int) -> Bench:
    folder.mkdir()
    data = {name: TextSource(name, (file,), length, 16384) for name, file in texts.items()}
    return Bench(folder, ModelSource(model), data)


def _texts(model: str) -> tuple[Path, dict[str, Path]]:
    if model == "demo":
        return DEMO / "model", {name: DEMO / f"{name}.txt" for name in ("calibration", "heldout")}
    texts = {name: SHARED / "data" / f"tinystories_{name}.txt" for name in ("calibration", "heldout")}
    return SHARED / "models" / model, texts


def _narrow(bench: Bench, levels: Path, widths: Mapping[str, str], folder: Path) -> tuple[Path, dict[str, float]]:
    """The `model` artifact with half-blocks of some roles at some levels, and its sizes."""
    table = CostTable(DatabaseIndex(levels))
    genome = [
        [level.name for level in unit.levels].index(widths[unit.unit.role]) if unit.unit.role in widths else 0
        for unit in table.units
    ]
    allocation = make_allocation(table, genome, solver="equal", budget={"bits": 32})
    folder.mkdir(parents=True)
    save_allocations(folder, [allocation])
    applied = bench.run("apply", {"pick": allocation.candidate}, allocations=folder, database=levels)
    return applied, allocation.sizes


def _logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What plain transformers says of an exported folder."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _of_quality(scratch: Path, models: list[str]) -> list[str]:
    """What equal widths lose."""
    lines = [
        "## Equal widths",
        "",
        "KL to the dense model on held-out text, nats per token: `without` leaves the output projections uncorrected. "
        "Where the configuration does not take a number of heads, the export is filled up with zeros. "
        "Logits of the exported folder in transformers beside those of the model with zeros, relative to the largest.",
        "",
        "| model | widths | parameters | KL | without | export: bytes, of dense | logits differ by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in models:
        folder, texts = _texts(model)
        bench = _bench(scratch / model, folder, texts, 256)
        statistics = bench.run("calibrate", {"statistics": ["hessian"]})
        made = {}
        for correct in (True, False):
            menu = [{"method": "width", "units": role, "correct": correct, **s} for role, s in MENUS[model].items()]
            made[correct] = bench.run("compress", {"menu": menu}, statistics=statistics)
        for number, widths in enumerate(WIDTHS[model]):
            losses = {}
            for correct, levels in made.items():
                place = scratch / f"{model}-{number}-{correct}"
                applied, sizes = _narrow(bench, levels, widths, place)
                scores = json.loads((bench.run("evaluate", {}, models=[applied]) / "metrics.json").read_text())
                losses[correct] = next(score["kl"]["mean"] for name, score in scores.items() if name != "dense")
                if correct:
                    kept, total = sizes["parameters"], applied
            out = bench.run("export", {"pad": "attention" in widths}, model=total)
            ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
            expected = CausalLM.load(ModelSource(folder, compressed=total)).logits(ids)
            found = _logits(out, ids)
            off = float((found - expected).abs().max() / expected.abs().max())
            told = ", ".join(f"{role} {level.removeprefix('width-')}" for role, level in widths.items())
            ratio = _weights(out) / _weights(folder)
            lines.append(
                f"| {model} | {told} | {kept:,} | {losses[True]:.4f} | {losses[False]:.4f} "
                f"| {_weights(out):,}, {ratio:.3f} | {off:.1e} |"
            )
            print(lines[-1], flush=True)
    return [*lines, ""]


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _of_blocks(model: str, results: Path) -> list[str]:
    """The workflow, with widths of each block's own."""
    sets = [*OVERRIDES[model], *SETS[model], f"name=width-{model}"]
    run = Run(load_workflow(WORKFLOW, sets=sets), results, open_display())
    run.execute("inline", sys.argv)
    frame = frontier_table(run.store, run.id, over="parameters", dominated=True)
    lines = [
        "`workflows/width.yaml`: `equal` has one width for all blocks, `each` minimises the sum of the losses of "
        "half-blocks changed alone, `search` measures whole models from there.",
        "",
        "| stage | budget | parameters | KL, search text | KL, held-out |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in frame.sort_values(["budget", "stage"]).to_dict("records"):
        lines.append(
            f"| {row['stage']} | {row['budget']} | {int(row['parameters']):,} | {row['kl']:.4f} "
            f"| {row['heldout_kl']:.4f} |"
        )
    return [*lines, ""]


def _of_time(scratch: Path) -> list[str]:
    """A random Llama at three quarters of its heads and channels, and dense, timed in turns."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = scratch / "random"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, tie_word_embeddings=True, **TIMED))
    model.save_pretrained(folder)
    for file in (DEMO / "model").glob("*token*"):
        shutil.copy(file, folder)
    bench = _bench(scratch / "time", folder, _texts("demo")[1], 128)
    menu = [{"method": "width", "keep": 0.75}]
    levels = bench.run("compress", {"menu": menu}, statistics=bench.run("calibrate", {"statistics": ["hessian"]}))
    widths = {"mlp": "width-75%", "attention": "width-75%"}
    applied, sizes = _narrow(bench, levels, widths, scratch / "time-allocation")
    out = bench.run("export", {}, model=applied)
    ids = torch.randint(0, 2048, (2, 64), generator=torch.Generator().manual_seed(0))
    expected = CausalLM.load(ModelSource(folder, compressed=applied)).logits(ids)
    off = float((_logits(out, ids) - expected).abs().max() / expected.abs().max())
    config = json.loads((out / "config.json").read_text())
    said = ", ".join(
        f"{key} {config[key]} of {TIMED[key]}"
        for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    )
    whole = sum(parameter.numel() for parameter in model.parameters())
    both = {
        name: AutoModelForCausalLM.from_pretrained(place, local_files_only=True).float().eval()
        for name, place in {"dense": folder, "narrow": out}.items()
    }
    lines = [
        "## Three quarters of heads and channels, loaded by transformers",
        "",
        f"A random Llama in float32, {said}; {int(sizes['parameters']):,} of {whole:,} parameters. Logits differ from "
        f"those of the model with zeros by {off:.1e} of the largest. CPU time of a forward pass without a cache, one "
        "thread, both in turns:",
        "",
        "| tokens | dense, ms | narrow, ms | ratio | spread, dense and narrow |",
        "| --- | --- | --- | --- | --- |",
    ]
    for tokens in TOKENS:
        given = torch.randint(0, 2048, (1, tokens), generator=torch.Generator().manual_seed(1))
        calls = {name: [partial(m, input_ids=given, use_cache=False)] for name, m in both.items()}
        timed = time_cpu(calls, Sampling(window_ms=200.0, samples=15))
        dense, narrow = timed["dense"], timed["narrow"]
        spreads = ", ".join(f"{one.p90_ms / one.median_ms - 1:.1%}" for one in (dense, narrow))
        lines.append(
            f"| {tokens} | {dense.median_ms:.2f} | {narrow.median_ms:.2f} | {narrow.median_ms / dense.median_ms:.3f} "
            f"| {spreads} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
