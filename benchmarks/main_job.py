"""Every solver on one language model: held-out KL at five budgets, and the tokens that each evaluated.

    python benchmarks/main_job.py [demo] [stories260k]      # writes benchmarks/results/main_job-<model>.md

Runs `main_job.yaml`, so every candidate is in the results store and an interrupted benchmark goes on where it was. The
search text and the held-out text are different files. Standard errors are over held-out sequences; two solvers are
compared in pairs, sequence by sequence, because their sequences are the same. A difference below its standard error
is called a tie.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from machine import header, table
from real_models import OVERRIDES, at_hand

from layerwise.pipeline.display import open_display
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.workflow import Workflow, load_workflow
from layerwise.results.runs import latest_stages
from layerwise.results.store import Store
from layerwise.stages.compress import find_compressor

HERE = Path(__file__).parent
WORKFLOW = HERE / "main_job.yaml"
PROFILED = ("greedy", "ilp", "dp", "evolve-ilp")
FAMILIES = ("uniform", "greedy", "ilp", "dp", "evolve-uniform", "evolve-ilp")


def main() -> None:
    """Run and report the models named on the command line."""
    parser = argparse.ArgumentParser(description="Compare the solvers on real models.")
    parser.add_argument("models", nargs="*", choices=list(OVERRIDES), help="default: all that are here")
    parser.add_argument("--results", type=Path, default=HERE.parent / "layerwise-results")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as in `layerwise run -s`")
    arguments = parser.parse_args()
    for model in at_hand(arguments.models or OVERRIDES):
        settings = [*OVERRIDES[model], f"name=main-job-{model}", *arguments.set]
        workflow = load_workflow(WORKFLOW, sets=settings)
        run = Run(workflow, arguments.results, open_display())
        run.execute("ray", sys.argv)
        text = report(model, run.store, run.id, workflow)
        target = HERE / "results" / f"main_job-{model}.md"
        target.write_text(text, encoding="utf-8")
        print(text)


Searches = dict[str, list[dict[str, Any]]]
"""Family to its allocations, each a row of the results store with `sequences`, its held-out KL by sequence."""


def report(model: str, store: Store, run: str, workflow: Workflow) -> str:
    """The tables, as Markdown."""
    allocations = _allocations(store, run)
    budgets = list(dict.fromkeys(row["budget"] for row in allocations["ilp"]))
    return "\n".join(
        [
            f"# Solvers on {model}",
            "",
            *_header(workflow),
            "",
            "## Held-out KL to the dense model, nats per token",
            "",
            "Mean over seeds where there are several, with the least and the greatest in brackets.",
            "",
            *_kl_table(allocations, budgets),
            "",
            "## In pairs, against the ILP",
            "",
            "Difference of held-out KL, and its standard error over sequences (seeds averaged within a sequence).",
            "",
            *_pairs_table(allocations, budgets),
            "",
            "## What each evaluated",
            "",
            *_effort_table(allocations, budgets),
            "",
            "## On the data that was searched",
            "",
            *_start_table(allocations, budgets),
            "",
            "## One bit-width for the whole model: GPTQ and round to nearest",
            "",
            *_rounding_table(store, run),
            "",
        ]
    )


def _header(workflow: Workflow) -> list[str]:
    search, heldout = workflow.data["calibration"], workflow.data["heldout"]
    (menu,) = (node.resolved()["with"]["menu"] for node in workflow.nodes if node.id == "levels")
    levels = [name for entry in menu for name in find_compressor(entry["method"]).params(**entry).level_names()]
    return [
        *header("main_job.py", ["layerwise", "torch", "transformers", "ray", "pulp", "highspy"]),
        f"- searched on {search.tokens} tokens, held out {heldout.tokens}, sequences of {search.sequence_length}",
        f"- levels: {', '.join(levels)}; budgets in average bits per weight",
    ]


def _allocations(store: Store, run: str) -> Searches:
    """What each family found, with the held-out KL of every sequence."""
    stages = latest_stages(store, run)
    score = json.loads((store.root / "runs" / run / "stages" / "score" / "metrics.json").read_text(encoding="utf-8"))
    found: Searches = {family: [] for family in FAMILIES}
    for stage, record in stages.items():
        name = stage.removeprefix("search@")
        family = name.rstrip("0123456789").removesuffix("-")
        if name == stage or family not in found:
            continue
        for row in store.rows("allocations", stage_key=record["stage_key"]):
            found[family].append({**row, "sequences": score[row["candidate"]]["kl"]["sequences"]})
    return found


def _of(rows: Sequence[dict[str, Any]], budget: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["budget"] == budget]


def _kl_table(found: Searches, budgets: Sequence[str]) -> list[str]:
    def cell(family: str, budget: str) -> str:
        values = [fmean(row["sequences"]) for row in _of(found[family], budget)]
        spread = f" [{min(values):.4f}, {max(values):.4f}]" if len(values) > 1 else ""
        return f"{fmean(values):.4f}{spread}"

    return table(
        ["budget", *FAMILIES], ([budget, *(cell(family, budget) for family in FAMILIES)] for budget in budgets)
    )


def _pairs_table(found: Searches, budgets: Sequence[str]) -> list[str]:
    def cell(family: str, budget: str) -> str:
        (ilp,) = (row["sequences"] for row in _of(found["ilp"], budget))
        seeds = [row["sequences"] for row in _of(found[family], budget)]
        differences = [fmean(values) - base for values, base in zip(zip(*seeds, strict=True), ilp, strict=True)]
        mean, stderr = fmean(differences), stdev(differences) / len(differences) ** 0.5
        verdict = "tie" if abs(mean) <= stderr else "better" if mean < 0 else "worse"
        return f"{mean:+.5f} ± {stderr:.5f} {verdict}"

    others = [family for family in FAMILIES if family != "ilp"]
    return table(["budget", *others], ([budget, *(cell(family, budget) for family in others)] for budget in budgets))


def _effort_table(found: Searches, budgets: Sequence[str]) -> list[str]:
    def cells(family: str) -> Iterator[str]:
        rows = found[family]
        yield family
        yield f"{rows[0]['profile_tokens'] / 1e6:.2f} M" if family in PROFILED else "none"
        yield f"{fmean(row['tokens'] for row in rows) / 1e6:.2f} M"
        yield f"{fmean(row['evaluations'] for row in rows):.0f}"
        yield f"{fmean(row['seconds'] for row in rows):.1f}"

    head = ["solver", "profile tokens", "search tokens per budget", "evaluations per budget", "seconds per budget"]
    return table(head, (list(cells(family)) for family in FAMILIES))


def _start_table(found: Searches, budgets: Sequence[str]) -> list[str]:
    """No search may end above its start, and nothing above its budget."""

    def cells(family: str) -> Iterator[str]:
        start = family.removeprefix("evolve-")
        above = sum(
            row["kl"] > first["kl"] + 1e-9
            for budget in budgets
            for row in _of(found[family], budget)
            for first in _of(found[start], budget)
        )
        yield family
        yield f"{above} of {len(found[family])}"

    rows = ["evolve-uniform", "evolve-ilp"]
    over = sum(
        row["bits"] > float(row["budget"].removeprefix("bits=")) + 1e-9 for rows_ in found.values() for row in rows_
    )
    total = sum(map(len, found.values()))
    return [
        *table(["search", "ended above its start"], (list(cells(family)) for family in rows)),
        "",
        f"Allocations above their budget: {over} of {total}.",
    ]


def _rounding_table(store: Store, run: str) -> list[str]:
    def scores(method: str) -> dict[str, float]:
        folder = store.root / "runs" / run / "stages"
        metrics = json.loads((folder / f"{method}-score" / "metrics.json").read_text(encoding="utf-8"))
        chosen = json.loads((folder / f"{method}-uniform" / "allocations.json").read_text(encoding="utf-8"))
        return {row["budget"]: metrics[row["candidate"]]["kl"]["mean"] for row in chosen}

    gptq, rtn = scores("gptq"), scores("rtn")
    return table(
        ["bits", "GPTQ", "round to nearest", "ratio"],
        (
            [bits.removeprefix("bits="), f"{gptq[bits]:.5f}", f"{rtn[bits]:.5f}", f"{gptq[bits] / rtn[bits]:.2f}"]
            for bits in gptq
        ),
    )


if __name__ == "__main__":
    main()
