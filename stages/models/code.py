"""Functions of the user's own that a workflow names: those that make a network, or the tensors that it is run on.

`folder/file.py:function` is a function in a file; what stands beside the file can be imported there.
`package.module:function` is one of a package that is installed. Whoever calls has seen `trust: true` before.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from layerwise.errors import UsageError

_NAME = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)|(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")

NAMED_LIKE = "a function is named file.py:function, or package.module:function where the package is installed"


def split(name: str) -> tuple[Path | None, str, str] | None:
    """The parts of a name: the file or None, the module, the function; None if it names no function."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    if found["file"] is not None:
        file = Path(found["file"])
        return file, file.stem, found["function"]
    return None, found["module"], found["name"]


def call(name: str) -> Any:
    """What the function of that name gives.

    Args:
        name: with an absolute path, where it is in a file.
    Raises:
        UsageError: there is no such function, or it fails; says how.
    """
    parts = split(name)
    assert parts is not None, "the workflow was checked"
    file, module, function = parts
    with _beside(file):
        try:
            made = _load(file) if file is not None else importlib.import_module(module)
        except Exception as error:  # whatever somebody's code raises
            raise UsageError(f"{name} cannot be imported: {_told(error)}") from error
        found: Callable[[], Any] | None = getattr(made, function, None)
        if not callable(found):
            raise UsageError(f"{file or module} has no function {function}", hint=NAMED_LIKE)
        try:
            return found()
        except Exception as error:
            raise UsageError(f"{name} fails: {_told(error)}", hint="it is called without arguments") from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _load(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    spec = spec_from_file_location(f"layerwise_code_of_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "its name ends in .py"
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


_beside_before: set[str] = set()
"""Modules that were imported from beside a file of the user's."""


@contextmanager
def _beside(file: Path | None) -> Iterator[None]:
    """Let what stands beside a file be imported for a while."""
    if file is None:
        yield
        return
    for name in _beside_before:  # another folder may have a module of the same name, or this one a newer
        sys.modules.pop(name, None)
    _beside_before.clear()
    folder, known = str(file.parent), set(sys.modules)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - known:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                _beside_before.add(name)
