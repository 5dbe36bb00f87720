"""`export`: folders that other tools load, one file for each format.

A format is a function `fn(source, out)` that writes a folder from a model:

    source   a `ModelSource`, dense or compressed
    out      the folder, empty

Other packages join through the entry point group `layerwise.formats`, with the same `module:function` text.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.stages.contract import ModelSource
from layerwise.stages.registry import lookup, names

if TYPE_CHECKING:
    from layerwise.stages.models.checkpoint import Checkpoint

FORMATS = {
    "dense": "layerwise.stages.export.dense:dense",
    "native": "layerwise.stages.export.native:native",
}

FORMAT_GROUP = "layerwise.formats"

Write = Callable[[ModelSource, Path], None]


def format_names() -> list[str]:
    """Every format that a workflow may name."""
    return names(FORMATS, FORMAT_GROUP)


def find_format(name: str) -> Write:
    """The function that writes a format.

    Raises:
        UsageError: nobody offers it; names the nearest known one.
    """
    write: Write = lookup(name, FORMATS, group=FORMAT_GROUP, kind="format")
    return write


def copy_beside(checkpoint: Checkpoint, out: Path) -> None:
    """Configuration and tokenizer of a model, and no index of its weight files."""
    for file in checkpoint.beside:
        shutil.copyfile(file, out / file.name)
