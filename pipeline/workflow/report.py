"""Collecting the mistakes of a workflow, and the words that all of them share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from layerwise.errors import Mistake
from layerwise.pipeline.workflow.yaml12 import KeyPath, Place, dotted


class Report:
    """Collects mistakes, each once, so that all of them can be shown together."""

    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []

    def add(self, place: Place, path: KeyPath, text: str) -> None:
        """Note a mistake; `path` is empty when the text says it all."""
        mistake = place.mistake(f"{dotted(path)}: {text}" if path else text)
        if mistake not in self.mistakes:
            self.mistakes.append(mistake)


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that a wrong one most likely stands for."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing if no known name is near."""
    close = nearest_name(name, known)
    return "" if close is None else f" (did you mean '{close}'?)"


def suggest(name: str, known: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """What to write instead of a wrong name.

    Args:
        known: the nearest of these, if one is near.
        listed: otherwise all of these; those known if left out.
    """
    names = list(known)
    shown = ", ".join(names if listed is None else listed)
    return nearest(name, names) or (f" (known: {shown})" if shown else "")


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
