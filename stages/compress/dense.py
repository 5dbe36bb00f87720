"""`dense`: lets a search leave a unit as it is. The level is there in any case, as every unit's first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from layerwise.stages.compress import MenuEntry, Task

if TYPE_CHECKING:
    from layerwise.stages.levels.level import Level


class Params(MenuEntry):
    """There is nothing to choose."""

    method: Literal["dense"] = "dense"

    def level_names(self) -> list[str]:
        """None: it makes no level."""
        return []

    @property
    def offers_unchanged(self) -> bool:
        """This is what it is for."""
        return True


def dense(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make nothing."""
    return {unit: [] for unit in task.units}
