"""Reads single tensors of a Hugging Face checkpoint, memory-mapped, without building the model.

A worker that compresses one unit needs one weight; loading a 16 GB model for it would be absurd. Only safetensors are
read: other formats run code while loading.
"""

from __future__ import annotations

import json
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.errors import UnsupportedModel
from layerwise.stages.models.folder import INDEX, SINGLE, ModelFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BYTES_OF_DTYPE = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}
"""Width of the dtypes that safetensors names in its header; 8-bit floats are all called F8_*."""


class Checkpoint:
    """The weights of a model folder, by tensor name.

    Args:
        folder: holds `model.safetensors`, or shards with `model.safetensors.index.json`.
        trust: whether code that stands in the folder belongs to the model.
    Raises:
        UnsupportedModel: there are no safetensors, or not all that their index names.
    """

    def __init__(self, folder: Path, trust: bool = False) -> None:
        self.folder, self.contents = folder, ModelFolder(folder, trust)
        if not self.files:
            raise UnsupportedModel(
                f"{folder} holds no safetensors weights: neither {SINGLE} nor shards with {INDEX}",
                hint="save the model with `save_pretrained` (safetensors is its default); pickled weights are not read",
            )

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in name order: those that transformers loads, and no copies or adapters beside them."""
        return self.contents.weights

    def place_of(self, file: Path) -> Path:
        """Where a weight file stands, relative to the folder."""
        return file.relative_to(self.folder)

    @cached_property
    def headers(self) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
        """Tensor name to (file, dtype as safetensors writes it, shape)."""
        found = {}
        for file in self.files:
            for name, (dtype, shape) in read_header(file).items():
                found[name] = (file, dtype, shape)
        return found

    @property
    def beside(self) -> tuple[Path, ...]:
        """What a model folder holds beside its weights: configuration and tokenizer, and no index of weight files."""
        return self.contents.beside

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.tensor_bytes(name) for name in self.headers)

    def tensor_bytes(self, name: str) -> int:
        """Bytes of one tensor."""
        return BYTES_OF_DTYPE.get(self.headers[name][1], 1) * self.elements(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor."""
        from safetensors import safe_open

        with safe_open(self.headers[name][0], framework="pt") as file:
            part: Tensor = file.get_slice(name)[:0] if self.headers[name][2] else file.get_tensor(name)
            return part.dtype

    def elements(self, name: str) -> int:
        """Values in one tensor."""
        return prod(self.headers[name][2])

    def find(self, name: str, shape: tuple[int, ...], prefix: str) -> str | None:
        """The stored name of a parameter: with the prefix of the base model (`model.`, `transformer.`) or without."""
        for candidate in (name, name.removeprefix(prefix + "."), f"{prefix}.{name}"):
            if candidate in self.headers and self.headers[candidate][2] == shape:
                return candidate
        return None

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        from safetensors import safe_open

        with safe_open(self.headers[name][0], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def first_row(self, name: str) -> Tensor:
        """The first entry of a tensor along its first dimension; no more is read."""
        from safetensors import safe_open

        with safe_open(self.headers[name][0], framework="pt") as file:
            tensor: Tensor = file.get_slice(name)[:1]
            return tensor[0]


def read_metadata(file: Path) -> dict[str, str] | None:
    """What the header of a safetensors file says of the file; it can be read."""
    with file.open("rb") as stream:
        metadata: dict[str, str] | None = json.loads(stream.read(int.from_bytes(stream.read(8), "little"))).get(
            "__metadata__"
        )
    return metadata


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes in a safetensors file, from its header alone.

    Raises:
        UnsupportedModel: the file is cut short or no safetensors file.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            if length > size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if any(8 + length + entry["data_offsets"][1] > size for entry in entries.values()):
            raise ValueError("the file is cut short")
        return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # the last three: JSON of another kind
        raise UnsupportedModel(f"cannot read {file}: {error}", hint="copy or download the model again") from error
