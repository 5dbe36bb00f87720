"""Units nested in one another, as arrays: who is present, and sums over trees.

Every unit is nested in at most one other, its parent, at some of the parent's levels, so the units are the nodes of a
forest. All is computed a depth at a time, not a unit at a time, because searches ask for it at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


class Forest:
    """The units of a problem by what they are nested in.

    Args:
        nested: by (unit, level), the units that are absent while `unit` is at `level`. Each has one parent, and none is
            its own ancestor.
        shape: (units, levels) of the problem.

    Attributes:
        parent: (units,), -1 for a root.
        roots: the units that are not nested.
        children: by unit that others are nested in, these, in the order of their indices.
        kept: (units, levels), the unit is present while its parent is, and at that level. True for a root.
    """

    def __init__(self, nested: Mapping[tuple[int, int], Sequence[int]], shape: tuple[int, int]) -> None:
        self.parent = np.full(shape[0], -1)
        self.kept = np.ones(shape, dtype=np.bool_)
        for (unit, level), inside in nested.items():
            self.parent[list(inside)] = unit
            self.kept[list(inside), level] = False
        self.roots = np.flatnonzero(self.parent < 0)
        self.children: dict[int, list[int]] = {}
        for unit in np.flatnonzero(self.parent >= 0).tolist():
            self.children.setdefault(int(self.parent[unit]), []).append(unit)
        self._child, self._at = np.nonzero(self.kept & (self.parent >= 0)[:, None])  # all places that leave one present
        self._above = self.parent[self._child]
        self._depths: list[NDArray[np.int64]] = []  # from the children of roots downwards
        depth = self._below(self.roots.tolist())
        while len(depth):
            self._depths.append(depth)
            depth = self._below(depth.tolist())

    def _below(self, units: list[int]) -> NDArray[np.int64]:
        return np.array([child for unit in units for child in self.children.get(unit, ())], dtype=np.int64)

    @property
    def most_terms(self) -> int:
        """No entry of `subtotals` is the sum of more terms in a row than this."""
        return 1 + len(self._depths) * max(map(len, self.children.values()), default=0)

    def ancestors(self, unit: int) -> Iterator[int]:
        """What a unit is nested in, its parent first."""
        while (unit := int(self.parent[unit])) >= 0:
            yield unit

    def descendants(self, unit: int) -> list[int]:
        """The units nested in a unit at any depth, each after its parent."""
        return [below for child in self.children.get(unit, ()) for below in (child, *self.descendants(child))]

    def bottom_up(self) -> list[int]:
        """The units that others are nested in, each after those nested in it."""
        return [unit for unit in self.top_down()[::-1] if unit in self.children]

    def top_down(self) -> list[int]:
        """All units, each after its parent."""
        return [unit for units in (self.roots, *self._depths) for unit in units.tolist()]

    def present(self, choices: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(..., units), of one allocation or of many: no ancestor is at a level that removes the unit."""
        present = np.ones(choices.shape, dtype=np.bool_)
        for units in self._depths:
            parents = self.parent[units]
            present[..., units] = present[..., parents] & self.kept[units, choices[..., parents]]
        return present

    def subtotals(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """(units, levels): each entry with the least that the units nested below can add to it."""
        if not self._depths:
            return table
        total = table.copy()
        for units in reversed(self._depths):
            least = total[units].min(axis=1)
            np.add.at(total, self.parent[units], np.where(self.kept[units], least[:, None], 0.0))
        return total

    def carried(self, choice: NDArray[np.int64], entries: NDArray[np.float64]) -> NDArray[np.float64]:
        """(units, ...): the entry of each unit and of those below that are present whenever it is.

        Args:
            choice: (units,).
            entries: (units, ...), those of the levels chosen.
        """
        sums = entries.copy()
        for units in reversed(self._depths):
            here = units[self.kept[units, choice[self.parent[units]]]]
            np.add.at(sums, self.parent[here], sums[here])
        return sums

    def inside(self, choice: NDArray[np.int64], entries: NDArray[np.float64]) -> NDArray[np.float64]:
        """(units, levels, ...): what `carried` would add to each unit at each of its levels, all others staying."""
        sums = np.zeros((*self.kept.shape, *entries.shape[1:]))
        carried = self.carried(choice, entries)
        np.add.at(sums, (self._above, self._at), carried[self._child])
        return sums
