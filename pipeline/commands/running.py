"""Commands that run a workflow here or go on with a run: `run`, `resume`."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from layerwise.pipeline.commands.clusters import end_with
from layerwise.pipeline.commands.options import (
    RESULTS,
    STOPPED,
    AddressOption,
    File,
    InClearOption,
    OneRunArgument,
    ParamOption,
    PassOption,
    ProfileOption,
    RequireAuthOption,
    ResultsOption,
    SetOption,
    ShipOption,
    WaitOption,
    agree,
    check_executor,
    load,
    open_store,
)
from layerwise.pipeline.commands.printing import print_outcome

if TYPE_CHECKING:
    from layerwise.pipeline.runs.run import Run


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

    check_executor(executor)
    with _stoppable():
        prepared = Run(load(workflow, param, set_, profile), results, open_display())
        if dry_run:
            for plan in prepared.plan():
                state = "cached" if plan.artifact else f"would run ({plan.reason})"
                print(f"{plan.node.id}: {state}")
                for text in plan.notes:
                    print(f"  note: {text}")
            return
        agree(prepared.workflow)
        _execute(prepared, executor, address=address)
    print_outcome(prepared.store, prepared.id)


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
    trust: Annotated[bool, typer.Option("--trust", help="let code of the run's model run, if it asks for it")] = False,
) -> None:
    """Go on with a run from its own folder; its workflow file is not needed. A submitted run is submitted again."""
    from layerwise.pipeline.cluster.handover import Changes, again
    from layerwise.pipeline.display import open_display
    from layerwise.pipeline.runs.lifecycle import reopen
    from layerwise.pipeline.runs.status import run_state

    if executor is not None:
        check_executor(executor)
    store = open_store(results.absolute())
    state = run_state(store, run)
    passed = None if pass_env is None else tuple(pass_env)
    changes = Changes(ship, passed, require_auth or None, in_clear or None, wait or None)
    options = again(state, address, executor, sys.argv, changes)
    if options is not None and state.status != "ok":
        from layerwise.pipeline.cluster.terminal import hand_over

        end_with(hand_over(reopen(store, state, open_display(), trust), options, wait), store, state.run)
    with _stoppable():
        if state.status == "ok":
            print(f"run {state.run} is finished already", file=sys.stderr)
        else:
            _execute(
                reopen(store, state, open_display(), trust), executor or state.executor, wait=False, address=address
            )
    print_outcome(store, state.run)


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
    """End in good order on SIGTERM, Ctrl-C and a closed terminal, and say how to go on."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` has it ignored
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: {_again()}", file=sys.stderr)
        raise typer.Exit(STOPPED) from None


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _again() -> str:
    return shlex.join(["layerwise", *sys.argv[1:]])
