"""What a workflow works on: the dense model and the texts, found relative to the file that names them.

Mistakes of form (a wrong type, an unknown key) are reported by whoever validates the workflow as a whole; here only
what the form cannot show is reported: a folder or a file that is not there.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.pipeline.workflow.expressions import unresolved
from layerwise.pipeline.workflow.fileformat import DatasetEntry, ModelEntry, TextEntry
from layerwise.pipeline.workflow.mistakes import validate
from layerwise.pipeline.workflow.report import Report
from layerwise.pipeline.workflow.yaml12 import KeyPath, Place, Tree

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Model:
    """The dense model: a local folder, or a Hugging Face id that is still to be fetched.

    Args:
        path: the folder, absolute; None for a Hugging Face id.
        revision: of a Hugging Face model.
        trust: whether code that it brings may run.
    """

    path: Path | None
    id: str | None
    revision: str | None = None
    dtype: str = "float32"
    trust: bool = False

    @property
    def name(self) -> str:
        """The folder or the id."""
        return str(self.path or self.id)

    def resolved(self) -> dict[str, Any]:
        """As it would stand in a file, with nothing left to defaults."""
        source = {"path": str(self.path)} if self.path is not None else {"id": self.id}
        revision = {} if self.revision is None else {"revision": self.revision}
        return {**source, **revision, "dtype": self.dtype, **({"trust": True} if self.trust else {})}


@dataclass(frozen=True)
class Text:
    """An entry of `data:`: local files, or a dataset of the Hugging Face hub.

    Args:
        sequence_length: tokens of one sequence; None for as many as the model takes, within reason.
        tokens: how many to use; None for all.
        paths: UTF-8 text files, absolute, in reading order; empty for a dataset.
        dataset: Hugging Face name, None for files; `config`, `split` and `column` say what of it to read.
    """

    sequence_length: int | None
    tokens: int | None = None
    paths: tuple[Path, ...] = ()
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    column: str | None = None

    @property
    def origins(self) -> frozenset[str]:
        """What the text is read from; two texts with an origin in common are not independent."""
        if self.dataset is None:
            return frozenset(str(path.resolve()) for path in self.paths)
        return frozenset([" ".join(filter(None, (self.dataset, self.config, self.split)))])

    def resolved(self) -> dict[str, Any]:
        """As it would stand in a file, with nothing left to defaults."""
        keys = ("dataset", "config", "split", "column", "tokens", "sequence_length")
        files = {"text": [str(path) for path in self.paths]} if self.dataset is None else {}
        return files | {key: getattr(self, key) for key in keys if getattr(self, key) is not None}


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
    key = "path" if entry.path is not None else "id"
    options = {"dtype": entry.dtype, "revision": entry.revision, "trust": entry.trust}
    return _find_model(tree.entries[key], ("model", key), options, report)


def _find_model(tree: Tree, path: KeyPath, options: dict[str, Any], report: Report) -> Model:
    """What a text names: under `path` a folder, under `id` a hub model, under `model` alone whichever it looks like."""
    text, key = str(tree.value), path[-1]
    folder = _absolute(text, tree.place)
    may_be_id = _HUB_ID.fullmatch(text) is not None
    if key == "id" or (key == "model" and "/" in text and may_be_id and not folder.is_dir()):
        if not may_be_id:
            report.add(tree.place, path, f"'{text}' is not a Hugging Face id (owner/name)")
        return Model(None, text, **options)
    if not folder.is_dir():
        advice = f" (a Hugging Face id without owner is written {{id: {text}}})" if may_be_id else ""
        report.add(tree.place, path, f"folder not found: {folder}{advice}")
    return Model(folder, None, **options)


def read_texts(header: Tree, report: Report) -> dict[str, Text | None]:
    """The entries of `data:` of a resolved workflow by name; None for one with mistakes."""
    data = header.entries.get("data", Tree({}, header.place))
    return {name: _read_text(child, ("data", name), report) for name, child in data.entries.items()}


def _read_text(tree: Tree, path: KeyPath, report: Report) -> Text | None:
    if unresolved(tree):
        return None
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
    paths = tuple(_absolute(str(child.value), child.place) for _, child in named)
    for file, (at, child) in zip(paths, named, strict=True):
        if not file.is_file():
            wrong = "this is a folder, not a text file" if file.is_dir() else "file not found"
            report.add(child.place, at, f"{wrong}: {file}")
    return Text(paths=paths, tokens=files.tokens, sequence_length=files.sequence_length)


def _absolute(path: str, place: Place) -> Path:
    """A path as the file that names it means it: relative to that file's folder."""
    folder = Path(place.file).absolute().parent
    return Path(os.path.normpath(folder / Path(path).expanduser()))
