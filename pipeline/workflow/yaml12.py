"""YAML 1.2 for people: plain values, and where each of them stands.

PyYAML by itself follows YAML 1.1, which turns the sparsity pattern `2:4` into 124, `no` into false, `1e-4` into text
and `2024-01-01` into a date, and keeps the last of two equal keys without a word. Here PyYAML only scans and composes;
which scalars are numbers is decided by the core schema of YAML 1.2 (section 10.3.2), the same that editors use, and the
nodes become a `Tree` that remembers file, line and column. Anchors and `<<` work. Left out on purpose: tags other than
the core ones (no Python objects), keys that are not text, several documents in one file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from layerwise.errors import Mistake, WorkflowError
from layerwise.pipeline.workflow.limits import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_VALUES,
    read_small,
    wrong_number,
    wrong_text,
)

Scalar: TypeAlias = str | int | float | bool | None
KeyPath: TypeAlias = tuple[str | int, ...]
"""The way to a value: keys of maps and indices of lists, from the top."""

_TAG = "tag:yaml.org,2002:"
_CORE = {  # YAML 1.2, section 10.3.2: tag -> (pattern, characters that can open it)
    "null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "int": (re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), list("-+0123456789")),
    "float": (
        re.compile(
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        list("-+.0123456789"),
    ),
}


@dataclass(frozen=True)
class Place:
    """Where a value stands: a file with line and column, both from 1, or an option of the command line.

    Args:
        file: as the user wrote it, so that a terminal can open it.
        option: `-s path=value` or `-p name=value`; then line and column mean nothing.
    """

    file: str
    line: int = 1
    column: int = 1
    option: str | None = None

    def mistake(self, text: str) -> Mistake:
        """A mistake that is shown at this place, on one line; no file may steer the terminal."""
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
        if self.option is not None:
            return OptionMistake(self.option, 0, 0, text)
        return Mistake(self.file, self.line, self.column, text)


@dataclass(frozen=True)
class OptionMistake(Mistake):
    """A mistake on the command line, where no line and column can be given."""

    def __str__(self) -> str:
        return f"{self.file}: {self.text}"


@dataclass(frozen=True)
class Tree:
    """A value, where it stands, and where its key stands.

    Args:
        value: a scalar, a dict of text to `Tree`, or a list of `Tree`. Treat it as frozen.
        place: of the value itself.
        key: of its key, when it is an entry of a map.
    """

    value: Scalar | dict[str, Tree] | list[Tree]
    place: Place
    key: Place | None = field(default=None, compare=False)

    @property
    def entries(self) -> dict[str, Tree]:
        """The entries of a map; empty for anything else."""
        return self.value if isinstance(self.value, dict) else {}

    @cached_property
    def size(self) -> int:
        """How many values it has, itself included; what stands in several places counts at each of them."""
        return 1 + sum(child.size for child in self._inside())

    @cached_property
    def depth(self) -> int:
        """How many lists and maps are in one another."""
        nested = isinstance(self.value, dict | list)
        return max((child.depth for child in self._inside()), default=0) + nested

    @cached_property
    def characters(self) -> int:
        """Of all its texts, keys included."""
        if isinstance(self.value, dict):
            return sum(len(name) + child.characters for name, child in self.value.items())
        if isinstance(self.value, list):
            return sum(child.characters for child in self.value)
        return len(self.value) if isinstance(self.value, str) else 0

    def _inside(self) -> Iterable[Tree]:
        if isinstance(self.value, dict):
            return self.value.values()
        return self.value if isinstance(self.value, list) else ()

    def plain(self) -> Any:
        """The value with its places forgotten: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {name: child.plain() for name, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def get(self, step: str | int) -> Tree | None:
        """The child behind a key or an index, or None."""
        if isinstance(self.value, dict) and isinstance(step, str):
            return self.value.get(step)
        if isinstance(self.value, list) and isinstance(step, int) and 0 <= step < len(self.value):
            return self.value[step]
        return None

    def find(self, path: KeyPath) -> Tree | None:
        """The value at the end of a path, or None."""
        node: Tree | None = self
        for step in path:
            node = node.get(step) if node is not None else None
        return node

    def place_of(self, path: KeyPath, *, of_key: bool = False) -> Place:
        """Where a path leads: to its value or to its key; for what is missing, the innermost key that is there."""
        node = self
        for step in path:
            child = node.get(step)
            if child is None:
                return node.key or node.place
            node = child
        return node.key if of_key and node.key is not None else node.place

    def walk(self, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Tree]]:
        """Every value with its path, parents first."""
        yield path, self
        if isinstance(self.value, dict):
            for name, child in self.value.items():
                yield from child.walk((*path, name))
        elif isinstance(self.value, list):
            for index, child in enumerate(self.value):
                yield from child.walk((*path, index))


