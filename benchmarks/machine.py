"""What pages of benchmarks have in common: the lines that they begin with (when, where, with what, how to print it
again), and tables."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version


def header(script: str, packages: Sequence[str], gpu: str = "no GPU") -> list[str]:
    """Date, machine class, versions and command (without where the results were put), as Markdown list items."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    arguments = sys.argv[1:]
    if "--results" in arguments:
        place = arguments.index("--results")
        arguments = arguments[:place] + arguments[place + 2 :]
    return [
        f"- {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} CPU cores, shared, {gpu}",
        f"- Python {platform.python_version()}, {versions}",
        f"- command: `{' '.join(['python', f'benchmarks/{script}', *arguments])}`",
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
