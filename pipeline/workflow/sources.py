"""What a workflow works on: the dense model and the texts, found relative to the file that names them.

Mistakes of form (a wrong type, an unknown key) are reported by whoever validates the workflow as a whole; here only
what the form cannot show is reported: a folder or a file that is not there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import UsageError
from layerwise.pipeline.workflow.expressions import unresolved
from layerwise.pipeline.workflow.fileformat import DatasetEntry, ModelEntry, TensorEntry, TextEntry
from layerwise.pipeline.workflow.mistakes import validate
from layerwise.pipeline.workflow.paths import expanded, is_folder, missing
from layerwise.pipeline.workflow.report import Report
from layerwise.pipeline.workflow.yaml12 import KeyPath, Place, Tree
from layerwise.stages.data.records import RECORDS
from layerwise.stages.models.code import NAMED_LIKE, split

TEXT_ENDINGS = (".txt", ".md", ".rst", *RECORDS)
"""Of what is read of a folder."""

MOST_FILES = 10_000
"""Of one folder."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Model:
    """The dense model: a local folder, a Hugging Face id that is still to be fetched, or a function that makes it.

    Args:
        path: the folder, absolute; None for a Hugging Face id or a function.
        revision: of a Hugging Face model.
        trust: whether code that it brings may run.
        python: a function of the user's own, its file absolute (`layerwise.stages.models.code`).
    """

    path: Path | None
    id: str | None
    revision: str | None = None
    dtype: str = "float32"
    trust: bool = False
    python: str | None = None

    @property
    def name(self) -> str:
        """The folder, the id or the function."""
        return str(self.path or self.id or self.python)

    def resolved(self) -> dict[str, Any]:
        """As it would stand in a file, with nothing left to defaults."""
        named = {"path": None if self.path is None else str(self.path), "id": self.id, "python": self.python}
        source = {key: value for key, value in named.items() if value is not None}
        revision = {} if self.revision is None else {"revision": self.revision}
        return {**source, **revision, "dtype": self.dtype, **({"trust": True} if self.trust else {})}


@dataclass(frozen=True)
class Text:
    """An entry of `data:`: local files, or a dataset of the Hugging Face hub.

    Args:
        sequence_length: tokens of one sequence; None for as many as the model takes, within reason.
        tokens: how many to use; None for all.
        bos: whether each sequence begins with the beginning-of-sequence token; None for what the tokenizer does.
        paths: files of UTF-8 text or of records, absolute, in reading order; empty for a dataset.
        dataset: Hugging Face name, None for files; `config` and `split` say what of it to read.
        column: that holds the text of a record; None for `text`.
    """

    sequence_length: int | None
    tokens: int | None = None
    bos: bool | None = None
    paths: tuple[Path, ...] = ()
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    column: str | None = None

    @property
    def origins(self) -> frozenset[str]:
        """What the text is read from; two texts with an origin in common are not independent."""
        if self.dataset is None:
            return frozenset(os.path.realpath(path) for path in self.paths)
        return frozenset([" ".join(filter(None, (self.dataset, self.config, self.split)))])

    def resolved(self) -> dict[str, Any]:
        """As it would stand in a file, with nothing left to defaults."""
        keys = ("dataset", "config", "split", "column", "tokens", "sequence_length", "bos")
        files = {"text": [str(path) for path in self.paths]} if self.dataset is None else {}
        return files | {key: getattr(self, key) for key in keys if getattr(self, key) is not None}


@dataclass(frozen=True)
class Tensors:
    """An entry of `data:`: tensors that a function of the user's gives.

    Args:
        python: the function, its file absolute.
        entries: how many to use; None for all.
    """

    python: str
    entries: int | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """No text files."""
        return ()

    @property
    def origins(self) -> frozenset[str]:
        """What they come from; two with an origin in common are not independent."""
        return frozenset([self.python])

    def resolved(self) -> dict[str, Any]:
        """As it would stand in a file, with nothing left to defaults."""
        return {"python": self.python} | ({} if self.entries is None else {"entries": self.entries})


def read_model(header: Tree, report: Report) -> Model | None:
    """The dense model of a resolved workflow; None for one with mistakes."""
    tree = header.entries.get("model")
    if tree is None or unresolved(tree):
        return None
    if isinstance(tree.value, str):
        return _find_model(tree, ("model",), {}, report)
    entry = validate(ModelEntry, tree, ("model",), Report())
    if entry is None:
        return None
    key = next(key for key in ("path", "id", "python") if getattr(entry, key) is not None)
    if key == "python":
        function = _find_function(tree.entries[key], ("model", key), report)
        return Model(None, None, None, entry.dtype, entry.trust, function)
    options = {"dtype": entry.dtype, "revision": entry.revision, "trust": entry.trust}
    return _find_model(tree.entries[key], ("model", key), options, report)


