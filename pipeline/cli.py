"""The command line: one thin function per command, no logic that a library user could miss.

stdout carries the answer, stderr the story. Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import logging
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

if TYPE_CHECKING:
    import pandas as pd

    from layerwise.pipeline.runs.run import Run
    from layerwise.pipeline.runs.status import RunState
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
RunArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="a run id, its start, or a workflow's name; the newest run if left out"),
]
OneRunArgument = Annotated[str, typer.Argument(metavar="RUN", help="a run id, its start, or a workflow's name")]
AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="join a running Ray cluster that sees the same files: auto, host:port or ray://host:port",
    ),
]
WaitOption = Annotated[
    bool, typer.Option("--wait", help="follow the log, and end with the run's exit code; Ctrl-C leaves it running")
]
RequireAuthOption = Annotated[bool, typer.Option("--require-auth", help="refuse a cluster that asks for no token")]
InClearOption = Annotated[
    bool, typer.Option("--allow-insecure-http", help="send the token over plain HTTP to another machine")
]
ShipOption = Annotated[
    bool | None,
    typer.Option("--ship/--no-ship", help="send the local files that the workflow names, or leave them where they are"),
]
PassOption = Annotated[
    list[str] | None,
    typer.Option("--pass-env", metavar="NAME", help="hand a variable on to the job, readable for everyone there"),
]
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
    address: AddressOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what is cached and what would run")] = False,
) -> None:
    """Run a workflow; what is done already is not done again."""
    from layerwise.pipeline.display import open_display
    from layerwise.pipeline.runs.run import Run

    _check_executor(executor)
    with _stoppable():
        prepared = Run(_load(workflow, param, set_, profile), results, open_display())
        if dry_run:
            for plan in prepared.plan():
                state = "cached" if plan.artifact else f"would run ({plan.reason})"
                print(f"{plan.node.id}: {state}")
            return
        _execute(prepared, executor, address=address)
    _print_outcome(prepared.store, prepared.id)


@app.command()
def submit(
    workflow: File,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="the cluster's dashboard, e.g. http://127.0.0.1:8265")
    ] = None,
    param: ParamOption = None,
    set_: SetOption = None,
    profile: ProfileOption = None,
    results: ResultsOption = RESULTS,
    wait: WaitOption = False,
    require_auth: RequireAuthOption = False,
    ship: ShipOption = None,
    pass_env: PassOption = None,
    in_clear: InClearOption = False,
    kuberay: Annotated[bool, typer.Option("--kuberay", help="print a RayJob for KubeRay instead")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="where to, for it")] = None,
    image: Annotated[str | None, typer.Option(help="its image, with layerwise in it")] = None,
    workers: Annotated[int, typer.Option(min=0, help="its pods beside the head")] = 0,
    deadline: Annotated[int | None, typer.Option(min=1, metavar="SECONDS", help="its longest time")] = None,
) -> None:
    """Hand a workflow to a Ray cluster, and go home: `status`, `logs -f`, `stop` and `resume` find it again."""
    from layerwise.pipeline.cluster.connection import plain_address
    from layerwise.pipeline.cluster.submit import Options, check_usage
    from layerwise.pipeline.display import open_display
    from layerwise.pipeline.runs.run import Run
    from layerwise.results.destination import check_destination

    pods = {"-o": output, "--image": image, "--workers": workers, "--deadline": deadline}
    there = {"--wait": wait, "--require-auth": require_auth, "--allow-insecure-http": in_clear}
    shipping = {} if ship is None else {"--ship" if ship else "--no-ship": True}
    check_usage(address, kuberay, pods, {**there, **shipping, "--pass-env": tuple(pass_env or ())})
    if output is not None:
        check_destination(output)
    plain = "" if address is None else plain_address(address)
    options = Options(plain, ship is not False, require_auth, tuple(pass_env or ()), in_clear, tuple(sys.argv))
    prepared = Run(_load(workflow, param, set_, profile), results.absolute(), open_display())
    if kuberay:
        from layerwise.pipeline.cluster.kuberay import DEFAULT_IMAGE, Pods, write_manifest

        write_manifest(prepared, Pods(image or DEFAULT_IMAGE, workers, deadline_seconds=deadline), output)
    else:
        from layerwise.pipeline.cluster.handover import hand_over

        _end_with(hand_over(prepared, options, wait), prepared.store, prepared.id)


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
    from layerwise.pipeline.runs.status import checked_runs_table

    _print_table(checked_runs_table(_open(results)), format_)


@app.command()
def status(run: RunArgument = None, results: ResultsOption = RESULTS, format_: FormatOption = "table") -> None:
    """Say how every run stands, or how each stage of one run does."""
    from layerwise.pipeline.cluster.handover import print_how_to_go_on
    from layerwise.pipeline.runs.status import run_state, run_states, runs_status_table, stages_status_table

    store, readable = _open(results), format_ in TO_READ
    if run is None:
        states = run_states(store)
        _print_table(runs_status_table(states, readable), format_)
    else:
        states = [run_state(store, run)]
        _print_run_state(states[0], stages_status_table(states[0], readable), format_)
    for state in states:
        if readable:
            print_how_to_go_on(store, state)


@app.command()
def logs(
    run: RunArgument = None,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="go on until the run ends, and end with its exit code")
    ] = False,
    stage: Annotated[str | None, typer.Option(help="only lines about this stage")] = None,
    attempt: Annotated[int | None, typer.Option(help="of which start of the run; the latest if left out")] = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Print the log of a run's latest attempt."""
    from layerwise.pipeline.cluster.handover import print_log_to_its_end
    from layerwise.pipeline.runs.lifecycle import check_stage, find_attempt, read_log
    from layerwise.pipeline.runs.status import run_state

    store = _open(results)
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


