"""The levels of a parent: `keep`, which is as it is, `drop`, which leaves it out of the network, and `narrow`, which
gives the units inside those levels of theirs that have its own name.

A parent (`attention`, `mlp`, `block`) has no weight of its own, so none of them stores a tensor. What belongs to it
beside its units (norms, biases) is paid for by `keep`; `drop` costs nothing, and neither do the units inside it then.
`narrow` pays for both; the units inside are no choices of their own then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from layerwise.errors import UsageError
from layerwise.stages.levels.level import Level


def parent_level(encoding: str, *, name: str | None = None, method: str | None = None, **recipe: Any) -> Level:
    """`keep` or `drop`; `narrow` with its name, the method that made it and what that says of it."""
    return Level(name or encoding, {"encoding": encoding, "method": method or encoding, **recipe}, (0, 0), {})


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


class Narrow(Keep):
    """See the module."""
