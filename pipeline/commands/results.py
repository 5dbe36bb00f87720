"""Commands that read what runs found: `frontier`, `show`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from layerwise.pipeline.commands.options import RESULTS, TO_READ, FormatOption, ResultsOption, RunArgument, open_store
from layerwise.pipeline.commands.printing import print_after_repair, print_frontier, print_table
from layerwise.results.resources import RESOURCES


def frontier(
    run: RunArgument = None,
    over: Annotated[str, typer.Option(help=f"the cost on one axis: {', '.join(RESOURCES)}")] = "bits",
    loss: Annotated[
        Literal["heldout_kl", "heldout_perplexity", "heldout_accuracy", "kl"] | None,
        typer.Option(help="the loss on the other; held-out KL if everything has it"),
    ] = None,
    stage: Annotated[str | None, typer.Option(help="only allocations of this stage")] = None,
    solver: Annotated[str | None, typer.Option(help="only allocations of this solver")] = None,
    all_: Annotated[bool, typer.Option("--all", help="also allocations that another one beats")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="draw it into a PNG, PDF or SVG")] = None,
    results: ResultsOption = RESULTS,
    format_: FormatOption = "table",
) -> None:
    """Print the Pareto frontier of a run."""
    from layerwise.results.frontier import dense_losses, frontier_table

    store = open_store(results)
    read = partial(frontier_table, store, run, over=over, loss=loss, stage=stage, solver=solver)
    if plot is not None:
        from layerwise.results.plot import plot_frontier

        plot_frontier(read(dominated=True), plot, over, loss, dense_losses(store, run))
        print(f"wrote {plot}", file=sys.stderr)
    print_frontier(read(dominated=all_), format_, over)
    if format_ in TO_READ:
        print_after_repair(read(dominated=True))


def show(
    allocation: Annotated[str, typer.Argument(help="a candidate, or the start of its id, as `frontier` prints it")],
    results: ResultsOption = RESULTS,
    format_: FormatOption = "table",
) -> None:
    """Print one allocation: the level of every unit."""
    from layerwise.results.format import format_table
    from layerwise.results.runs import show_allocation

    details = show_allocation(open_store(results), allocation)
    if format_ == "json":
        import json

        tables = {"units": details.units, "metrics": details.metrics}
        records = {name: json.loads(format_table(table, "json")) for name, table in tables.items()}
        print(json.dumps({"allocation": details.summary, **records}, default=str))
        return
    if format_ in TO_READ:
        from layerwise.results.format import format_value

        for name, value in details.summary.items():
            print(f"{name}: {format_value(value)}")
        print()
    print_table(details.units, format_)
    if format_ in TO_READ and len(details.metrics):
        print()
        print_table(details.metrics, format_)
