"""`${{ params.x }}`, `${{ item }}`, `${{ item.key }}`: look-ups in a workflow file, after it is parsed.

A scalar that is nothing but an expression becomes the value it names, with its type, be it a list or a map; inside
longer text the value is written out. Nothing else: no arithmetic, no functions and no templating, so that a file can be
read, and checked, without running it. A value keeps the place where it was written, because that is where it is mended.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from layerwise.pipeline.workflow.limits import wrong_text
from layerwise.pipeline.workflow.report import Report, describe, suggest
from layerwise.pipeline.workflow.yaml12 import KeyPath, Tree

_MARK = "${{"
_EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)
_LOOKUP = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
_NEEDS = re.compile(r"\$\{\{\s*needs\.([^\s}]+)\s*\}\}")


@dataclass(frozen=True)
class Unknown:
    """A name whose value could not be found out, because of a mistake reported elsewhere; it makes no further ones."""


Names = Mapping[str, Tree | Unknown]


class _LookUpError(Exception):
    """Why a look-up has no value; an empty text if that is known already."""


def resolve(tree: Tree, names: Names, path: KeyPath, report: Report) -> Tree:
    """The tree with every expression replaced by what it names.

    Args:
        names: `params`, and `item` inside a stage with `foreach`.
        path: where the tree stands in the file, for the report.
    Returns:
        The resolved tree; an expression that cannot be resolved is reported and stays as it is.
    """
    if isinstance(tree.value, dict):
        return replace(
            tree, value={key: resolve(child, names, (*path, key), report) for key, child in tree.value.items()}
        )
    if isinstance(tree.value, list):
        children = [resolve(child, names, (*path, index), report) for index, child in enumerate(tree.value)]
        return replace(tree, value=children)
    if not isinstance(tree.value, str) or _MARK not in tree.value:
        return tree
    try:
        return _resolve_text(tree, tree.value, names)
    except _LookUpError as failure:
        if str(failure):
            report.add(tree.place, path, str(failure))
        return tree


def unresolved(tree: Tree) -> bool:
    """Whether an expression is left in a value or inside it."""
    return any(isinstance(child.value, str) and _MARK in child.value for _, child in tree.walk())


def aligned_stage(tree: Tree) -> str | None:
    """The stage that `foreach: ${{ needs.stage }}` follows, if that is what stands there."""
    match = _NEEDS.fullmatch(tree.value.strip()) if isinstance(tree.value, str) else None
    return match[1] if match else None


def _resolve_text(tree: Tree, text: str, names: Names) -> Tree:
    whole = _EXPRESSION.fullmatch(text.strip())
    if whole and _MARK not in whole[1]:
        return replace(_look_up(whole[1].strip(), names), key=tree.key)
    written = _EXPRESSION.sub(lambda match: _as_text(match[1].strip(), names), text)
    wrong = wrong_text(written)
    if wrong is not None:
        raise _LookUpError(wrong)
    if _MARK in written:
        raise _LookUpError("an expression is opened with '${{' but not closed with '}}'")
    return replace(tree, value=written)


def _as_text(name: str, names: Names) -> str:
    value = _look_up(name, names).value
    if isinstance(value, dict | list):
        raise _LookUpError(f"{name} is {describe(value)} and cannot stand inside text")
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def _look_up(name: str, names: Names) -> Tree:
    if not _LOOKUP.fullmatch(name):
        raise _LookUpError(f"'{name}' is not a look-up; write params.name, item or item.key (there is no arithmetic)")
    root, *steps = name.split(".")
    if root == "item" and "item" not in names:
        raise _LookUpError("'item' is known only inside a stage with foreach")
    if root == "needs":
        raise _LookUpError("needs can stand only alone after 'foreach:'; elsewhere name the stage in needs or inputs")
    if root not in names:
        where = f" in '{name}'" if steps else ""
        raise _LookUpError(f"unknown name '{root}'{where}{suggest(root, names)}")
    found = names[root]
    seen = root
    for step in steps:
        if isinstance(found, Unknown):
            break
        child = found.get(int(step) if isinstance(found.value, list) and step.isdecimal() else step)
        if child is None:
            raise _LookUpError(_no_such_step(name, seen, step, found))
        found, seen = child, f"{seen}.{step}"
    if isinstance(found, Unknown) or unresolved(found):
        raise _LookUpError("")
    return found


def _no_such_step(name: str, seen: str, step: str, found: Tree) -> str:
    if isinstance(found.value, dict):
        known = suggest(step, found.value) or " (it is empty)"
        return f"unknown name '{name}': '{seen}' has no '{step}'{known}"
    if isinstance(found.value, list):
        return f"unknown name '{name}': '{seen}' is a list of {len(found.value)}, counted from 0"
    return f"unknown name '{name}': '{seen}' is {describe(found.value)} and has nothing inside"
