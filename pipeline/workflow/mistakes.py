"""From pydantic's findings to sentences that name the place and say what to write.

pydantic reports a path of its own, in which the branches of a union appear as steps, and one finding per branch. Here
the path is walked along the YAML tree, which gives line and column; of a union only the branch that was meant is kept;
and each kind of finding gets its words. Validation is strict (the text `"3"` is not a number, `1` is not `true`), with
two mercies: a whole number may be written 1e3, and a list serves wherever a tuple or a set is wanted.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic_core import ErrorDetails

from layerwise.errors import LayerwiseError
from layerwise.pipeline.workflow.expressions import unresolved
from layerwise.pipeline.workflow.report import Report, describe, nearest, nearest_name, suggest
from layerwise.pipeline.workflow.yaml12 import KeyPath, Place, Tree
from layerwise.stages.quantities import LARGEST

Model = TypeVar("Model", bound=BaseModel)

_WANTED = {  # kind of pydantic finding -> what the value must be
    "string": "text",
    "path": "a path",
    "int": "a whole number",
    "float": "a number",
    "decimal": "a number",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "frozen_set": "a list",
    "iterable": "a list",
    "dict": "a map",
    "mapping": "a map",
    "model": "a map",
    "model_attributes": "a map",
    "dataclass": "a map",
    "none_required": "nothing",
}
_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


def validate(model: type[Model], tree: Tree, path: KeyPath, report: Report) -> Model | None:
    """Read a tree into a pydantic model.

    Args:
        path: where the tree stands in the file, for the sentences.
    Returns:
        None when there are mistakes; they are in the report. A value that still holds a `${{ }}` makes no mistake here:
        why it could not be resolved has been reported already.
    """
    text = json.dumps(tree.plain())
    try:
        made, mistakes = _judge(model, text, tree)
    except LayerwiseError as error:  # a validator that knows better words than pydantic
        hint = f" ({error.hint})" if error.hint else ""
        report.add(tree.key or tree.place, path, error.message + hint)
        return None
    meant = {_meant(mistake, tree, model) for mistake in mistakes}
    for mistake in mistakes:
        kind, found = mistake.error["type"], tree.find(mistake.path)
        if found is not None and unresolved(found) and kind != "extra_forbidden":
            continue
        if kind == "missing" and mistake.path in meant:  # it is there, misspelt, and that is reported
            continue
        place, shown, words = _say(mistake, tree, model)
        report.add(place, (*path, *shown), words)
    return made


def _judge(model: type[Model], text: str, tree: Tree) -> tuple[Model | None, list[_Mistake]]:
    """The model of a JSON text, or its mistakes: those of strict mode, less what is only strictness."""
    try:
        return model.model_validate_json(text, strict=True), []
    except ValidationError as error:
        strict = _keep_meant_branch(_mistakes(error, tree))
    serious = [mistake for mistake in strict if not mistake.excused]
    excused = [mistake.path for mistake in strict if mistake.excused]
    try:
        made = model.model_validate_json(text)
        return (None, serious) if serious else (made, [])
    except ValidationError as error:  # where strict mode stopped for an excused reason, the lax mode saw more
        lax = _keep_meant_branch(_mistakes(error, tree))
    more = [mistake for mistake in lax if any(mistake.path[: len(path)] == path for path in excused)]
    return None, serious + more if serious else lax


def _mistakes(error: ValidationError, tree: Tree) -> list[_Mistake]:
    found = error.errors(include_url=False)
    return [_Mistake.of(finding, tree) for finding in found if not _too_short_by_errors(finding)]


def _too_short_by_errors(error: ErrorDetails) -> bool:
    """Whether a list is too short only because pydantic does not count the entries that have mistakes."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


