"""How one workflow comes from several sources: `extends`, then a profile, then `-s`, then `-p`.

Each layer is a tree laid over the one below: maps merge, everything else is replaced. Every value keeps the place where
it was written, so a mistake is shown in the file, or the option, that has to be mended.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from layerwise.errors import UsageError, WorkflowError
from layerwise.pipeline.workflow.expressions import unresolved
from layerwise.pipeline.workflow.fileformat import STAGE_KEYS, TOP_KEYS
from layerwise.pipeline.workflow.limits import MAX_FILES, wrong_text
from layerwise.pipeline.workflow.paths import expanded
from layerwise.pipeline.workflow.report import Report, describe, nearest, suggest
from layerwise.pipeline.workflow.yaml12 import (
    KeyPath,
    Place,
    Tree,
    dotted,
    dump,
    load_file,
    load_text,
    load_value,
    plant,
)

MADE = "workflow"
"""What errors call a workflow that stands in no file."""

_NOT_FOR_SETTING = ("version", "extends", "profiles")


def merge(below: Tree, above: Tree) -> Tree:
    """Lay one tree over another: maps merge and stay where they were, everything else is replaced."""
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    entries = dict(below.value)
    for name, child in above.value.items():
        entries[name] = merge(entries[name], child) if name in entries else child
    return replace(below, value=entries)


def read_files(path: Path, report: Report) -> Tree:
    """Read a workflow file and, below it, the files that it extends.

    Raises:
        UsageError: the file does not exist.
        WorkflowError: one of the files is not YAML or not a map, or they extend each other in a circle.
    """
    return _read(path, report, ())


def read_map(workflow: Mapping[str, Any], report: Report) -> Tree:
    """The same of a workflow that a script made, as if it stood in a file of the present folder.

    Raises:
        UsageError: it holds what no YAML file can.
        WorkflowError: a file that it extends is none.
    """
    file = Path(MADE).absolute()
    try:
        text = dump(dict(workflow))
    except (yaml.YAMLError, TypeError) as error:
        raise UsageError(
            f"the workflow holds what YAML cannot say: {error}", hint="numbers, text, lists and maps"
        ) from error
    return _extended(load_text(text, str(file), report.mistakes), file, report, ())


def _read(path: Path, report: Report, chain: tuple[Path, ...]) -> Tree:
    return _extended(load_file(path, report.mistakes), path, report, chain)


def _extended(tree: Tree, path: Path, report: Report, chain: tuple[Path, ...]) -> Tree:
    """A workflow laid over those that it extends."""
    if not isinstance(tree.value, dict):
        raise WorkflowError([tree.place.mistake(f"a workflow is a map, but this is {describe(tree.value)}")])
    if "extends" not in tree.value:
        return tree
    parent = tree.value["extends"]
    own = replace(tree, value={name: child for name, child in tree.value.items() if name != "extends"})
    if not isinstance(parent.value, str):
        report.add(parent.place, ("extends",), f"must be text, got {describe(parent.value)}")
        return own
    try:
        base, chain = path.parent / expanded(parent.value), (*chain, _real(path))
    except UsageError as error:
        raise WorkflowError([parent.place.mistake(f"extends: {error.message}")]) from error
    if _real(base) in chain:
        circle = " -> ".join(file.name for file in (*chain[chain.index(_real(base)) :], base))
        raise WorkflowError([parent.place.mistake(f"extends: the files extend each other in a circle: {circle}")])
    if len(chain) == MAX_FILES:
        text = f"extends: more than {MAX_FILES} files extend each other; merge some of them"
        raise WorkflowError([parent.place.mistake(text)])
    try:
        return replace(merge(_read(base, report, chain), own), place=own.place)
    except UsageError as error:
        raise WorkflowError([parent.place.mistake(f"extends: {error.message}")]) from error


def _real(path: Path) -> Path:
    """The one name of a file, however it is reached; unlike `Path.resolve` at peace with links in a circle."""
    return Path(os.path.realpath(path))


def apply_profile(tree: Tree, profile: str | None, report: Report) -> Tree:
    """Lay a named profile over the workflow, and check the outline of all of them."""
    profiles = tree.entries.get("profiles", plant({}, tree.place)).entries
    declared = tree.entries.get("params", plant({}, tree.place)).entries
    allowed = [key for key in TOP_KEYS if key not in _NOT_FOR_SETTING]
    for name, block in profiles.items():
        for key, child in block.entries.items():
            if key not in allowed:
                report.add(child.key or child.place, ("profiles", name, key), "unknown key" + suggest(key, allowed))
        for key, child in block.entries.get("params", plant({}, block.place)).entries.items():
            if key not in declared:
                text = f"no such parameter is declared{suggest(key, declared)}"
                report.add(child.key or child.place, ("profiles", name, "params", key), text)
    if profile is None:
        return tree
    if profile not in profiles:
        known = suggest(profile, profiles) or " (the workflow has no profiles)"
        report.add(Place(tree.place.file, option="--profile"), (), f"unknown profile '{profile}'{known}")
        return tree
    block = profiles[profile]
    changes = {key: child for key, child in block.entries.items() if key in allowed}
    return merge(tree, Tree(changes, tree.place))


def apply_sets(tree: Tree, sets: Sequence[str], report: Report) -> Tree:
    """Lay each `path.to.key=value` over the workflow; a later one wins."""
    for option in sets:
        place = Place(tree.place.file, option=f"-s {option}")
        path, equals, text = option.partition("=")
        if not equals or not path:
            report.add(place, (), "write it as path.to.key=value")
            continue
        try:
            value = load_value(text, place)
        except WorkflowError as error:
            report.mistakes.extend(error.mistakes)
            continue
        try:
            tree = _set(tree, path.split("."), value, ())
        except UsageError as error:
            report.add(place, (), error.message)
    return tree


def _set(tree: Tree, steps: Sequence[str], value: Tree, path: KeyPath) -> Tree:
    """The tree with one value replaced; raises UsageError if the way to it cannot be gone."""
    if not steps:
        return replace(value, key=value.place)
    step, rest = steps[0], steps[1:]
    if isinstance(tree.value, list):
        if not step.isdecimal() or int(step) >= len(tree.value):
            entries = f"{len(tree.value)} {'entry' if len(tree.value) == 1 else 'entries'}, counted from 0"
            raise UsageError(f"unknown path: '{dotted(path)}' is a list of {entries}; it has no '{step}'")
        children = list(tree.value)
        children[int(step)] = _set(children[int(step)], rest, value, (*path, int(step)))
        return replace(tree, value=children)
    if not isinstance(tree.value, dict):
        what = "an expression" if unresolved(tree) else describe(tree.value)
        raise UsageError(f"unknown path: '{dotted(path)}' is {what} and has no '{step}' inside; set it as a whole")
    _check_settable(tree, step, path)
    child = tree.value.get(step, Tree({}, value.place))
    child = replace(_set(child, rest, value, (*path, step)), key=value.place if not rest else child.key or value.place)
    return replace(tree, value={**tree.value, step: child})


def _check_settable(tree: Tree, step: str, path: KeyPath) -> None:
    """Refuse a key that the workflow format does not have; what `with:` may hold is for the stage to say, later."""
    known: Sequence[str] | None = None
    if not path:
        known = [key for key in TOP_KEYS if key not in _NOT_FOR_SETTING]
    elif path in (("stages",), ("data",), ("params",)):
        known = list(tree.entries)
    elif path[0] == "stages" and len(path) == 2:
        known = STAGE_KEYS
    if known is None or step in known:
        return
    if not path and step in _NOT_FOR_SETTING:
        raise UsageError(f"'{step}' cannot be set from the command line")
    kind = {"stages": "stage", "data": "data entry", "params": "parameter"}.get(dotted(path), "key")
    raise UsageError(f"unknown {kind} '{step}'{suggest(step, known)}")


def apply_params(tree: Tree, params: Mapping[str, Any], report: Report) -> Tree:
    """Set declared parameters; text, as from the command line, is read as the type of the parameter's default."""
    section = tree.entries.get("params", Tree({}, tree.place))
    for path, child in section.walk(("params",)):
        if isinstance(child.value, str) and unresolved(child):
            report.add(child.place, path, "a parameter is a plain value; an expression cannot stand here")
    declared = dict(section.entries)
    for name, given in params.items():
        place = Place(tree.place.file, option=f"-p {name}={given}")
        if name not in declared:
            listed = f"; declared: {', '.join(section.entries)}" if section.entries else "; the workflow declares none"
            report.add(place, (), f"unknown parameter '{name}'{nearest(name, section.entries)}{listed}")
            continue
        default = section.entries[name].value
        try:
            value = _typed(given, default, place)
        except UsageError as error:
            report.add(place, (), error.message)
            continue
        declared[name] = replace(value, key=place)
    if not declared:
        return tree
    return replace(tree, value={**tree.entries, "params": replace(section, value=declared)})


def _typed(given: Any, default: Any, place: Place) -> Tree:
    """A parameter's new value, of the kind that its default has."""
    wrong = wrong_text(given) if isinstance(given, str) else None
    if wrong is not None:
        raise UsageError(wrong)
    if isinstance(given, str) and isinstance(default, str):
        return Tree(given, place)
    if isinstance(given, str):
        try:
            tree = load_value(given, place)
        except WorkflowError:
            tree = Tree(given, place)
    else:
        tree = plant(given, place)
    kinds: dict[type, tuple[tuple[type, ...], str]] = {
        bool: ((bool,), "true or false"),
        int: ((int,), "a whole number"),
        float: ((int, float), "a number"),
        str: ((str,), "text"),
        list: ((list,), "a list like [1, 2]"),
        dict: ((dict,), "a map like {a: 1}"),
    }
    if default is None:
        return tree
    fitting, wanted = kinds[type(default)]
    value = tree.value
    if isinstance(value, float) and int in fitting and float not in fitting and value.is_integer():
        return Tree(int(value), place)
    if not isinstance(value, fitting) or (isinstance(value, bool) and bool not in fitting):
        raise UsageError(f"must be {wanted}, as its default is, got {describe(value)}")
    return tree
