"""What the code of a stage is, by digest, so that a changed method never finds what the one before it made.

The digest covers the module of a function and every module of ours that it imports, directly or not. Imports are read
in the source and nothing is imported, so that a plan loads no torch: those inside functions count, those that only a
type checker follows do not. It covers code and not how it is written: comments, docstrings, formatting and the version
of Python make no difference, and neither does where the package lies (checkout, wheel, a copy on a cluster).

Modules that are looked up in a table of texts such as "package.module:function" are not imported by anybody. A table of
kernels counts as an import of each of them, because a dispatcher may take any. Of other tables a parameter chooses an
entry, so the parameters say which by a method `sources() -> Iterable[str]`, and a new line changes no digest.

Left out: what is not Python, other people's packages that a plug-in builds on, and tables of results, for which `impl`
is raised by hand.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import layerwise

PACKAGES = ("layerwise.stages", "layerwise.kernels", "layerwise.solvers")
"""Those of our packages whose modules count."""

_KERNEL = re.compile(r"layerwise\.kernels\.\w+(:\w+)?")
"""A module of kernels, or an object in one, as a table or what a table is made of names it."""

_ENTRY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""An entry of a table of names: `module:object`."""


def source_digest(*starts: Callable[..., Any] | str) -> str:
    """The digest of the code that some functions are made of.

    Args:
        starts: functions, or names of modules. The modules of another package lead to others of the same package.
    Returns:
        64 hex digits.
    """
    return _digest(tuple(sorted({start if isinstance(start, str) else _module_of(start) for start in starts})))


def file_digest(file: Path) -> str:
    """The digest of a file of Python and of those beside it that it imports, directly or not, as of `source_digest`.

    Raises:
        SyntaxError: it is no Python.
    """
    found, waiting = {file}, [file]
    total = hashlib.sha256()
    pieces = {}
    while waiting:
        path = waiting.pop()
        tree = ast.parse(path.read_bytes())
        pieces[path.name] = hashlib.sha256("".join(_Spelling(tree).pieces).encode()).hexdigest()
        for name in _imports(tree, ""):
            beside = path.parent / f"{name.partition('.')[0]}.py"
            if beside.is_file() and beside not in found:
                found.add(beside)
                waiting.append(beside)
    for name in sorted(pieces):
        total.update(f"{name} {pieces[name]}\n".encode())
    return total.hexdigest()


def source_modules(*starts: Callable[..., Any] | str) -> list[str]:
    """The modules that `source_digest` covers, by name."""
    return _reached(tuple(start if isinstance(start, str) else _module_of(start) for start in starts))


def _module_of(function: Callable[..., Any]) -> str:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__module__", None) or type(function).__module__


@cache
def _digest(starts: tuple[str, ...]) -> str:
    total = hashlib.sha256()
    for name in _reached(starts):
        total.update(f"{_label(name)} {_read(name).digest}\n".encode())
    return total.hexdigest()


def _reached(starts: tuple[str, ...]) -> list[str]:
    packages = {*PACKAGES, *(start.partition(".")[0] for start in starts)} - {"layerwise"}
    found, waiting = set(starts), list(starts)
    while waiting:
        for name in _read(waiting.pop()).imports:
            counts = any(name == package or name.startswith(f"{package}.") for package in packages)
            if counts and name not in found:
                found.add(name)
                waiting.append(name)
    return sorted(found, key=_label)


@dataclass(frozen=True)
class _Module:
    digest: str
    imports: tuple[str, ...]


@cache
def _read(name: str) -> _Module:
    path = _file(name)
    if path is None:
        assert not name.startswith("layerwise."), f"layerwise has no module {name}"
        return _Module("", ())  # compiled, or typed into an interpreter: its name is all that can be said
    tree = ast.parse(path.read_bytes())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    spelling = _Spelling(tree)
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    kernels = [text.partition(":")[0] for text in texts if _KERNEL.fullmatch(text)]
    imports = dict.fromkeys([*_imports(tree, package), *kernels])
    return _Module(hashlib.sha256("".join(spelling.pieces).encode()).hexdigest(), tuple(imports))


@cache
def _file(name: str) -> Path | None:
    """Where the source of a module stands, None if there is none."""
    top, *rest = name.split(".")
    if top == "layerwise":
        return _below(Path(layerwise.__file__ or "").parent, rest)
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if loaded is not None:
        return Path(loaded) if loaded.endswith(".py") else None
    try:
        spec = find_spec(top)  # of the top only, which imports nothing
    except ValueError:  # a module that was put together by hand
        return None
    places = [] if spec is None else spec.submodule_search_locations
    if spec is not None and spec.origin is not None and places is None:
        return Path(spec.origin) if not rest and spec.origin.endswith(".py") else None
    return next((path for place in places or () if (path := _below(Path(place), rest)) is not None), None)


def _below(folder: Path, steps: list[str]) -> Path | None:
    path = folder.joinpath(*steps)
    candidates = [path / "__init__.py", *([path.with_name(f"{path.name}.py")] if steps else [])]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _label(name: str) -> str:
    """The name of a module, which is the same when it is started as a program."""
    path = _file(name) if name == "__main__" else None
    return name if path is None else path.stem


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            steps = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*steps, *([node.module] if node.module else [])])
            for alias in node.names:  # a module of the package, or a name in it
                yield f"{base}.{alias.name}" if _file(f"{base}.{alias.name}") is not None else base


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Every statement, however deep, but those that only a type checker reads."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        checked = isinstance(node, ast.If) and "TYPE_CHECKING" in (
            getattr(node.test, "id", None),
            getattr(node.test, "attr", None),
        )
        for block in ("orelse",) if checked else ("body", "orelse", "handlers", "finalbody", "cases"):
            inner = getattr(node, block, ())
            if isinstance(inner, list):  # and not the expression of a lambda
                waiting += inner


class _Spelling:
    """One spelling of equal code; that of `ast.dump` differs from Python to Python.

    Args:
        tree: of a module.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.pieces: list[str] = []
        self.entries: list[str] = []
        """Of tables of names; they are no part of the spelling."""
        self._add(tree)

    def _add(self, node: Any) -> None:
        if isinstance(node, ast.Constant):
            self.pieces.append(f"{type(node.value).__name__}:{node.value!r};")
        elif isinstance(node, ast.Dict):
            self._add_table(node)
        elif isinstance(node, ast.AST):
            self.pieces.append(f"{type(node).__name__}(")
            for name in node._fields:
                value = getattr(node, name, None)
                if value is not None and value != []:  # a field that a later Python adds is empty in older code
                    self.pieces.append(f"{name}=")
                    self._add(value)
            self.pieces.append(")")
        elif isinstance(node, list):
            for child in node:
                if not (isinstance(child, ast.Expr) and _is_text(child.value)):  # a docstring, also of an attribute
                    self._add(child)
            self.pieces.append(".")
        else:
            self.pieces.append(f"{node!r};")

    def _add_table(self, node: ast.Dict) -> None:
        self.pieces.append("Dict(")
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and _ENTRY.fullmatch(value.value):
                self.entries.append(value.value)
            else:
                self._add(key)
                self._add(value)
        self.pieces.append(")")


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
