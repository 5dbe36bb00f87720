"""The levels of a parent: `keep`, which is as it is, and `drop`, which leaves it out of the network.

A parent (`attention`, `mlp`, `block`) has no weight of its own, so neither stores a tensor. What belongs to it beside
its units (norms, biases) is paid for by `keep`; `drop` costs nothing, and neither do the units inside it then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from layerwise.errors import UsageError
from layerwise.stages.levels.level import Level


def parent_level(name: str) -> Level:
    """`keep` or `drop`."""
    return Level(name, {"encoding": name, "method": name}, (0, 0), {})


class Keep:
    """See the module."""

    @staticmethod
    def decode(level: Level) -> NoReturn:
        raise UsageError(f"level {level.name} of a parent stands for no weight")

    @staticmethod
    def nominal_bits(level: Level) -> float:
        return 0.0

    @staticmethod
    def stored_bits(level: Level) -> int:
        return 0

    @staticmethod
    def parameters(level: Level) -> int:
        return 0

    @staticmethod
    def pack(level: Level) -> None:
        return None

    @staticmethod
    def label(recipe: Mapping[str, Any]) -> str:
        return str(recipe["encoding"])


class Drop(Keep):
    """See the module."""
