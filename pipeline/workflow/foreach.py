"""One stage entry, many instances: the items of every `foreach`.

`foreach: [ilp, evolve]` on a stage `search` gives `search@ilp` and `search@evolve`, and `${{ item }}` inside the stage
is the item. `foreach: ${{ needs.search }}` gives one instance for each of those, with the same items: both stages run
along the same axis, and an instance takes its inputs from the instances with its own item.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from layerwise.pipeline.workflow.expressions import Names, Unknown, aligned_stage, resolve, unresolved
from layerwise.pipeline.workflow.limits import MAX_INSTANCES, MAX_NAME
from layerwise.pipeline.workflow.report import Report, describe, suggest
from layerwise.pipeline.workflow.yaml12 import KeyPath, Tree


@dataclass(frozen=True)
class Item:
    """One item of a `foreach`: the end of the instance's id, and what `${{ item }}` means."""

    suffix: str
    value: Tree | Unknown
    axis: str | None = None
    index: int = 0


_UNKNOWN = Item("?", Unknown())
"""Stands for the items of a `foreach` with a mistake, so that the rest of its stage is still checked."""


@dataclass
class Items:
    """The items of every `foreach`, found on demand because one may follow another.

    Args:
        entries: the stages of the file.
        names: what an expression in a `foreach` may use.
    """

    entries: Mapping[str, Tree]
    names: Names
    report: Report
    _found: dict[str, list[Item | None]] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)

    def of(self, name: str) -> list[Item | None]:
        """The items of a stage; `[None]` for a stage without `foreach`."""
        if name not in self._found:
            self._open.append(name)
            self._found[name] = self._find(name)
            self._open.pop()
        return self._found[name]

    def _find(self, name: str) -> list[Item | None]:
        foreach = self.entries[name].entries.get("foreach")
        if foreach is None:
            return [None]
        path: KeyPath = ("stages", name, "foreach")
        followed = aligned_stage(foreach)
        if followed is not None:
            return self._follow(foreach, followed, path)
        tree = resolve(foreach, self.names, path, self.report)
        if isinstance(tree.value, list) and len(tree.value) > MAX_INSTANCES:
            text = f"{len(tree.value):,} items are too many: a workflow has at most {MAX_INSTANCES} stages"
            self.report.add(foreach.place, path, text)
            return [_UNKNOWN]
        if isinstance(tree.value, list) and tree.value:
            return self._unroll(tree.value, name, path)
        if not unresolved(tree):
            found = "an empty list" if isinstance(tree.value, list) else describe(tree.value)
            text = f"must be a list, ${{{{ params.x }}}} or ${{{{ needs.x }}}}, got {found}"
            self.report.add(foreach.place, path, text)
        return [_UNKNOWN]

    def _follow(self, foreach: Tree, followed: str, path: KeyPath) -> list[Item | None]:
        """The items of another stage."""
        if followed not in self.entries:
            others = [entry for entry in self.entries if entry != path[1]]
            self.report.add(foreach.place, path, f"unknown stage id '{followed}'{suggest(followed, others)}")
        elif followed in self._open:
            circle = " -> ".join([*self._open[self._open.index(followed) :], followed])
            self.report.add(foreach.place, path, f"foreach follows itself in a circle: {circle}")
        elif (items := self.of(followed)) == [None]:
            self.report.add(foreach.place, path, f"'{followed}' has no foreach, so there is nothing to follow")
        else:
            return items
        return [_UNKNOWN]

    def _unroll(self, values: Sequence[Tree], name: str, path: KeyPath) -> list[Item | None]:
        items: dict[str, Item] = {}
        for index, value in enumerate(values):
            suffix = _suffix(value, index)
            length = len(name) + 1 + len(suffix)
            if length > MAX_NAME:
                text = f"'{name}@{suffix[:20]}...' would be the name of a stage, and {length} characters are too long: "
                self.report.add(value.place, (*path, index), f"{text}at most {MAX_NAME}; give the item a short `name`")
            if suffix in items:
                self.report.add(value.place, (*path, index), f"'{suffix}' is listed twice; stage ids must differ")
            items.setdefault(suffix, Item(suffix, value, name, index))
        return list(items.values())


def _suffix(item: Tree, index: int) -> str:
    """The end of an instance's id: the text of the item, its `name`, or else its index."""
    named = item.get("name") if isinstance(item.value, dict) else item
    if named is None or isinstance(named.value, dict | list) or named.value in (None, ""):
        return str(index)
    text = str(named.value).lower() if isinstance(named.value, bool) else str(named.value)
    return re.sub(r"[^\w.:%+-]+", "-", text)
