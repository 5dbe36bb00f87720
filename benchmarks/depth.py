"""Dropping half-blocks by search beside every way to drop as many: does evolution find the best of them?

    python benchmarks/depth.py [--dropped 3] [--set PATH=VALUE]      # writes benchmarks/results/depth.md

Runs `workflows/depth.yaml` with ten seeds, from the integer program's solution and from a random one, then measures
every allocation with so many half-blocks dropped on the same text with the same evaluator. A search has found the
optimum if its allocation is that of least KL.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import header

from layerwise.pipeline.display import open_display
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.workflow import Workflow, load_workflow
from layerwise.results.runs import latest_stages
from layerwise.stages.data.text import Tokens, load_sequences
from layerwise.stages.evaluate.evaluator import Evaluator
from layerwise.stages.evaluate.scoring import Genome, Request
from layerwise.stages.levels.database import Database
from layerwise.stages.models.causal_lm import CausalLM

HERE = Path(__file__).parent
WORKFLOW = HERE.parent / "workflows" / "depth.yaml"
SEEDS = 10
STARTS = ("ilp", "random")


def main() -> None:
    """Search, enumerate, report."""
    parser = argparse.ArgumentParser(description="Depth search beside enumeration.")
    parser.add_argument("--dropped", type=int, default=3, help="half-blocks that go")
    parser.add_argument("--results", type=Path, default=HERE.parent / "layerwise-results")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as in `layerwise run -s`")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for start in STARTS:
        sets = [f"params.seeds={list(range(SEEDS))}", f"params.start={start}", *arguments.set]
        run, workflow = _run(arguments.results, sets)
        keys = [row["stage_key"] for row in latest_stages(run.store, run.id).values() if row["uses"] == "allocate"]
        found[start] = run.store.rows("allocations", stage_key=keys)
    losses = _enumerated(run, workflow, arguments.dropped)
    lines = [
        "# Three of twelve half-blocks: search beside enumeration",
        "",
        *header("depth.py", ["layerwise", "torch", "transformers"]),
        "",
        *_report(found, losses),
        "",
    ]
    text = "\n".join(lines)
    (HERE / "results" / "depth.md").write_text(text, encoding="utf-8")
    print(text)


def _run(results: Path, sets: Sequence[str]) -> tuple[Run, Workflow]:
    workflow = load_workflow(WORKFLOW, sets=sets)
    run = Run(workflow, results, open_display())
    run.execute("inline", sys.argv)
    return run, workflow


def _enumerated(run: Run, workflow: Workflow, dropped: int) -> dict[Genome, float]:
    """KL on the search text of every allocation that drops so many."""
    folder = run.folder / "stages"
    database = Database((folder / "levels").resolve(), run.sources.model)
    count = len(database.units)
    sequences = _search_text(run, workflow)
    evaluator = Evaluator(CausalLM.load(run.sources.model), sequences, database, batch_tokens=2048)
    drop = [
        next(i for i, level in enumerate(unit.levels) if level.name == "drop") if unit.is_parent else None
        for unit in database.units
    ]
    halves = [index for index, level in enumerate(drop) if level is not None]
    genomes = []
    for chosen in itertools.combinations(halves, dropped):
        genomes.append(tuple((drop[index] or 0) if index in chosen else 0 for index in range(count)))
    scores = evaluator(Request(tuple(genomes)))
    return {genome: score["kl"]["mean"] for genome, score in zip(genomes, scores, strict=True)}


def _search_text(run: Run, workflow: Workflow) -> Any:
    import numpy as np

    from layerwise.stages.data.text import cut, encode

    source = run.sources.data["calibration"]
    target = run.folder / "search-tokens.npy"
    np.save(target, cut(encode(source, run.sources.model.path), source))
    return load_sequences(Tokens(target, 0))


def _report(found: dict[str, list[dict[str, Any]]], losses: dict[Genome, float]) -> list[str]:
    ranked = sorted(losses, key=losses.__getitem__)
    best, second = losses[ranked[0]], losses[ranked[1]]
    lines = [
        f"{len(losses)} allocations; KL of the best {best:.5f}, of the second {second:.5f}, of the worst "
        f"{losses[ranked[-1]]:.5f}.",
        "",
        "| start | seeds that found the optimum | worst rank | KL, mean over seeds | candidates evaluated, mean |",
        "| --- | --- | --- | --- | --- |",
    ]
    for start, rows in found.items():
        ranks = [ranked.index(tuple(row["genome"])) + 1 for row in rows]
        mean = sum(row["kl"] for row in rows) / len(rows)
        effort = sum(row["evaluations"] for row in rows) / len(rows)
        hits = f"{sum(rank == 1 for rank in ranks)} of {len(rows)}"
        lines.append(f"| {start} | {hits} | {max(ranks)} | {mean:.5f} | {effort:.0f} |")
    return lines


if __name__ == "__main__":
    main()