@app.command()
def stop(
    run: OneRunArgument,
    timeout: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="how long to wait for its end")] = 60.0,
    results: ResultsOption = RESULTS,
) -> None:
    """Stop a run on this machine, or one that was submitted; what is finished is kept."""
    from layerwise.pipeline.cluster.handover import print_how_to_go_on
    from layerwise.pipeline.runs.lifecycle import stop as stop_run

    store = _open(results)
    state = stop_run(store, run, timeout)
    if state.status == "ok":
        print(f"run {state.run} was finished before it could be stopped", file=sys.stderr)
    else:
        print_how_to_go_on(store, state)


@app.command()
def resume(
    run: OneRunArgument,
    results: ResultsOption = RESULTS,
    executor: Annotated[
        str | None, typer.Option(help="where the work runs: ray or inline; as the last time if left out")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="of a running Ray cluster: http(s)://... to submit it there, or as in `run`"
        ),
    ] = None,
    wait: WaitOption = False,
    require_auth: RequireAuthOption = False,
    ship: ShipOption = None,
    pass_env: PassOption = None,
    in_clear: InClearOption = False,
) -> None:
    """Go on with a run from its own folder; its workflow file is not needed. A submitted run is submitted again."""
    from layerwise.pipeline.cluster.submit import again
    from layerwise.pipeline.display import open_display
    from layerwise.pipeline.runs.lifecycle import reopen
    from layerwise.pipeline.runs.status import run_state

    if executor is not None:
        _check_executor(executor)
    store = _open(results.absolute())
    state = run_state(store, run)
    flags = {"require_auth": require_auth, "in_clear": in_clear, "wait": wait}
    changes = {"ships": ship, "pass_env": pass_env, **{name: flag or None for name, flag in flags.items()}}
    options = again(state, address, executor, sys.argv, changes)
    if options is not None and state.status != "ok":
        from layerwise.pipeline.cluster.handover import hand_over

        _end_with(hand_over(reopen(store, state, open_display()), options, wait), store, state.run)
    with _stoppable():
        if state.status == "ok":
            print(f"run {state.run} is finished already", file=sys.stderr)
        else:
            _execute(reopen(store, state, open_display()), executor or state.executor, wait=False, address=address)
    _print_outcome(store, state.run)