def _find_model(tree: Tree, path: KeyPath, options: dict[str, Any], report: Report) -> Model:
    """What a text names: under `path` a folder, under `id` a hub model, under `model` alone whichever it looks like."""
    text, key = str(tree.value), path[-1]
    may_be_id = _HUB_ID.fullmatch(text) is not None
    try:
        folder = _absolute(text, tree.place)
    except UsageError as error:
        report.add(tree.place, path, error.message)
        return Model(Path(text), None, **options)
    wrong = missing(folder, "folder")
    if key == "id" or (key == "model" and "/" in text and may_be_id and wrong is not None):
        if not may_be_id:
            report.add(tree.place, path, f"'{text}' is not a Hugging Face id (owner/name)")
        return Model(None, text, **options)
    if wrong is not None:
        advice = f" (a Hugging Face id without owner is written {{id: {text}}})" if may_be_id else ""
        report.add(tree.place, path, wrong + advice)
    return Model(folder, None, **options)


def _find_function(tree: Tree, path: KeyPath, report: Report) -> str:
    """The name of a function with its file absolute; nothing is run or imported."""
    name = str(tree.value)
    parts = split(name)
    if parts is None:
        report.add(tree.place, path, f"'{name}' names no function: {NAMED_LIKE}")
        return name
    file, module, function = parts
    if file is None:
        beside = _absolute(f"{module}.py", tree.place)
        return f"{beside}:{function}" if beside.is_file() else name
    file = _absolute(str(file), tree.place)
    if not file.is_file():
        report.add(tree.place, path, f"file not found: {file}")
    return f"{file}:{function}"


def check_family(model: Model | None, data: Mapping[str, Text | Tensors | None], header: Tree, report: Report) -> None:
    """Report data that the model cannot be run on: text for a network of the user's own, tensors for any other."""
    entries = header.entries.get("data", Tree({}, header.place)).entries
    own = model is not None and model.python is not None
    for name, entry in data.items() if model is not None else ():
        if entry is not None and isinstance(entry, Tensors) != own:
            given = "a network of your own takes tensors" if own else "a language model takes text"
            report.add(entries[name].place, ("data", name), f"{given}: {_TAKES[own]}")


_TAKES = {True: "give {python: file.py:function}", False: "give {text: file}, or a model of your own: {python: ...}"}


def read_texts(header: Tree, report: Report) -> dict[str, Text | Tensors | None]:
    """The entries of `data:` of a resolved workflow by name; None for one with mistakes."""
    data = header.entries.get("data", Tree({}, header.place))
    return {name: _read_text(child, ("data", name), report) for name, child in data.entries.items()}


def _read_text(tree: Tree, path: KeyPath, report: Report) -> Text | Tensors | None:
    if unresolved(tree):
        return None
    if "python" in tree.entries:
        made = validate(TensorEntry, tree, path, Report())
        if made is None:
            return None
        return Tensors(_find_function(tree.entries["python"], (*path, "python"), report), made.entries)
    if "dataset" in tree.entries:
        hub = validate(DatasetEntry, tree, path, Report())
        return None if hub is None else Text(**hub.model_dump())
    files = validate(TextEntry, tree, path, Report())
    if files is None:
        return None
    text = tree.entries["text"]
    named: list[tuple[KeyPath, Tree]] = [((*path, "text"), text)]
    if isinstance(text.value, list):
        named = [((*path, "text", index), child) for index, child in enumerate(text.value)]
    paths: list[Path] = []
    for at, child in named:
        try:
            found = _absolute(str(child.value), child.place)
            folder = is_folder(found)
            wrong = None if folder else missing(found, "file")
            paths += _texts_in(found) if folder else [found]
        except UsageError as error:
            wrong = error.message
        if wrong is not None:
            report.add(child.place, at, wrong)
    return Text(paths=tuple(paths), **files.model_dump(exclude={"text"}))


def _texts_in(folder: Path) -> list[Path]:
    """The files of text and of records in a folder and in those below it, by path; hidden ones are left out.

    Raises:
        UsageError: there are none, or too many for a text.
    """
    found = []
    for path in folder.rglob("*"):
        if path.suffix.lower() in TEXT_ENDINGS and path.is_file() and not _hidden(path.relative_to(folder)):
            found.append(path)
            if len(found) > MOST_FILES:
                raise UsageError(
                    f"more than {MOST_FILES:,} text files in {folder}: join them, or name the ones to read"
                )
    if not found:
        raise UsageError(f"no text files in {folder}: nothing there ends in {', '.join(TEXT_ENDINGS)}")
    return sorted(found)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _absolute(path: str, place: Place) -> Path:
    """A path as the file that names it means it: relative to that file's folder.

    Raises:
        UsageError: it begins with the home folder of a user whom nobody knows.
    """
    folder = Path(place.file).absolute().parent
    return Path(os.path.normpath(folder / expanded(path)))
