"""What pruning costs: methods, patterns, uniform or searched, alone and with rounding in the same pass at equal bytes.

    python benchmarks/sparsity.py [sparsity] [prune_and_round] [--models demo stories260k]
                                                     # writes benchmarks/results/<part>-<model>.md

Each part is a workflow beside this file; its table has every allocation with what it scores on held-out text.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from machine import header, table
from real_models import OVERRIDES, at_hand

from layerwise.pipeline.display import open_display
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.workflow import load_workflow
from layerwise.results.runs import latest_stages

HERE = Path(__file__).parent
PARTS = {
    "sparsity": "Pruning alone: three methods, uniform and searched",
    "prune_and_round": "Bits alone, and pruning with rounding in one pass, at the same bytes",
}
SETS = {
    ("sparsity", "demo"): ["stages.profile.with.tokens=1024"],
    ("prune_and_round", "demo"): ["stages.profile.with.tokens=1024"],
    ("prune_and_round", "stories260k"): ["params.bytes=[225000,232000,240000,255000,270000,290000]"],
}
"""What a part needs to be told of a model: budgets in bytes, and less text where a model takes longer."""


def main() -> None:
    """Run and report what is named on the command line."""
    parser = argparse.ArgumentParser(description="Measure pruning on real models.")
    parser.add_argument("parts", nargs="*", choices=list(PARTS), help="default: all")
    parser.add_argument("--models", nargs="*", choices=list(OVERRIDES), default=list(OVERRIDES))
    parser.add_argument("--results", type=Path, default=HERE.parent / "layerwise-results")
    arguments = parser.parse_args()
    for part in arguments.parts or list(PARTS):
        for model in at_hand(arguments.models):
            _report(part, model, arguments.results)


def _report(part: str, model: str, results: Path) -> None:
    sets = [*OVERRIDES[model], *SETS.get((part, model), []), f"name={part}-{model}"]
    run = Run(load_workflow(HERE / f"{part}.yaml", sets=sets), results, open_display())
    run.execute("inline", sys.argv)
    lines = [
        f"# {PARTS[part]}: {model}",
        "",
        *header("sparsity.py", ["layerwise", "torch", "transformers"]),
        "",
        *_table(run),
        "",
    ]
    (HERE / "results" / f"{part}-{model}.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def _table(run: Run) -> list[str]:
    """One row for each allocation, by budget and held-out KL."""
    stages = latest_stages(run.store, run.id)
    named = {row["stage_key"]: name for name, row in stages.items()}
    metrics: dict[tuple[str, str], dict[str, Any]] = {}
    for row in run.store.rows("metrics", stage_key=[row["stage_key"] for row in stages.values()]):
        if row["data"] == "heldout":
            metrics[row["candidate"], row["metric"]] = row
    keys = [row["stage_key"] for row in stages.values() if row["uses"] == "allocate"]
    rows = []
    for row in run.store.rows("allocations", stage_key=keys):
        kl, perplexity = (metrics.get((row["candidate"], name)) for name in ("kl", "perplexity"))
        if kl is None or perplexity is None:
            continue
        rows.append((row["budget"], kl["value"], named[row["stage_key"]], row, kl, perplexity))
    lines = [
        [
            row["budget"],
            stage,
            f"{row['density']:.4f}",
            f"{row['effective_bits']:.3f}",
            f"{row['bytes']:,}",
            f"{kl['value']:.4f} ± {kl['stderr']:.4f}",
            f"{perplexity['value']:.2f}",
        ]
        for _, _, stage, row, kl, perplexity in sorted(rows, key=lambda entry: entry[:3])
    ]
    head = ["budget", "allocation", "density", "effective bits", "bytes", "held-out KL", "held-out perplexity"]
    return [
        *table(head, lines),
        "",
        f"The dense model has a held-out perplexity of {metrics['dense', 'perplexity']['value']:.2f}.",
    ]


if __name__ == "__main__":
    main()
