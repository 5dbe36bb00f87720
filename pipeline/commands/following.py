"""Commands about what becomes of runs: `runs`, `status`, `logs`, `stop`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from layerwise.pipeline.commands.options import (
    RESULTS,
    TO_READ,
    Format,
    FormatOption,
    InClearOption,
    OneRunArgument,
    RecordedOption,
    ResultsOption,
    RunArgument,
    name_recorded,
    open_store,
)
from layerwise.pipeline.commands.printing import print_table

if TYPE_CHECKING:
    import pandas as pd

    from layerwise.pipeline.runs.status import RunState


def runs(results: ResultsOption = RESULTS, format_: FormatOption = "table") -> None:
    """List the runs of a results folder, the newest first."""
    from layerwise.pipeline.runs.status import checked_runs_table

    print_table(checked_runs_table(open_store(results)), format_)


def status(
    run: RunArgument = None,
    address: RecordedOption = None,
    in_clear: InClearOption = False,
    results: ResultsOption = RESULTS,
    format_: FormatOption = "table",
) -> None:
    """Say how every run stands, or how each stage of one run does."""
    from layerwise.pipeline.cluster.terminal import print_how_to_go_on
    from layerwise.pipeline.runs.status import run_state, run_states, runs_status_table, stages_status_table

    name_recorded(address, in_clear)
    store, readable = open_store(results), format_ in TO_READ
    if run is None:
        states = run_states(store)
        print_table(runs_status_table(states, readable), format_)
    else:
        states = [run_state(store, run)]
        _print_run_state(states[0], stages_status_table(states[0], readable), format_)
    for state in states:
        if readable:
            print_how_to_go_on(store, state)


def logs(
    run: RunArgument = None,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="go on until the run ends, and end with its exit code")
    ] = False,
    stage: Annotated[str | None, typer.Option(help="only lines about this stage")] = None,
    attempt: Annotated[int | None, typer.Option(help="of which start of the run; the latest if left out")] = None,
    address: RecordedOption = None,
    in_clear: InClearOption = False,
    results: ResultsOption = RESULTS,
) -> None:
    """Print the log of a run's latest attempt."""
    from layerwise.pipeline.cluster.terminal import print_log_to_its_end
    from layerwise.pipeline.runs.lifecycle import check_stage, find_attempt, read_log
    from layerwise.pipeline.runs.status import run_state

    name_recorded(address, in_clear)
    store = open_store(results)
    state = run_state(store, run)
    if stage is not None:
        check_stage(state, stage)
    number = find_attempt(store, state.run, attempt)
    if number > 1 and attempt is None:
        print(f"attempt {number}; --attempt {number - 1} shows the one before", file=sys.stderr)
    if follow:
        raise typer.Exit(print_log_to_its_end(store, state.run, number, stage))
    for line in read_log(store, state.run, number, stage):
        print(line)


def stop(
    run: OneRunArgument,
    timeout: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="how long to wait for its end")] = 60.0,
    address: RecordedOption = None,
    in_clear: InClearOption = False,
    results: ResultsOption = RESULTS,
) -> None:
    """Stop a run on this machine, or one that was submitted; what is finished is kept."""
    from layerwise.pipeline.cluster.terminal import print_how_to_go_on
    from layerwise.pipeline.runs.lifecycle import stop as stop_run

    name_recorded(address, in_clear)
    store = open_store(results)
    state = stop_run(store, run, timeout)
    if state.status == "ok":
        print(f"run {state.run} was finished before it could be stopped", file=sys.stderr)
    else:
        print_how_to_go_on(store, state)


def _print_run_state(state: RunState, stages: pd.DataFrame, format_: Format) -> None:
    """A run stage by stage, below what is known of the run as a whole."""
    if format_ == "json":
        import json

        from layerwise.pipeline.runs.status import runs_status_table
        from layerwise.results.format import format_table

        (facts,), listed = (json.loads(format_table(t, "json")) for t in (runs_status_table([state]), stages))
        print(json.dumps({"run": facts, "stages": listed}))
        return
    if format_ in TO_READ:
        from layerwise.results.format import format_value

        started = f"started {format_value(state.started_at)} on {state.where}"
        job = "" if state.submission is None else f", as job {state.submission.job} at {state.submission.address}"
        print(f"run {state.run}: {state.status}, attempt {state.number} ({state.executor}), {started}{job}\n")
        if state.error is not None and state.attempt is None:
            print(f"{state.error}\n")
    print_table(stages, format_)
