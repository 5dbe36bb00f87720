"""Weight files of an export: tensors in the order of their names, cut into shards, with the index that names them.

A part is what is written together (all tensors of one unit, say): its bytes are known before it is read, so shards are
planned first, and of all weights no more than one shard is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.stages.models.folder import INDEX, SINGLE

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 5 * 10**9
"""Largest weight file, unless one part alone is larger; what `save_pretrained` of transformers writes, too."""


@dataclass(frozen=True)
class Part:
    """Tensors that stand in one file.

    Args:
        name: what it is sorted by.
        size_bytes: of its tensors.
        read: the tensors, by their names in the file.
    """

    name: str
    size_bytes: int
    read: Callable[[], Mapping[str, Tensor]]


def write_shards(parts: Sequence[Part], out: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the files: `model.safetensors`, or numbered ones and their index."""
    from safetensors.torch import save_file

    shards = _planned(sorted(parts, key=lambda part: part.name), shard_bytes)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for part in shard:
            read = part.read()
            found = sum(tensor.nbytes for tensor in read.values())
            assert found == part.size_bytes, f"{part.name} takes {found} bytes, {part.size_bytes} were promised"
            tensors |= {key: tensor.contiguous() for key, tensor in read.items()}
        save_file({key: tensors[key] for key in sorted(tensors)}, out / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(part.size_bytes for part in parts)
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (out / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _planned(parts: Sequence[Part], shard_bytes: int) -> list[list[Part]]:
    """Neighbours together, as many as fit."""
    shards: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        if shards[-1] and filled + part.size_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += part.size_bytes
    return shards
