"""The `layerwise` command: gathers the commands of `commands/`, and turns errors into messages and exit codes."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, NoReturn

import typer

from layerwise import __version__
from layerwise.pipeline.commands.clusters import manifest, submit
from layerwise.pipeline.commands.following import logs, runs, status, stop
from layerwise.pipeline.commands.machine import bench, doctor
from layerwise.pipeline.commands.results import frontier, show
from layerwise.pipeline.commands.running import resume, run
from layerwise.pipeline.commands.workflows import graph, schema, validate

COMMANDS = (
    *(run, submit, manifest),
    *(validate, schema, graph),
    *(runs, status, logs, stop, resume),
    *(frontier, show),
    *(bench, doctor),
)
"""In the order of `layerwise --help`."""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"layerwise {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and leave")
    ] = False,
) -> None:
    """Spend a compression budget layer by layer."""


for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Entry point: turns what a user can mend into a message and an exit code."""
    from layerwise.errors import LayerwiseError
    from layerwise.pipeline.encoding import never_fail

    never_fail()
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
