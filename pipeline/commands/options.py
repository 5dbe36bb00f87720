"""Arguments and options that several commands share, and what they turn into."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from layerwise.pipeline.workflow import Workflow
    from layerwise.results.store import Store

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
RecordedOption = Annotated[
    str | None,
    typer.Option(metavar="URL", help="a cluster that the results folder names and that you trust: ask it, too"),
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


def check_executor(name: str) -> None:
    """Refuse an unknown one at once, not when the first stage needs it."""
    from layerwise.errors import UsageError
    from layerwise.pipeline.executors import executor_names
    from layerwise.pipeline.workflow.report import suggest

    if name not in executor_names():
        raise UsageError(f"unknown executor '{name}'{suggest(name, executor_names())}")


def load(path: Path, param: list[str] | None, sets: list[str] | None, profile: str | None) -> Workflow:
    """The workflow that a command line names.

    Raises:
        UsageError: a parameter without its value, or no such file.
        WorkflowError: all mistakes in the file.
    """
    from layerwise.errors import UsageError
    from layerwise.pipeline.workflow import load_workflow

    params = {}
    for text in param or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"-p {text}: expected NAME=VALUE")
        params[name] = value
    return load_workflow(path, params=params, sets=sets or [], profile=profile)


def agree(workflow: Workflow) -> None:
    """Keep what a workflow that the user runs says of trust, so that the run can be resumed."""
    from layerwise.pipeline.consent import name_model

    if workflow.model.trust:
        name_model(workflow.model.name)


def name_recorded(address: str | None, in_clear: bool) -> None:
    """Keep that the user names a cluster that a results folder speaks of.

    Raises:
        UsageError: no address, or one that is none.
    """
    from layerwise.errors import UsageError
    from layerwise.pipeline.cluster.connection import plain_address
    from layerwise.pipeline.consent import name_cluster

    if address is not None:
        name_cluster(plain_address(address), in_clear=in_clear)
    elif in_clear:
        raise UsageError("--allow-insecure-http: to which cluster?", hint="name it by --address")


def open_store(results: Path) -> Store:
    """The store of a results folder that is there already."""
    from layerwise.results.store import Store

    return Store.open(results)