def plant(value: Any, place: Place) -> Tree:
    """A tree of plain data, all of it standing at one place."""
    if isinstance(value, Mapping):
        return Tree({str(name): replace(plant(child, place), key=place) for name, child in value.items()}, place)
    if isinstance(value, list | tuple):
        return Tree([plant(child, place) for child in value], place)
    return Tree(value, place)


def dotted(path: KeyPath) -> str:
    """A path as people write it: `stages.search.with.menu.0`."""
    return ".".join(map(str, path))


def load_file(path: Path, mistakes: list[Mistake] | None = None) -> Tree:
    """Read a YAML file.

    Args:
        path: shown in errors as it is given.
        mistakes: where mistakes go that leave the rest readable (a key given twice); without it they are raised.
    Raises:
        UsageError: there is no such file, or it cannot be read.
        WorkflowError: it is too long, not UTF-8, or not YAML; says where.
    """
    data = read_small(path)
    if len(data) > MAX_BYTES:
        place = Place(str(path), data.count(b"\n") + 1)
        raise WorkflowError([place.mistake(f"a workflow file has at most {MAX_BYTES:,} bytes, this one is longer")])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode("utf-8", errors="replace")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        place = Place(str(path), line, column)
        raise WorkflowError(
            [place.mistake(f"the file is not UTF-8 (byte 0x{error.object[error.start]:02x})")],
            hint="save it as UTF-8",
        ) from None
    return load_text(text, str(path), mistakes)


def load_text(text: str, file: str, mistakes: list[Mistake] | None = None) -> Tree:
    """Read YAML from text; `file` is what errors call it. See `load_file`."""
    found: list[Mistake] = []
    tree = _Planter(lambda mark: Place(file, mark.line + 1, mark.column + 1), found).read(text)
    if mistakes is not None:
        mistakes.extend(found)
    elif found:
        raise WorkflowError(found)
    return tree


def load_value(text: str, place: Place) -> Tree:
    """Read the value of a command-line option: a scalar, or a list or map in flow style.

    Raises:
        WorkflowError: it is not YAML.
    """
    found: list[Mistake] = []
    tree = _Planter(lambda mark: place, found).read(text or "null")
    if found:
        raise WorkflowError(found)
    return tree


def dump(data: Any) -> str:
    """Plain data as YAML that `load_text` reads back unchanged, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner and composer, with the core schema of YAML 1.2 deciding what a plain scalar is."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's name and form

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As PyYAML's, within the limits: it meets every key and every value."""
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > MAX_DEPTH:
            raise _UnreadableError(self._mark(), f"nested too deeply: at most {MAX_DEPTH} levels")
        if self.nodes > MAX_VALUES:
            text = f"too many values: at most {MAX_VALUES:,} keys and values in one file"
            raise _UnreadableError(self._mark(), text)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _mark(self) -> yaml.Mark:
        mark: yaml.Mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        return mark


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the text that `_Loader` would otherwise read as something else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        """Text on one line; with quotes and escapes where PyYAML's plain style would lose a rare line break."""
        style = None if text.isprintable() else '"'
        return self.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
for _name, (_pattern, _first) in _CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern.pattern})$"), _first)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_TAG + "merge", re.compile(r"<<$"), ["<"])


class _UnreadableError(Exception):
    """The file cannot be made sense of beyond this point."""

    def __init__(self, mark: yaml.Mark, text: str) -> None:
        super().__init__(text)
        self.mark, self.text = mark, text


