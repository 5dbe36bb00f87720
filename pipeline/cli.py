"""The command line: one thin function per command, no logic that a library user could miss.

stdout carries the answer, stderr the story. Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import logging
import shlex
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

if TYPE_CHECKING:
    import pandas as pd

    from layerwise.pipeline.run import Run
    from layerwise.pipeline.workflow import Workflow
    from layerwise.results.store import Store

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Spend a compression budget layer by layer.",
)

STOPPED = 3
"""Exit code of a run that was interrupted and can go on."""


Format = Literal["table", "csv", "json", "markdown"]
TO_READ: tuple[Format, ...] = ("table", "markdown")
"""Formats for people; the others are for programs, which get every column and every digit."""

File = Annotated[Path, typer.Argument(metavar="WORKFLOW", help="workflow file (YAML)")]
ParamOption = Annotated[
    list[str] | None, typer.Option("-p", "--param", metavar="NAME=VALUE", help="set a declared parameter")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="PATH=VALUE", help="set any key, e.g. stages.search.with.seed=1"),
]
ProfileOption = Annotated[str | None, typer.Option("--profile", help="lay a block of `profiles:` over the file")]
ResultsOption = Annotated[Path, typer.Option("--results", metavar="DIR", help="results folder")]
FormatOption = Annotated[Format, typer.Option("--format", help="how to print the table")]
RESULTS = Path("layerwise-results")


@app.command()
def run(
    workflow: File,
    param: ParamOption = None,
    set_: SetOption = None,
    profile: ProfileOption = None,
    results: ResultsOption = RESULTS,
    executor: Annotated[str, typer.Option(help="where the work runs: ray or inline")] = "ray",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what is cached and what would run")] = False,
) -> None:
    """Run a workflow; what is done already is not done again."""
    from layerwise.pipeline.display import open_display
    from layerwise.pipeline.run import Run

    _check_executor(executor)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        prepared = Run(_load(workflow, param, set_, profile), results, open_display())
        if dry_run:
            for plan in prepared.plan():
                state = "cached" if plan.artifact else f"would run ({plan.reason})"
                print(f"{plan.node.id}: {state}")
            return
        _execute(prepared, executor)
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: {_again()}", file=sys.stderr)
        raise typer.Exit(STOPPED) from None
    _print_outcome(prepared.store, prepared.id)


@app.command()
def validate(
    workflow: File,
    param: ParamOption = None,
    set_: SetOption = None,
    profile: ProfileOption = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="print the file with every default filled in")] = False,
) -> None:
    """Check a workflow file without running it."""
    loaded = _load(workflow, param, set_, profile)
    if resolved:
        from layerwise.pipeline.workflow.yaml12 import dump

        print(dump(loaded.resolved()), end="")
    else:
        print(f"{workflow}: {len(loaded.nodes)} stages, no errors")


@app.command()
def schema(
    stage: Annotated[str | None, typer.Option(help="only the parameters of this stage")] = None,
) -> None:
    """Print the JSON Schema of workflow files, for editors."""
    import json

    from layerwise.pipeline.workflow.schema import workflow_schema

    print(json.dumps(workflow_schema(stage), indent=2))


@app.command()
def graph(
    workflow: File,
    param: ParamOption = None,
    set_: SetOption = None,
    profile: ProfileOption = None,
    format_: Annotated[Literal["text", "mermaid"], typer.Option("--format", help="how to draw it")] = "text",
) -> None:
    """Draw the stages of a workflow and what flows between them."""
    from layerwise.pipeline.workflow.graph import build_graph, draw_mermaid, draw_text

    drawn = build_graph(_load(workflow, param, set_, profile))
    print(draw_text(drawn) if format_ == "text" else draw_mermaid(drawn))


@app.command()
def runs(results: ResultsOption = RESULTS, format_: FormatOption = "table") -> None:
    """List the runs of a results folder, the newest first."""
    from layerwise.results.runs import runs_table

    _print_table(runs_table(_open(results)), format_)


@app.command()
def frontier(
    run: Annotated[
        str | None, typer.Argument(help="a run id, its start, or a workflow's name; the newest run if left out")
    ] = None,
    over: Annotated[Literal["bits", "effective_bits", "bytes"], typer.Option(help="the cost on one axis")] = "bits",
    loss: Annotated[
        Literal["heldout_kl", "heldout_perplexity", "kl"] | None,
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

    store = _open(results)
    read = partial(frontier_table, store, run, over=over, loss=loss, stage=stage, solver=solver)
    if plot is not None:
        from layerwise.results.plot import plot_frontier

        plot_frontier(read(dominated=True), plot, over, loss, dense_losses(store, run))
        print(f"wrote {plot}", file=sys.stderr)
    _print_frontier(read(dominated=all_), format_)


@app.command()
def show(
    allocation: Annotated[str, typer.Argument(help="a candidate, or the start of its id, as `frontier` prints it")],
    results: ResultsOption = RESULTS,
    format_: FormatOption = "table",
) -> None:
    """Print one allocation: the level of every unit."""
    from layerwise.results.format import format_table
    from layerwise.results.runs import show_allocation

    details = show_allocation(_open(results), allocation)
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
    _print_table(details.units, format_)
    if format_ in TO_READ and len(details.metrics):
        print()
        _print_table(details.metrics, format_)


def main() -> None:
    """Entry point: turns what a user can mend into a message and an exit code."""
    from layerwise.errors import LayerwiseError

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        app()
    except LayerwiseError as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        _fail(f"error: {error}{notes}", error.exit_code)
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        sys.exit(0)  # `layerwise frontier | head` is no error; typer has seen to a quiet end, but with code 1


def _fail(text: str, code: int) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(code)


def _execute(prepared: Run, executor: str) -> None:
    try:
        prepared.execute(executor, sys.argv)
    except Exception:
        print(f"after mending it, go on with: {_again()}", file=sys.stderr)
        raise


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _again() -> str:
    return shlex.join(["layerwise", *sys.argv[1:]])


def _check_executor(name: str) -> None:
    """Refuse an unknown one at once, not when the first stage needs it."""
    from layerwise.errors import UsageError
    from layerwise.pipeline.executors import executor_names
    from layerwise.stages.registry import nearest

    if name not in executor_names():
        raise UsageError(f"unknown executor '{name}' ({nearest(name, executor_names())})")


def _load(path: Path, param: list[str] | None, sets: list[str] | None, profile: str | None) -> Workflow:
    from layerwise.errors import UsageError
    from layerwise.pipeline.workflow import load_workflow

    params = {}
    for text in param or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"-p {text}: expected NAME=VALUE")
        params[name] = value
    return load_workflow(path, params=params, sets=sets or [], profile=profile)


def _open(results: Path) -> Store:
    from layerwise.results.store import Store

    return Store.open(results)


def _print_table(frame: pd.DataFrame, format_: Format) -> None:
    from layerwise.results.format import format_table

    print(format_table(frame, format_), end="")


def _print_frontier(frame: pd.DataFrame, format_: Format) -> None:
    """A frontier; for people without the columns that say the same in every row."""
    if format_ in TO_READ and len(frame):
        same = frame.iloc[0]
        text = "" if same["ranked_by"] == "kl" else f" on {same['heldout_data']}"
        print(f"run {same['run']}, Pareto frontier by {same['ranked_by']}{text}\n")
        frame = frame.drop(columns=["run", "metric", "heldout_data", "ranked_by"])
        frame = frame.drop(columns=[name for name in ("on_front",) if frame[name].all()])
    _print_table(frame, format_)


def _print_outcome(store: Store, run: str) -> None:
    """What a finished run is for: its frontier, and where its checkpoints are."""
    from layerwise.results.frontier import frontier_table
    from layerwise.results.runs import latest_stages

    stages = latest_stages(store, run)
    if any(row["uses"] == "allocate" for row in stages.values()):
        _print_frontier(frontier_table(store, run), "table")
    for stage, row in stages.items():
        if row["uses"] == "export":
            print(f"{stage}: {store.root / 'runs' / run / 'stages' / stage}", file=sys.stderr)
