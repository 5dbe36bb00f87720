"""Dropping half-blocks by search beside every way to drop as many: does evolution find the best of them?

    python benchmarks/depth.py [--dropped 4] [--set PATH=VALUE]      # writes benchmarks/results/depth.md

Runs `workflows/depth.yaml` with ten seeds, from the integer program's solution and from a random one, then measures
every allocation with so many half-blocks dropped on the same text with the same evaluator. A search has found the
optimum if its allocation is that of least KL. Beside it stand the workflow's baselines, by their rank among all.

What a search took is told in three ways: candidates, most of which saw a part of the text only; those that saw all of
it; and tokens, in texts. The profile that the integer program starts from is not in them.
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
FEW = [f"stages.search.with.{name}" for name in ("generations=8", "offspring=12", "survivors_per_selection=[3,1]")]
"""Eight generations, of which each measures twelve candidates on a part of the text and four on all of it."""
WORKFLOW = HERE.parent / "workflows" / "depth.yaml"
SEEDS = 10
STARTS = ("ilp", "random")
BLOCKS = 6
"""Of the demo model."""


def main() -> None:
    """Search, enumerate, report."""
    parser = argparse.ArgumentParser(description="Depth search beside enumeration.")
    parser.add_argument("--dropped", type=int, default=4, help="half-blocks that go, of twelve")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS, help="where searches start")
    parser.add_argument("--results", type=Path, default=HERE.parent / "layerwise-results")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as in `layerwise run -s`")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for start in arguments.starts:
        depth = f"params.depth=[{BLOCKS - arguments.dropped / 2:g}]"
        sets = [f"params.seeds={list(range(SEEDS))}", f"params.start={start}", depth, *FEW, *arguments.set]
        run, workflow = _run(arguments.results, sets)
        stages = [row for row in latest_stages(run.store, run.id).values() if row["uses"] == "allocate"]
        searches = [row["stage_key"] for row in stages if row["stage"].startswith("search")]
        found[start] = [_with_effort(run, row) for row in run.store.rows("allocations", stage_key=searches)]
        baselines = {
            row["stage"]: run.store.rows("allocations", stage_key=[row["stage_key"]])[0]
            for row in stages
            if row["stage_key"] not in searches
        }
    losses = _enumerated(run, workflow, arguments.dropped)
    lines = [
        f"# {arguments.dropped} of {2 * BLOCKS} half-blocks: search and baselines beside enumeration",
        "",
        *header(" ".join(["depth.py", *sys.argv[1:]]), ["layerwise", "torch", "transformers"]),
        "",
        *_report(found, baselines, losses),
        "",
    ]
    text = "\n".join(lines)
    (HERE / "results" / "depth.md").write_text(text, encoding="utf-8")
    print(text)


def _with_effort(run: Run, row: dict[str, Any]) -> dict[str, Any]:
    """An allocation with what its search took: candidates that saw all of the text, and texts in all."""
    tokens = [one["n_tokens"] for one in run.store.rows("candidates", stage_key=[row["stage_key"]])]
    return {**row, "whole": sum(count == max(tokens) for count in tokens), "texts": sum(tokens) / max(tokens)}


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


def _report(
    found: dict[str, list[dict[str, Any]]], baselines: dict[str, dict[str, Any]], losses: dict[Genome, float]
) -> list[str]:
    ranked = sorted(losses, key=losses.__getitem__)
    best, second = losses[ranked[0]], losses[ranked[1]]
    lines = [
        f"{len(losses)} allocations; KL of the best {best:.5f}, of the second {second:.5f}, of the worst "
        f"{losses[ranked[-1]]:.5f}. A tenth of them is {len(losses) / 10:g}.",
        "",
        "| start | seeds that found the optimum | worst rank | KL, mean over seeds | candidates, mean | on all of the "
        "text, mean and most | texts, mean and most |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for start, rows in found.items():
        ranks = [ranked.index(tuple(row["genome"])) + 1 for row in rows]
        candidates = _mean([row["evaluations"] for row in rows])
        taken = [[row[name] for row in rows] for name in ("whole", "texts")]
        efforts = " | ".join(f"{_mean(some):.1f}, {max(some):.1f}" for some in taken)
        hits = f"{sum(rank == 1 for rank in ranks)} of {len(rows)}"
        loss = _mean([row["kl"] for row in rows])
        lines.append(f"| {start} | {hits} | {max(ranks)} | {loss:.5f} | {candidates:.0f} | {efforts} |")
    lines += ["", "| baseline | rank | KL |", "| --- | --- | --- |"]
    for name, row in baselines.items():
        rank = ranked.index(tuple(row["genome"])) + 1 if tuple(row["genome"]) in losses else None
        lines.append(f"| {name} | {rank or 'drops another number'} | {row['kl']:.5f} |")
    return lines


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
