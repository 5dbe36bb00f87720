"""Whose code runs when a model folder is read: transformers' own, unless the workflow says `trust: true`.

A folder can bring Python modules and name their classes in an `auto_map`, and transformers would ask on the terminal
whether to run them. It can name an attention kernel that is code from elsewhere, and hold links to the user's files.
Weights are read from safetensors alone, trusted or not, because a pickle is a program.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerwise.errors import UnsupportedModel

CODE = "*.py"
"""What a model's own code stands in; of a trusted model it decides results."""

HINT = "if you have read it and trust it: `model: {path: ..., trust: true}`; it can do whatever you can"


@contextmanager
def loading(folder: Path, trust: bool) -> Iterator[dict[str, Any]]:
    """The keyword arguments for a `from_pretrained` of transformers; what it refuses is said in our words.

    Args:
        folder: a local model folder.
        trust: whether its own code may run.
    Raises:
        UnsupportedModel: it needs code of its own to be loaded, or names code that stands elsewhere.
    """
    documents = list(_documents(folder))
    elsewhere = [name for document in documents for name in _elsewhere(document)]
    if elsewhere:
        raise UnsupportedModel(
            f"{folder} names code that stands elsewhere: {', '.join(sorted(set(elsewhere)))}",
            hint="copy that code into the folder and name it there, or remove the entry",
        )
    try:
        yield {"local_files_only": True, "trust_remote_code": trust}
    except Exception as error:
        if not any("auto_map" in document for document in documents):
            raise
        if trust:  # foreign code raises anything
            told = f"{type(error).__name__}: {error}"
            raise UnsupportedModel(f"{folder} cannot be loaded with its own code: {told}") from error
        if not isinstance(error, ValueError):
            raise
        found = ", ".join(sorted(path.name for path in folder.glob(CODE))) or "`auto_map` names it"
        raise UnsupportedModel(
            f"{folder} cannot be loaded without code of its own ({found}), which is not run", hint=HINT
        ) from error


def check_links(folder: Path, files: Iterable[Path]) -> None:
    """Refuse files of a model whose contents would come from elsewhere: they go where the model goes.

    A model is shipped and exported with its configuration and tokenizer; a link among them could carry any file of the
    user's along. Weights may be links, because they are read as what they are. So may all that the hub's cache holds.

    Args:
        folder: the model's.
        files: that belong to it.
    Raises:
        UnsupportedModel: names the link.
    """
    here = folder.resolve()
    allowed = [here, here.parents[1] / "blobs"] if here.parent.name == "snapshots" else [here]
    for file in files:
        target = file.resolve()
        if file.is_symlink() and file.suffix != ".safetensors" and not any(map(target.is_relative_to, allowed)):
            raise UnsupportedModel(
                f"{file} is a link to {target}, outside of the model's folder",
                hint="what it leads to would be shipped and exported with the model; if that is meant, copy it there",
            )


def _documents(folder: Path) -> Iterator[dict[str, Any]]:
    for name in ("config.json", "tokenizer_config.json"):
        try:
            document = json.loads((folder / name).read_bytes())
        except (OSError, ValueError):  # whoever loads it says so
            continue
        if isinstance(document, dict):
            yield document


def _elsewhere(value: Any) -> Iterator[str]:
    """Code of the hub that a configuration names: `owner/repo--module.Class`, and kernels by `owner/repo`."""
    if isinstance(value, list):
        for part in value:
            yield from _elsewhere(part)
    if not isinstance(value, dict):
        return
    for key, part in value.items():
        if key == "auto_map":
            yield from (name for name in _texts(part) if "--" in name)
        elif key.endswith("_implementation"):
            yield from (name for name in _texts(part) if "/" in name)
        else:
            yield from _elsewhere(part)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
