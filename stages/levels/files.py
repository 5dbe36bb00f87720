"""Files of levels: all levels of one unit in one safetensors file, as databases and compressed models keep them.

The tensors stand as `<level>/<tensor>`, recipe and shape of every level in the header. Names are sorted and nothing
tells the time: the same levels give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwise.errors import CorruptArtifact
from layerwise.results.durable import settle_file
from layerwise.results.links import unfinished
from layerwise.stages.levels.level import Level

RECIPES = "levels"
"""Key in the file's header: recipe and shape of every level, as JSON. A single key: they have no order there."""


def unit_file(folder: Path, unit: str) -> Path:
    """Where the levels of a unit stand.

    Raises:
        CorruptArtifact: the unit's name, which an artifact may bring, would lead out of the folder.
    """
    if "/" in unit or "\0" in unit:
        raise CorruptArtifact(f"{unit!r} cannot name a unit", hint="look where that artifact came from, and delete it")
    return folder / "units" / f"{unit}.safetensors"


def write_unit(folder: Path, unit: str, levels: Sequence[Level]) -> Path:
    """Write the levels of one unit; the file is complete or absent.

    Args:
        folder: the database.
        unit: full module name.
        levels: with distinct names.
    Returns:
        the file.
    """
    from safetensors.torch import save_file

    assert len({level.name for level in levels}) == len(levels), f"{unit}: two levels of one name"
    tensors = {
        f"{level.name}/{name}": tensor.detach().cpu().contiguous()
        for level in levels
        for name, tensor in level.tensors.items()
    }
    recipes = {level.name: {"recipe": dict(level.recipe), "shape": list(level.shape)} for level in levels}
    target = unit_file(folder, unit)
    target.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(target) as partial:
        save_file(
            {key: tensors[key] for key in sorted(tensors)},
            partial,
            metadata={RECIPES: json.dumps(recipes, sort_keys=True, allow_nan=False)},
        )
        settle_file(partial, target)
    return target


def open_unit(folder: Path, unit: str) -> tuple[Any, dict[str, Any]]:
    """A file of `write_unit`, memory-mapped, and the recipes in its header.

    Raises:
        CorruptArtifact: it is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = unit_file(folder, unit)
    try:
        file: Any = safe_open(path, framework="pt")
        recipes: dict[str, Any] = json.loads(file.metadata()[RECIPES])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{path}: {error}", hint="delete the artifact; the next run makes it again") from error
    return file, recipes


def read_level(file: Any, recipes: Mapping[str, Any], name: str) -> Level:
    """A level out of what `open_unit` gave; its tensors stay on disk until they are touched."""
    prefix = f"{name}/"
    tensors = {
        key.removeprefix(prefix): file.get_tensor(key)
        for key in file.keys()  # noqa: SIM118 (a safetensors file is no dict)
        if key.startswith(prefix)
    }
    rows, columns = recipes[name]["shape"]
    return Level(name, recipes[name]["recipe"], (rows, columns), tensors)
