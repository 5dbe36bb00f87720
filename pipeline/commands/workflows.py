"""Commands about a workflow file, which run nothing: `validate`, `schema`, `graph`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from layerwise.pipeline.commands.options import File, ParamOption, ProfileOption, SetOption, load


def validate(
    workflow: File,
    param: ParamOption = None,
    set_: SetOption = None,
    profile: ProfileOption = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="print the file with every default filled in")] = False,
) -> None:
    """Check a workflow file without running it."""
    loaded = load(workflow, param, set_, profile)
    if resolved:
        from layerwise.pipeline.workflow.yaml12 import dump

        print(dump(loaded.resolved()), end="")
    else:
        print(f"{workflow}: {len(loaded.nodes)} stages, no errors")


def schema(
    stage: Annotated[str | None, typer.Option(help="only the parameters of this stage")] = None,
) -> None:
    """Print the JSON Schema of workflow files, for editors."""
    import json

    from layerwise.pipeline.workflow.schema import workflow_schema

    print(json.dumps(workflow_schema(stage), indent=2))


def graph(
    workflow: File,
    param: ParamOption = None,
    set_: SetOption = None,
    profile: ProfileOption = None,
    format_: Annotated[Literal["text", "mermaid"], typer.Option("--format", help="how to draw it")] = "text",
) -> None:
    """Draw the stages of a workflow and what flows between them."""
    from layerwise.pipeline.workflow.graph import draw_mermaid, draw_text

    loaded = load(workflow, param, set_, profile)
    print(draw_text(loaded) if format_ == "text" else draw_mermaid(loaded))
