"""Tables of names, ours first, then what installed packages offer.

A literal table can be read and grepped, and means the same in every process; entry points let other people's packages
join without touching ours.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from layerwise.errors import UsageError


def names(table: Mapping[str, object], group: str) -> list[str]:
    """Every name on offer, ours before those of other packages."""
    return [*table, *(point.name for point in entry_points(group=group) if point.name not in table)]


def nearest(name: str, known: list[str]) -> str:
    """A half sentence that leads from a wrong name to the right one."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


Model = TypeVar("Model")


def params_beside(run: Any, base: type[Model], name: str) -> type[Model]:
    """The class `Params` of the module that a method's function stands in.

    Args:
        run: the function.
        base: what the class must be derived from.
        name: of the method, for the error.
    Raises:
        UsageError: there is no such class.
    """
    params = getattr(sys.modules[run.__module__], "Params", None)
    if not (isinstance(params, type) and issubclass(params, base)):
        raise UsageError(
            f"method '{name}': {run.__module__} has no class Params, a {base.__name__}, beside its function"
        )
    return params


def lookup(name: str, table: Mapping[str, object], *, group: str, kind: str) -> Any:
    """The object behind a name.

    Args:
        name: as the user wrote it.
        table: ours: the object itself, or `"module:object"` for what must not be imported before it is needed.
        group: the entry point group where other packages offer theirs.
        kind: what the thing is called in an error ("stage", "compressor").
    Raises:
        UsageError: nobody offers the name.
    """
    if name in table:
        found = table[name]
        if not isinstance(found, str):
            return found
        module, _, attribute = found.partition(":")
        return getattr(import_module(module), attribute)
    for point in entry_points(group=group):
        if point.name == name:
            return point.load()
    raise UsageError(f"unknown {kind} '{name}' ({nearest(name, names(table, group))})")