@dataclass(frozen=True)
class _Mistake:
    """One finding of pydantic.

    Args:
        path: the steps that lead through the data; the last may be a key that is missing there.
        branches: (length of the path at which a union branched, name of the branch), outermost first.
        of_key: it is about a key of a map, not about the value behind it.
        words: overrides what `error` would say.
    """

    path: KeyPath
    branches: tuple[tuple[int, str], ...]
    error: ErrorDetails
    of_key: bool = False
    words: str | None = field(default=None)

    @classmethod
    def of(cls, error: ErrorDetails, tree: Tree) -> _Mistake:
        path: list[str | int] = []
        branches: list[tuple[int, str]] = []
        node: Tree | None = tree
        location = error["loc"]
        for position, step in enumerate(location):
            child = node.get(step) if node is not None else None
            if child is not None:
                path.append(step)
                node = child
            elif step == "[key]":
                return cls(tuple(path), tuple(branches), error, of_key=True)
            elif error["type"] == "missing" and position == len(location) - 1:
                path.append(step)
            else:
                branches.append((len(path), str(step)))
        return cls(tuple(path), tuple(branches), error)

    @property
    def excused(self) -> bool:
        """Whether it is only strictness: about 1e3 for a whole number, or a list for a tuple or a set."""
        value = self.error["input"]
        if self.error["type"] == "int_type":
            return isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST
        return self.error["type"] in ("tuple_type", "set_type", "frozen_set_type") and isinstance(value, list)

    @property
    def wanted(self) -> str | None:
        """What the value must be, if the finding is that it is of another kind."""
        kind = self.error["type"]
        for suffix in ("_type", "_parsing", "_from_float"):
            kind = kind.removesuffix(suffix)
        return _WANTED.get(kind)

    @property
    def options(self) -> list[str]:
        """The allowed words, if the finding is that this is none of them."""
        context = self.error.get("ctx", {})
        if self.error["type"] in ("literal_error", "enum"):
            return [_unquoted(word) for word in re.split(r", | or ", str(context["expected"]))]
        if self.error["type"] == "union_tag_invalid":
            return [_unquoted(word) for word in str(context["expected_tags"]).split(", ")]
        return []


def _unquoted(word: str) -> str:
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] == "'" else word


def _keep_meant_branch(mistakes: list[_Mistake]) -> list[_Mistake]:
    """Of each union keep the findings of the branch that the user meant, or one sentence for all branches."""
    kept = [mistake for mistake in mistakes if not mistake.branches]
    unions: dict[KeyPath, dict[str, list[_Mistake]]] = {}
    for mistake in mistakes:
        if mistake.branches:
            depth, branch = mistake.branches[0]
            rest = replace(mistake, branches=mistake.branches[1:])
            unions.setdefault(mistake.path[:depth], {}).setdefault(branch, []).append(rest)
    for path, branches in unions.items():
        kept += _choose(path, [_keep_meant_branch(findings) for findings in branches.values()])
    return kept


def _choose(path: KeyPath, branches: list[list[_Mistake]]) -> list[_Mistake]:
    def wrong_kind(mistake: _Mistake) -> bool:
        return mistake.path == path and (mistake.wanted is not None or bool(mistake.options))

    def wrong_label(mistake: _Mistake) -> bool:
        return len(mistake.path) == len(path) + 1 and mistake.error["type"] == "literal_error"

    for branch in branches:
        if all(mistake.excused for mistake in branch):
            return branch
    fitting = [branch for branch in branches if not any(map(wrong_kind, branch))]
    if not fitting:
        return _join_kinds([mistake for branch in branches for mistake in branch])
    labelled = [branch for branch in fitting if not any(map(wrong_label, branch))]
    if not labelled and len(fitting) > 1:
        return _join_kinds([next(filter(wrong_label, branch)) for branch in fitting])
    return min(labelled or fitting, key=len)


def _join_kinds(mistakes: list[_Mistake]) -> list[_Mistake]:
    """One mistake that says everything a value may be."""
    options = [option for mistake in mistakes for option in mistake.options]
    wanted = [mistake.wanted for mistake in mistakes if mistake.wanted]
    if not wanted:
        first = mistakes[0]
        return [replace(first, words=_not_one_of(first.error["input"], options))]
    if options:
        wanted.append(f"one of {', '.join(dict.fromkeys(options))}")
    words = f"must be {' or '.join(dict.fromkeys(wanted))}, got {describe(mistakes[0].error['input'])}"
    return [replace(mistakes[0], words=words)]


def _not_one_of(value: Any, options: list[str]) -> str:
    if not isinstance(value, str):
        return f"must be one of {', '.join(options)}, got {describe(value)}"
    return f"'{value}' is not one of {', '.join(dict.fromkeys(options))}{nearest(value, options)}"


def _meant(mistake: _Mistake, tree: Tree, model: type[BaseModel]) -> KeyPath | None:
    """The key that a misspelt one stands for."""
    if mistake.error["type"] != "extra_forbidden":
        return None
    fields = _open_fields(model, mistake.error["loc"][:-1], tree.find(mistake.path[:-1]))
    close = nearest_name(str(mistake.path[-1]), [name for names in fields for name in names])
    return None if close is None else (*mistake.path[:-1], close)


