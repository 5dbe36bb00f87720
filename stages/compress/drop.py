"""`drop`: half-blocks and blocks that may be left out.

A level of a parent: where a search takes it, the half-block adds nothing to the hidden state, or the block passes it
on, and the units inside cost nothing. Both half-blocks of a block dropped are the block dropped: one model, one
candidate.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from layerwise.stages.compress import MenuEntry, Task
from layerwise.stages.quantities import listed

if TYPE_CHECKING:
    from layerwise.stages.levels.level import Level

Parent = Literal["attention", "mlp", "block"]


class Params(MenuEntry):
    """What may be dropped."""

    method: Literal["drop"] = "drop"
    units: Annotated[tuple[Parent, ...], listed(Parent)] = Field(
        ("attention", "mlp"), min_length=1, description="attention, mlp, block: one of them or a list"
    )

    def level_names(self) -> list[str]:
        """`drop`."""
        return ["drop"]

    def nominal_bits(self) -> tuple[float, ...]:
        """Nothing is left of what is dropped."""
        return (0.0,)

    def parents(self) -> Collection[str]:
        """Those of `units`."""
        return self.units


def drop(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make the level `drop` of every parent."""
    from layerwise.stages.levels.parent import parent_level

    return {name: [parent_level("drop")] for name in task.units}
