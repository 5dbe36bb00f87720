"""`export`: folders that other tools load, one file for each format.

A format is a function `fn(source, out, *, ...)` that writes a folder from a model:

    source   a `ModelSource`, dense or compressed
    out      the folder, empty
    ...      those of the settings of `export` that it has an argument for, by name

Other packages join through the entry point group `layerwise.formats`, with the same `module:function` text.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.stages.registry import lookup, names

if TYPE_CHECKING:
    from layerwise.stages.export.held import Held
    from layerwise.stages.models.checkpoint import Checkpoint

FORMATS = {
    "compressed_tensors": "layerwise.stages.export.compressed_tensors:compressed_tensors",
    "dense": "layerwise.stages.export.dense:dense",
    "gptq": "layerwise.stages.export.gptq:gptq",
    "gptq_v2": "layerwise.stages.export.gptq:gptq_v2",
    "native": "layerwise.stages.export.native:native",
}

HELD = {
    "compressed_tensors": "layerwise.stages.export.compressed_tensors:held",
    "dense": "layerwise.stages.export.dense:held",
    "gptq": "layerwise.stages.export.gptq:held",
    "gptq_v2": "layerwise.stages.export.gptq:held_v2",
}
"""Of formats that `allocate` can count a budget in: a function of some of their settings that gives a `held.Held`.
`native` stores levels as a database does, which is what is counted without a format."""

FORMAT_GROUP = "layerwise.formats"
HELD_GROUP = "layerwise.formats.held"

Write = Callable[..., None]


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


def options_of(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some settings that the format of that name has an argument for."""
    arguments = inspect.signature(find_format(name)).parameters
    return {key: value for key, value in settings.items() if key in arguments}


def held_names() -> list[str]:
    """Every format that a budget can be counted in."""
    return names(HELD, HELD_GROUP)


def find_held(name: str, settings: Mapping[str, Any]) -> Held:
    """What a format can hold, with those of some settings that it reads.

    Raises:
        UsageError: it does not say.
    """
    make: Callable[..., Held] = lookup(name, HELD, group=HELD_GROUP, kind="format with known sizes")
    arguments = inspect.signature(make).parameters
    return make(**{key: value for key, value in settings.items() if key in arguments})


def copy_beside(checkpoint: Checkpoint, out: Path) -> None:
    """Configuration and tokenizer of a model, and no index of its weight files."""
    for file in checkpoint.beside:
        shutil.copyfile(file, out / file.name)
