"""What there is to choose from: the head and the embedding as units, depth and sparsity beside bits, pruning first.

    python benchmarks/menu.py [whole_file] [joint] [prune_then_quantize] [--models demo stories260k]
                                                     # writes benchmarks/results/menu-<part>-<model>.md, and a picture

Each part is a workflow; its table is the run's allocations with what they score on held-out text, by rising bytes. The
native export of a run is measured beside the predicted bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from machine import header, table
from real_models import OVERRIDES, at_hand

from layerwise.pipeline.display import open_display
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.workflow import load_workflow
from layerwise.results.frontier import frontier_table
from layerwise.results.plot import plot_frontier
from layerwise.results.runs import latest_stages
from layerwise.stages.models.compressed import Document

if TYPE_CHECKING:
    import pandas as pd

HERE = Path(__file__).parent
WORKFLOWS = HERE.parent / "workflows"
PARTS = {
    "whole_file": (HERE / "whole_file.yaml", "The head and the embedding as units, and without them"),
    "joint": (WORKFLOWS / "joint.yaml", "Bits, depth and sparsity in one search"),
    "prune_then_quantize": (WORKFLOWS / "prune_then_quantize.yaml", "Prune, then quantize, beside quantization alone"),
}
SETS: dict[tuple[str, str], list[str]] = {
    ("prune_then_quantize", "stories260k"): ["params.bytes=[225000,240000,255000,270000,300000]"],
}
"""What a part needs to be told of a model: budgets in bytes."""


def main() -> None:
    """Run and report what is named on the command line."""
    parser = argparse.ArgumentParser(description="Compare menus on real models.")
    parser.add_argument("parts", nargs="*", choices=list(PARTS), help="default: all")
    parser.add_argument("--models", nargs="*", choices=list(OVERRIDES), default=list(OVERRIDES))
    parser.add_argument("--results", type=Path, default=HERE.parent / "layerwise-results")
    arguments = parser.parse_args()
    for part in arguments.parts or list(PARTS):
        for model in at_hand(arguments.models):
            _report(part, model, arguments.results)


def _report(part: str, model: str, results: Path) -> None:
    path, title = PARTS[part]
    sets = [*OVERRIDES[model], *SETS.get((part, model), []), f"name={path.stem}-{model}"]
    run = Run(load_workflow(path, sets=sets), results, open_display())
    run.execute("inline", sys.argv)
    frame = frontier_table(run.store, run.id, over="bytes", dominated=True)
    target = HERE / "results" / f"menu-{part}-{model}.md"
    plot_frontier(frame, target.with_suffix(".png"), "bytes")
    lines = [
        f"# {title}: {model}",
        "",
        *header("menu.py", ["layerwise", "torch", "transformers"]),
        "",
        *_table(frame),
        "",
        *_levels(run, frame),
        *_files(run),
        f"![held-out KL over bytes]({target.with_suffix('.png').name})",
        "",
    ]
    target.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def _table(frame: pd.DataFrame) -> list[str]:
    columns = ["stage", "budget", "bits", "effective_bits", "bytes", "parameters", "depth", "kl", "heldout_kl"]
    rows = [
        [f"{row[name]:.5g}" if isinstance(row[name], float) else str(row[name]) for name in columns]
        + ["yes" if row["on_front"] else ""]
        for _, row in frame.iterrows()
    ]
    return table([*columns, "on front"], rows)


def _levels(run: Run, frame: pd.DataFrame) -> list[str]:
    """What the allocations on the front are made of."""
    from collections import Counter

    stages = latest_stages(run.store, run.id).values()
    keys = [row["stage_key"] for row in stages if row["uses"] == "allocate"]
    found = {row["candidate"]: row for row in run.store.rows("allocations", stage_key=keys)}
    lines = ["What those on the front are made of:", ""]
    for _, row in frame[frame["on_front"]].iterrows():
        levels = Counter(level for level in found[row["candidate"]]["levels"] if level != "keep")
        lines.append(f"- {row['bytes']:,} bytes: " + ", ".join(f"{n} x {level}" for level, n in levels.most_common()))
    return [*lines, ""]


def _files(run: Run) -> list[str]:
    """Native exports beside their predictions."""
    from safetensors import safe_open

    lines = []
    for name, row in latest_stages(run.store, run.id).items():
        file = run.folder / "stages" / name / "model.safetensors"
        if row["uses"] != "export" or not file.is_file():
            continue
        with safe_open(file, framework="pt") as opened:
            tensors = [opened.get_tensor(key) for key in opened.keys()]  # noqa: SIM118
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        model = run.folder / "stages" / name.replace("file", "model" if "@" in name else "best")
        predicted = Document.load(model).about["allocation"]["sizes"]["bytes"]
        header_bytes = file.stat().st_size - size
        lines.append(
            f"`{name}`: predicted {predicted:,} bytes, tensors in the file {size:,}, and a header of {header_bytes:,}."
        )
    return [*lines, ""] if lines else []


if __name__ == "__main__":
    main()