def _say(mistake: _Mistake, tree: Tree, model: type[BaseModel]) -> tuple[Place, KeyPath, str]:
    """The place, the path as shown, and the words of one mistake."""
    error, path = mistake.error, mistake.path
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        fields = _open_fields(model, error["loc"][:-1], tree.find(path[:-1]))
        known = [name for names in fields for name in names]
        hint = suggest(str(path[-1]), known, [names[0] for names in fields])
        return tree.place_of(path, of_key=True), path, f"unknown key{hint}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, _unquoted(str(context["discriminator"])))
    return tree.place_of(path, of_key=mistake.of_key), path, mistake.words or _words(mistake)


def _words(mistake: _Mistake) -> str:
    """What is wrong with a value, and what it should be."""
    error = mistake.error
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    words = f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {describe(value)}"
    if kind in ("missing", "union_tag_not_found"):
        words = "this key is required"
    elif mistake.options:
        words = _not_one_of(context.get("tag", value), mistake.options)
    elif kind in ("int_type", "int_parsing_size") and isinstance(value, float) and abs(value) > LARGEST:
        words = f"must be at most 2^63 - 1, got {describe(value)}"
    elif mistake.wanted:
        words = f"must be {mistake.wanted}, got {describe(value)}"
    elif kind == "finite_number":
        words = f"must be a finite number, got {describe(value)}"
    elif kind in _LIMITS:
        limit, key = _LIMITS[kind]
        words = f"must be {limit} {context[key]:g}, got {value}"
    elif kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        words = _wrong_length(kind, context, len(value))
    elif kind in ("value_error", "assertion_error"):
        words = str(context["error"])
    return words


def _wrong_length(kind: str, context: Mapping[str, Any], length: int) -> str:
    bound, key = ("least", "min_length") if kind.endswith("short") else ("most", "max_length")
    limit = context[key]
    one, several = ("character", "characters") if kind.startswith("string") else ("entry", "entries")
    return f"must have at {bound} {limit} {one if limit == 1 else several}, has {length}"


def _open_fields(model: type[BaseModel], location: tuple[str | int, ...], node: Tree | None) -> list[list[str]]:
    """The fields that are not yet given where pydantic found an unknown key, each with all its names."""
    kinds: list[Any] = [model]
    for step in location:
        kinds = [inner for kind in kinds for inner in _descend(kind, step)]
    given = set(node.entries) if node is not None else set()
    fields = [names for kind in kinds for inner in _models_in(kind) for names, _ in _fields(inner)]
    return [names for index, names in enumerate(fields) if not given & set(names) and names not in fields[:index]]


def _fields(model: type[BaseModel]) -> list[tuple[list[str], Any]]:
    """The keys under which each field of a model may be written, the preferred one first, and its annotation."""
    fields: list[tuple[list[str], Any]] = []
    for name, info in model.model_fields.items():
        alias = info.validation_alias
        names = alias.choices if isinstance(alias, AliasChoices) else [alias or name]
        fields.append(([choice for choice in names if isinstance(choice, str)], info.annotation))
    return fields


def _models_in(kind: Any) -> list[Any]:
    if _is_model(kind):
        return [kind]
    if typing.get_origin(kind) in (typing.Annotated, typing.Union, types.UnionType):
        return [inner for member in typing.get_args(kind) for inner in _models_in(member)]
    return []


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _descend(kind: Any, step: str | int) -> list[Any]:
    """The types behind one step of pydantic's path: a key, an index, or the branch of a union."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    found: list[Any] = []
    if origin is typing.Annotated:
        found = _descend(arguments[0], step)
    elif origin in (typing.Union, types.UnionType):
        found = [member for member in arguments if _answers_to(member, str(step))]
        found = found or [inner for member in arguments for inner in _descend(member, step)]
    elif _is_model(kind):
        found = [annotation for names, annotation in _fields(kind) if step in names]
    elif origin is dict:
        found = [arguments[1]]
    elif isinstance(step, int):
        found = [argument for argument in arguments if argument is not Ellipsis]
    return found


def _answers_to(kind: Any, branch: str) -> bool:
    """Whether a member of a union is the branch that pydantic calls by this name: its class or its label."""
    if typing.get_origin(kind) is typing.Annotated:
        return _answers_to(typing.get_args(kind)[0], branch)
    if not _is_model(kind):
        return False
    labels = [typing.get_args(info.annotation) for info in kind.model_fields.values()]
    # A model with validators of its own is called "function-after[check(), Name]".
    return kind.__name__ in re.findall(r"\w+", branch) or any(branch in map(str, options) for options in labels)
