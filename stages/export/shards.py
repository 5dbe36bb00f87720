"""Weight files of an export: tensors in the order of their names, cut into shards, with the index that names them.

A part is what is written together (all tensors of one unit, say): what it holds is known before it is read, so shards
are planned first, and of all weights no more than one shard is in memory.

How long the header of a safetensors file is depends on everything in the file, through the digits of the offsets. A
budget needs bytes that add up. So every part is charged its own lines of the header with room for long offsets, and the
header is filled up with spaces to what its parts were charged, which the format allows. The room is enough for the
beginning of a file of its own, too, so it does not matter where a file is cut.

Source: the format as of safetensors 0.7, README.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.stages.models.checkpoint import BYTES_OF_DTYPE
from layerwise.stages.models.folder import INDEX, SINGLE

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 5 * 10**9
"""Largest weight file, unless one part alone is larger; what `save_pretrained` of transformers writes, too."""

METADATA = {"format": "pt"}
ALIGNMENT = 8
OFFSET_DIGITS = 32
"""Room that is charged for each of the two offsets of a tensor: the 12 digits of a terabyte, and 40 bytes, of both
together, for the beginning of a file."""

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name to dtype, as safetensors writes it, and shape."""


def data_bytes(layout: Layout) -> int:
    """Bytes of the values of some tensors."""
    return sum(BYTES_OF_DTYPE.get(dtype, 1) * prod(shape) for dtype, shape in layout.values())


def charged_bytes(layout: Layout) -> int:
    """What a part adds to the weight files: its tensors, and their lines in a header."""
    lines = sum(len(_line(name, *entry, ("", ""))) + 1 + 2 * OFFSET_DIGITS for name, entry in layout.items())
    return data_bytes(layout) + _aligned(lines)


def _line(name: str, dtype: str, shape: Sequence[int], offsets: tuple[int | str, int | str]) -> bytes:
    """The entry of a tensor."""
    sizes = ",".join(map(str, shape))
    begin, end = offsets
    entry = (
        f'{json.dumps(name, ensure_ascii=False)}:{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{begin},{end}]}}'
    )
    return entry.encode()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _in_order(layout: Layout) -> list[str]:
    """Wide values first, so that all are aligned."""
    return sorted(layout, key=lambda name: (-BYTES_OF_DTYPE.get(layout[name][0], 1), name))


def header(layout: Layout, metadata: Mapping[str, str] | None, *, least: int = 0) -> bytes:
    """The beginning of a safetensors file, its length included.

    Args:
        layout: what the file holds.
        metadata: of the file.
        least: bytes to fill it up to.
    """
    lines = [] if metadata is None else [b'"__metadata__":' + _compact(metadata)]
    at = 0
    for name in _in_order(layout):
        end = at + data_bytes({name: layout[name]})
        lines.append(_line(name, *layout[name], (at, end)))
        at = end
    text = b"{" + b",".join(lines) + b"}"
    length = max(_aligned(8 + len(text)), least) - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def _compact(metadata: Mapping[str, str]) -> bytes:
    return json.dumps(dict(sorted(metadata.items())), separators=(",", ":"), ensure_ascii=False).encode()


FILE_BYTES = len(header({}, METADATA))
"""What the first file takes before any tensor."""


def write_file(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None, *, least_header: int = 0
) -> None:
    """Write a safetensors file.

    Args:
        tensors: on the CPU.
        file: its place.
        metadata: as of `header`.
        least_header: bytes to fill the header up to.
    """
    import torch

    layout = layout_of(tensors)
    with file.open("wb") as stream:
        stream.write(header(layout, metadata, least=least_header))
        for name in _in_order(layout):
            stream.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What tensors are in a file."""
    return {
        name: (_DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


_DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64", "bool": "BOOL"},
    **{f"int{width}": f"I{width}" for width in (8, 16, 32, 64)},
    **{f"uint{width}": f"U{width}" for width in (8, 16, 32, 64)},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"},
}


@dataclass(frozen=True)
class Part:
    """Tensors that stand in one file.

    Args:
        name: what it is sorted by.
        layout: what it holds.
        read: the tensors, by their names in the file.
    """

    name: str
    layout: Layout
    read: Callable[[], Mapping[str, Tensor]]


def write_shards(parts: Sequence[Part], out: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the files: `model.safetensors`, or numbered ones and their index.

    Together they take FILE_BYTES and what their parts are charged.
    """
    shards = _planned(sorted(parts, key=lambda part: part.name), shard_bytes)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        least = FILE_BYTES if number == 1 else 0
        for part in shard:
            read = part.read()
            found = layout_of(read)
            assert found == dict(part.layout), f"{part.name} holds {found}, {part.layout} was promised"
            tensors |= read
            least += charged_bytes(part.layout) - data_bytes(part.layout)
        write_file(tensors, out / name, METADATA, least_header=least)
        places |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(data_bytes(part.layout) for part in parts)
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (out / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _planned(parts: Sequence[Part], shard_bytes: int) -> list[list[Part]]:
    """Neighbours together, as many as fit."""
    shards: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        size = data_bytes(part.layout)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += size
    return shards
