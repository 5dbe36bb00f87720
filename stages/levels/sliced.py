"""`sliced`: a weight of which only the rows or the columns of some groups are kept: heads, or channels of an MLP.

    groups          uint8 (1, ceil(groups / 8))   bit i % 8 of byte i // 8: the rows or columns of group i are kept
    base.<tensor>   whatever the level of the kept part stores

The recipe says where the groups lie (`rows` and `columns`, as `layerwise.stages.models.channels.Segments`) and has the
recipe of the kept part as `base`. What is kept stands in the order in which it stood. As a weight of its full shape the
level is zero elsewhere; `export` makes a smaller layer of the kept part, which needs no index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layerwise.stages.levels.adapted import BASE
from layerwise.stages.levels.index import pack_mask, unpack_mask
from layerwise.stages.levels.level import Level
from layerwise.stages.models.channels import Segments, places, segments_of

if TYPE_CHECKING:
    from torch import Tensor


def sliced_level(
    name: str,
    method: str,
    base: Level,
    shape: tuple[int, int],
    *,
    groups: int,
    kept: Sequence[int],
    rows: Segments = (),
    columns: Segments = (),
    role: str = "",
    members: Sequence[str] = (),
) -> Level:
    """A level of the kept part as one of the whole weight.

    Args:
        name: the level's.
        method: what chose the groups.
        base: of the kept part.
        shape: (out, in) of the whole weight.
        groups: how many there are.
        kept: their numbers, rising.
        rows, columns: where the groups lie; of a dimension without groups all is kept.
        role: of the half-block that the groups are of.
        members: the units inside of which the same groups are kept.
    """
    import torch

    mask = torch.zeros((1, groups), dtype=torch.bool)
    mask[0, list(kept)] = True
    recipe = {
        "encoding": "sliced",
        "method": method,
        "groups": groups,
        "kept": len(kept),
        "rows": [list(segment) for segment in rows],
        "columns": [list(segment) for segment in columns],
        "role": role,
        "members": list(members),
        "base_level": base.name,
        BASE: dict(base.recipe),
    }
    device = next(iter(base.tensors.values())).device
    tensors = {"groups": pack_mask(mask).to(device)} | base.stored_as(BASE)
    return Level(name, recipe, shape, tensors)


def kept_groups(level: Level) -> list[int]:
    """The numbers of the groups that are kept."""
    found: list[int] = unpack_mask(level.tensors["groups"], level.recipe["groups"])[0].nonzero()[:, 0].tolist()
    return found


def kept_places(level: Level) -> tuple[list[int], list[int]]:
    """The rows and the columns that are kept, in the order of the kept part."""
    return places_of(level, kept_groups(level))


def places_of(level: Level, groups: Sequence[int]) -> tuple[list[int], list[int]]:
    """The rows and the columns of some groups."""
    rows, columns = (segments_of(level.recipe[key]) for key in ("rows", "columns"))
    return places(rows, groups, level.shape[0]), places(columns, groups, level.shape[1])


def kept_weights(level: Level) -> Tensor:
    """(out, in) bool: what is kept."""
    import torch

    device = level.tensors["groups"].device
    rows, columns = (torch.tensor(some, device=device) for some in kept_places(level))
    keep = torch.zeros(level.shape, dtype=torch.bool, device=device)
    keep[rows[:, None], columns] = True
    return keep


def kept_part(level: Level) -> Level:
    """The level of the kept part."""
    rows, columns = kept_places(level)
    return level.inside(BASE, level.recipe["base_level"], (len(rows), len(columns)))


class Sliced:
    """See the module."""

    @staticmethod
    def decode(level: Level) -> Tensor:
        import torch

        part = kept_part(level).decode()
        rows, columns = (torch.tensor(some, device=part.device) for some in kept_places(level))
        whole = torch.zeros(level.shape, device=part.device)
        whole[rows[:, None], columns] = part
        return whole

    @staticmethod
    def nominal_bits(level: Level) -> float:
        base = kept_part(level)
        return base.encoding.nominal_bits(base)

    @staticmethod
    def stored_bits(level: Level) -> int:
        return kept_part(level).stored_bits + int(level.recipe["groups"])

    @staticmethod
    def parameters(level: Level) -> int:
        return kept_part(level).parameters

    @staticmethod
    def pack(level: Level) -> None:
        return None

    @staticmethod
    def label(recipe: Mapping[str, Any]) -> str:
        return f"no kernel: {recipe['kept']} of {recipe['groups']} groups, {recipe[BASE]['encoding']}"
