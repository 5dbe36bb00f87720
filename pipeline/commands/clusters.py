"""Commands that hand a workflow to a cluster: `submit`."""

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
    load,
)
from layerwise.pipeline.commands.printing import print_outcome

if TYPE_CHECKING:
    from layerwise.results.store import Store


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
    prepared = Run(load(workflow, param, set_, profile), results.absolute(), open_display())
    if kuberay:
        from layerwise.pipeline.cluster.kuberay import DEFAULT_IMAGE, Pods, write_manifest

        write_manifest(prepared, Pods(image or DEFAULT_IMAGE, workers, deadline_seconds=deadline), output)
    else:
        from layerwise.pipeline.cluster.handover import hand_over

        end_with(hand_over(prepared, options, wait), prepared.store, prepared.id)


def end_with(code: int | None, store: Store, run: str) -> NoReturn:
    """End a command that handed a run over; with nothing to hand over, it is finished."""
    if code is None:
        print(f"run {run} is finished already", file=sys.stderr)
        print_outcome(store, run)
    raise typer.Exit(code or 0)