@app.command()
def frontier(
    run: RunArgument = None,
    over: Annotated[
        Literal["bits", "effective_bits", "bytes", "ms"], typer.Option(help="the cost on one axis")
    ] = "bits",
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


@app.command()
def bench(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="what computes")] = "cpu",
    shapes: Annotated[
        list[str] | None, typer.Option(metavar="OUTxIN", help="weights, e.g. 4096x4096,11008x4096")
    ] = None,
    m: Annotated[list[str] | None, typer.Option("--m", metavar="ROWS", help="rows of activations, e.g. 1,16")] = None,
    bits: Annotated[list[str] | None, typer.Option(metavar="BITS", help="of the codes, e.g. 4,8")] = None,
    group_size: Annotated[
        list[str] | None, typer.Option(metavar="COLUMNS", help="that share a scale, e.g. 128,-1 (-1 for the whole row)")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="of the activations; float32 on a processor, float16 on a GPU if left out")
    ] = None,
    samples: Annotated[int, typer.Option(min=3, help="of each time; their median counts")] = 9,
    window_ms: Annotated[float, typer.Option(min=0.01, help="CPU time of one sample at least")] = 60.0,
    max_spread: Annotated[
        float, typer.Option(min=0.001, help="(median - minimum) / minimum above which times are refused")
    ] = 0.1,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="also save the table of times, as JSON whatever --format says"
        ),
    ] = None,
    format_: FormatOption = "table",
) -> None:
    """Time the kernels on this device, beside the dense product; `ratio` is how many times faster they are."""
    from layerwise.errors import NoisyMeasurement
    from layerwise.kernels.timing import Sampling
    from layerwise.pipeline import bench as benchmark
    from layerwise.pipeline.display import Pace, left

    if output is not None:
        benchmark.check_output(output)
    pace = Pace()

    def tell(done: int, total: int, note: str) -> None:
        if done < total:
            print(f"{done} of {total}: {note}{left(pace.remaining(done, total, ''))}", file=sys.stderr, flush=True)

    task = benchmark.Bench(
        shapes=benchmark.read_shapes(shapes or []) or benchmark.SHAPES,
        rows=benchmark.read_numbers(m or [], "rows") or benchmark.ROWS,
        bits=benchmark.read_numbers(bits or [], "bits") or benchmark.BITS,
        group_sizes=benchmark.read_numbers(group_size or [], "group size") or benchmark.GROUP_SIZES,
        device=device,
        dtype=dtype,
        sampling=Sampling(window_ms, samples, max_spread=max_spread),
    )
    for note in task.notes():
        print(f"note: {note}", file=sys.stderr)
    noisy: NoisyMeasurement | None = None
    stopped = False
    try:
        task.run(tell)
    except NoisyMeasurement as error:
        noisy = error
    except KeyboardInterrupt:
        stopped = True
        print(f"\nstopped after {len(task.measured)} times; they follow", file=sys.stderr)
    frame = task.frame()
    if format_ in TO_READ:
        print(f"device: {task.here.name}\n")
        frame = frame.drop(columns="device")
    _print_table(frame, format_)
    if output is not None:
        task.save(output)
        print(f"wrote {output}", file=sys.stderr)
    if noisy is not None:
        raise noisy
    if stopped:
        raise typer.Exit(STOPPED)


@app.command()
def doctor(
    results: ResultsOption = RESULTS,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="also check the cluster there, e.g. http://127.0.0.1:8265")
    ] = None,
    format_: Annotated[Literal["table", "json"], typer.Option("--format", help="how to print the findings")] = "table",
) -> None:
    """Check what layerwise needs: versions, Ray, this machine, the results folder, a cluster."""
    from layerwise.pipeline.doctor import as_json, as_line, examine

    findings = []
    for name, finding in examine(results, address):
        findings.append((name, finding))
        if format_ == "table":
            print(as_line(name, finding), flush=True)
    if format_ == "json":
        print(as_json(findings))
    if any(finding.state == "problem" for _, finding in findings):
        raise typer.Exit(1)


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


def _end_with(code: int | None, store: Store, run: str) -> NoReturn:
    """End a command that handed a run over; with nothing to hand over, it is finished."""
    if code is None:
        print(f"run {run} is finished already", file=sys.stderr)
        _print_outcome(store, run)
    raise typer.Exit(code or 0)


def _execute(prepared: Run, executor: str, *, address: str | None, wait: bool = True) -> None:
    from layerwise.errors import StoreError

    try:
        prepared.execute(executor, sys.argv, wait=wait, address=address)
    except StoreError:
        raise  # says itself what to do
    except Exception:
        print(f"after mending it, go on with: {_again()}", file=sys.stderr)
        raise


@contextmanager
def _stoppable() -> Iterator[None]:
    """End in good order on SIGTERM and Ctrl-C, and say how to go on."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: {_again()}", file=sys.stderr)
        raise typer.Exit(STOPPED) from None


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
    _print_table(stages, format_)


def _print_frontier(frame: pd.DataFrame, format_: Format) -> None:
    """A frontier; for people without the columns that say the same in every row."""
    if format_ in TO_READ and len(frame):
        same = frame.iloc[0]
        text = "" if same["ranked_by"] == "kl" else f" on {same['heldout_data']}"
        print(f"run {same['run']}, Pareto frontier by {same['ranked_by']}{text}\n")
        frame = frame.drop(columns=["run", "metric", "heldout_data", "ranked_by"])
        frame = frame.drop(columns=[name for name in ("on_front",) if frame[name].all()])
        frame = frame.drop(columns=[name for name in ("ms",) if frame[name].isna().all()])
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
