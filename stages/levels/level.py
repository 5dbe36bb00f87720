"""A level: encoded tensors plus the recipe that made them.

`Level.decode` is the single definition of what a level means; kernels, export and search are tested against it. What is
particular to one way of storing a weight is an `Encoding`, one file each: how to decode it, what it costs, how it is
laid out for a kernel. Other packages join through the entry point group `layerwise.encodings`.

Torch is imported only by the work itself, because the recipes and costs of levels are also read where there is none.
Left out: anything about a unit's place in the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from layerwise.errors import UsageError
from layerwise.stages.registry import lookup, names

if TYPE_CHECKING:
    from torch import Tensor, device

    from layerwise.kernels.packed import Packed

ENCODINGS = {
    "dense": "layerwise.stages.levels.dense:Dense",
    "grid": "layerwise.stages.levels.grid:Grid",
    "mask": "layerwise.stages.levels.mask:Mask",
    "masked_grid": "layerwise.stages.levels.masked_grid:MaskedGrid",
    "block_grid": "layerwise.stages.levels.block_grid:BlockGrid",
    "trellis": "layerwise.stages.levels.trellis:Trellis",
    "low_rank": "layerwise.stages.levels.low_rank:LowRank",
    "adapted": "layerwise.stages.levels.adapted:Adapted",
    "sliced": "layerwise.stages.levels.sliced:Sliced",
    "keep": "layerwise.stages.levels.parent:Keep",
    "drop": "layerwise.stages.levels.parent:Drop",
    "narrow": "layerwise.stages.levels.parent:Narrow",
}
"""Every way to store a weight, and the three that a parent knows."""

ENCODING_GROUP = "layerwise.encodings"


@dataclass(frozen=True, eq=False)
class Level:
    """One compressed variant of one unit.

    Args:
        name: `gptq-3b-g128`, `dense`, ...; unique within a unit.
        recipe: JSON values: `encoding`, `method`, and everything else that it takes to decode the tensors or to make
            them again.
        shape: (out, in) of the weight; (0, 0) of a parent's level.
        tensors: what is stored, by the names that the encoding gives them.
    """

    name: str
    recipe: Mapping[str, Any]
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    def decode(self) -> Tensor:
        """The dense weight that this level stands for: (out, in), float32, on the device of the tensors."""
        return self.encoding.decode(self)

    def to(self, place: device | str) -> Level:
        """The same level with its tensors on a device."""
        return replace(self, tensors={name: tensor.to(place) for name, tensor in self.tensors.items()})

    @property
    def bits(self) -> float:
        """Nominal bits per weight, without overhead."""
        return self.encoding.nominal_bits(self) / self.n_weights if self.n_weights else 0.0

    @property
    def effective_bits(self) -> float:
        """Bits per weight over everything that is stored: codes, scales, zero points and indices; no word padding."""
        return self.stored_bits / self.n_weights if self.n_weights else 0.0

    @property
    def stored_bits(self) -> int:
        """The exact sum behind `effective_bits`."""
        return self.encoding.stored_bits(self)

    @property
    def parameters(self) -> int:
        """Weights that are kept, and what stands beside them and is multiplied, too."""
        return self.encoding.parameters(self)

    @property
    def size_bytes(self) -> int:
        """Bytes of the stored tensors, word padding included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def n_weights(self) -> int:
        """Weights of the dense matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def costs(self) -> dict[str, float]:
        """Absolute amounts of every resource that levels know (`layerwise.results.resources`), `flops` for a token that
        meets the whole weight. What a parent costs depends on what else gets levels; `compress` fills it in."""
        return {
            "bits": self.encoding.nominal_bits(self),
            "effective_bits": self.stored_bits,
            "bytes": self.size_bytes,
            "parameters": self.parameters,
            "density": self.parameters,
            "flops": 2 * self.parameters,
            "depth": 0.0,
        }

    def stored_as(self, key: str) -> dict[str, Tensor]:
        """Its tensors as they stand inside another level, which has its recipe under that key."""
        return {f"{key}.{name}": tensor for name, tensor in self.tensors.items()}

    def inside(self, key: str, name: str, shape: tuple[int, int]) -> Level:
        """A level that stands inside this one."""
        prefix = f"{key}."
        tensors = {own.removeprefix(prefix): tensor for own, tensor in self.tensors.items() if own.startswith(prefix)}
        return Level(name, self.recipe[key], shape, tensors)

    @property
    def encoding(self) -> Encoding:
        """How it is stored."""
        return find_encoding(self.recipe["encoding"])


class Encoding(Protocol):
    """One way of storing a weight. Its functions take a level of this encoding; it has no state.

    `layerwise.testing.check_encoding` says what each must fulfil.
    """

    @staticmethod
    def decode(level: Level) -> Tensor:
        """The dense weight: (out, in), float32."""
        ...

    @staticmethod
    def nominal_bits(level: Level) -> float:
        """Bits of all kept weights, without overhead, as papers count them."""
        ...

    @staticmethod
    def stored_bits(level: Level) -> int:
        """Every bit stored for the level, without word padding."""
        ...

    @staticmethod
    def parameters(level: Level) -> int:
        """Weights that are kept, and what stands beside them and is multiplied, too."""
        ...

    @staticmethod
    def pack(level: Level) -> Packed | None:
        """The weight as a kernel takes it, whose `dense()` is `decode` exactly; None if there is no kernel for it."""
        ...

    @staticmethod
    def label(recipe: Mapping[str, Any]) -> str:
        """What of a recipe decides how fast a level of a given shape runs: levels of one label are timed once.

        Only the recipe is looked at, which stands in the index of a database: to read every level of a large model in
        order to learn that five of them differ would take longer than to time those five.
        """
        ...


def encoding_names() -> list[str]:
    """Every encoding that a recipe may name."""
    return names(ENCODINGS, ENCODING_GROUP)


def find_encoding(name: str) -> Encoding:
    """The encoding of that name.

    Raises:
        UsageError: nobody offers it.
    """
    try:
        encoding: Encoding = lookup(name, ENCODINGS, group=ENCODING_GROUP, kind="encoding")
    except UsageError as error:
        error.hint = "it was written by another version of layerwise, or by a package that is not installed here"
        raise
    return encoding