class _Planter:
    """Turns YAML text into a `Tree`.

    Args:
        place: where a mark of PyYAML stands.
        mistakes: collects keys that are given twice.
    """

    def __init__(self, place: Callable[[yaml.Mark], Place], mistakes: list[Mistake]) -> None:
        self.place, self.mistakes = place, mistakes
        self.planted: dict[int, tuple[Tree, int]] = {}  # id of the YAML node -> its tree and how many values it has
        self.open: set[int] = set()

    def read(self, text: str) -> Tree:
        start = yaml.Mark("", 0, 0, 0, None, 0)
        try:
            root = yaml.compose(text, Loader=_Loader)
            if root is None:
                raise _UnreadableError(start, "the file is empty")
            return self.plant(root, ())[0]
        except _UnreadableError as error:
            mark, message = error.mark, error.text
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark or start
            message = _explain(error, text, mark)
        except yaml.reader.ReaderError as error:
            before = text[: error.position]
            mark = yaml.Mark("", 0, before.count("\n"), len(before) - (before.rfind("\n") + 1), None, 0)
            message = f"the character U+{ord(text[error.position]):04X} may not stand in YAML"
        raise WorkflowError([self.place(mark).mistake(message)])

    def plant(self, node: yaml.Node, path: KeyPath) -> tuple[Tree, int]:
        """The tree of a node and the number of values in it, aliases unfolded."""
        if id(node) in self.planted:
            return self.planted[id(node)]
        if id(node) in self.open:
            raise _UnreadableError(node.start_mark, "an alias may not contain itself")
        self.open.add(id(node))
        value: Any
        if isinstance(node, yaml.MappingNode):
            value, size = self._map(node, path)
        elif isinstance(node, yaml.SequenceNode):
            self._check_tag(node, "seq")
            children = [self.plant(child, (*path, index)) for index, child in enumerate(node.value)]
            value, size = [tree for tree, _ in children], 1 + sum(count for _, count in children)
        else:
            assert isinstance(node, yaml.ScalarNode), "the three kinds of YAML node"
            value, size = self._scalar(node), 1
        if size > MAX_VALUES:
            raise _UnreadableError(node.start_mark, f"aliases unfold to more than {MAX_VALUES:,} values")
        self.open.discard(id(node))
        tree = Tree(value, self.place(node.start_mark))
        if tree.depth > MAX_DEPTH:
            raise _UnreadableError(node.start_mark, f"aliases nest too deeply: at most {MAX_DEPTH} levels")
        self.planted[id(node)] = tree, size
        return self.planted[id(node)]

    def _map(self, node: yaml.MappingNode, path: KeyPath) -> tuple[dict[str, Tree], int]:
        self._check_tag(node, "map")
        own: dict[str, Tree] = {}
        merged: dict[str, Tree] = {}
        size = 1
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _UnreadableError(key.start_mark, "a key must be text, not a list or a map")
            if key.tag == _TAG + "merge":
                for source in child.value if isinstance(child, yaml.SequenceNode) else [child]:
                    tree, count = self.plant(source, path)
                    if not isinstance(tree.value, dict):
                        raise _UnreadableError(source.start_mark, "'<<' takes in maps only")
                    merged = {**tree.value, **merged}  # of several sources the first wins
                    size += count
                continue
            name, place = self._sound(key), self.place(key.start_mark)
            tree, count = self.plant(child, (*path, name))
            if name in own and (first := own[name].key) is not None:
                text = f"{dotted((*path, name))}: this key is given twice (first on line {first.line})"
                self.mistakes.append(place.mistake(text))
                continue
            own[name] = replace(tree, key=place)
            size += count
        return {**merged, **own}, size

    def _scalar(self, node: yaml.ScalarNode) -> Scalar:
        kind, text = node.tag.removeprefix(_TAG), self._sound(node)
        if kind in ("str", "merge"):
            return text
        if kind not in _CORE:
            raise _UnreadableError(node.start_mark, f"the tag '{_short_tag(node.tag)}' is not supported; remove it")
        if not _CORE[kind][0].fullmatch(text):
            raise _UnreadableError(node.start_mark, f"'{text}' is not what its tag !!{kind} promises")
        if kind == "int" and len(text) > MAX_DIGITS:
            raise _UnreadableError(node.start_mark, f"a whole number of {len(text)} digits is too long")
        value = _parse(kind, text)
        wrong = wrong_number(value) if isinstance(value, int) else None
        if wrong is not None:
            raise _UnreadableError(node.start_mark, wrong)
        return value

    def _sound(self, node: yaml.ScalarNode) -> str:
        """The text of a key or a value."""
        text = str(node.value)
        wrong = wrong_text(text)
        if wrong is not None:
            raise _UnreadableError(node.start_mark, wrong)
        return text

    def _check_tag(self, node: yaml.Node, kind: str) -> None:
        if node.tag != _TAG + kind:
            raise _UnreadableError(node.start_mark, f"the tag '{_short_tag(node.tag)}' is not supported; remove it")


def _parse(kind: str, text: str) -> Scalar:
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0) if text.startswith(("0x", "0o")) else int(text)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _short_tag(tag: str) -> str:
    return "!!" + tag.removeprefix(_TAG) if tag.startswith(_TAG) else tag


def _explain(error: yaml.MarkedYAMLError, text: str, mark: yaml.Mark) -> str:
    """PyYAML's message in one line, with advice for the two traps that this format lays."""
    message = ", ".join(part for part in (error.context, error.problem) if part) or "not YAML"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "${{" in line:
        return f'{message} (inside {{ }} or [ ] an expression needs quotes: "${{{{ item }}}}")'
    if "\t" in line[: mark.column + 1]:
        return f"{message} (YAML is indented with spaces, not tabs)"
    return message
