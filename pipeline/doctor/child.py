"""A question to a process of its own, for what is heavy, may crash or hang, or must be another process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

CHILD_SECONDS = 60.0  # `import torch` took 7 s on a machine with a load of 7


@dataclass(frozen=True)
class Answer:
    """What a process answered.

    Args:
        value: what it printed last, read as JSON; None if it failed.
        failure: why it failed, empty if it did not.
    """

    value: Any
    failure: str = ""


def ask(script: str, *arguments: str) -> Answer:
    """Run a script in a fresh interpreter that finds the same modules as this one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-c", script, *arguments]
    options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "timeout": CHILD_SECONDS}
    try:
        done = subprocess.run(command, check=False, env=environment, **options)
    except subprocess.TimeoutExpired:
        return Answer(None, f"no answer within {CHILD_SECONDS:g} s")
    if done.returncode < 0:
        return Answer(None, f"ended by a signal: {signal.strsignal(-done.returncode)}")
    try:
        return Answer(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        said = done.stderr.strip().splitlines()
        return Answer(None, said[-1] if said else f"ended with code {done.returncode} and no answer")
