"""Commands that bring a workflow to a cluster: `submit`, `manifest`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from layerwise.pipeline.commands.options import (
    RESULTS,
    File,
    InClearOption,
    ParamOption,
    PassOption,
    ProfileOption,
    RequireAuthOption,
    ResultsOption,
    SetOption,
    ShipOption,
    WaitOption,
    agree,
    load,
)
from layerwise.pipeline.commands.printing import print_outcome

if TYPE_CHECKING:
    from layerwise.results.store import Store


def submit(
    workflow: File,
    address: Annotated[str, typer.Option(metavar="URL", help="the cluster's dashboard, e.g. http://127.0.0.1:8265")],
    param: ParamOption = None,
    set_: SetOption = None,
    profile: ProfileOption = None,
    results: ResultsOption = RESULTS,
    wait: WaitOption = False,
    require_auth: RequireAuthOption = False,
    ship: ShipOption = None,
    pass_env: PassOption = None,
    in_clear: InClearOption = False,
) -> None:
    """Hand a workflow to a Ray cluster, and go home: `status`, `logs -f`, `stop` and `resume` find it again."""
    from layerwise.pipeline.cluster.connection import plain_address
    from layerwise.pipeline.cluster.handover import Options
    from layerwise.pipeline.cluster.terminal import hand_over
    from layerwise.pipeline.display import open_display
    from layerwise.pipeline.runs.run import Run

    options = Options(
        plain_address(address),
        ships=ship is not False,
        require_auth=require_auth,
        pass_env=tuple(pass_env or ()),
        in_clear=in_clear,
        argv=tuple(sys.argv),
    )
    prepared = Run(load(workflow, param, set_, profile), results.absolute(), open_display())
    agree(prepared.workflow)
    end_with(hand_over(prepared, options, wait), prepared.store, prepared.id)


def manifest(
    workflow: File,
    param: ParamOption = None,
    set_: SetOption = None,
    profile: ProfileOption = None,
    results: ResultsOption = RESULTS,
    image: Annotated[str | None, typer.Option(help="of the pods, with layerwise in it")] = None,
    workers: Annotated[int, typer.Option(min=0, help="pods beside the head")] = 0,
    deadline: Annotated[int | None, typer.Option(min=1, metavar="SECONDS", help="the longest time")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="write it there")] = None,
) -> None:
    """Print a RayJob for KubeRay that runs a workflow on a cluster of its own."""
    from layerwise.pipeline.cluster.kuberay import DEFAULT_IMAGE, Pods, write_manifest
    from layerwise.pipeline.display import open_display
    from layerwise.pipeline.runs.run import Run
    from layerwise.results.destination import check_destination

    pods = Pods(DEFAULT_IMAGE if image is None else image, workers, deadline_seconds=deadline)
    if output is not None:
        check_destination(output)
    write_manifest(Run(load(workflow, param, set_, profile), results.absolute(), open_display()), pods, output)


def end_with(code: int | None, store: Store, run: str) -> NoReturn:
    """End a command that handed a run over; with nothing to hand over, it is finished."""
    if code is None:
        print(f"run {run} is finished already", file=sys.stderr)
        print_outcome(store, run)
    raise typer.Exit(code or 0)
