"""Collecting the mistakes of a workflow, and the words that all of them share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from layerwise.errors import Problem
from layerwise.pipeline.yaml12 import KeyPath, Place, dotted


class Report:
    """Collects mistakes, each once, so that all of them can be shown together."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(self, place: Place, path: KeyPath, text: str) -> None:
        """Note a mistake; `path` is empty when the text says it all."""
        problem = place.problem(f"{dotted(path)}: {text}" if path else text)
        if problem not in self.problems:
            self.problems.append(problem)


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing if no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def suggest(name: str, known: Iterable[str]) -> str:
    """What to write instead of a wrong name: the nearest known one, or all of them if none is near."""
    names = list(known)
    return nearest(name, names) or (f" (known: {', '.join(names)})" if names else "")


def describe(value: Any) -> str:
    """A value from a file, in words: `text 'abc'`, `the number 2.5`, `a list`."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"the whole number {value}"
    if isinstance(value, float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"text '{value if len(value) <= 60 else value[:57] + '...'}'"
    return "a map" if isinstance(value, dict) else "a list"
