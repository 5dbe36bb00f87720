"""The lines that every table of a benchmark begins with: when, where, with what, and how to print it again."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
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
