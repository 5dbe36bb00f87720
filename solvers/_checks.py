"""What `Problem` refuses when it is built. Every message names the unit and the level where the mistake stands."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerwise.errors import InvalidProblem

_LOSS = "loss"


@dataclass(frozen=True)
class Names:
    """The names of units and levels, and what an index or a name refers to."""

    units: tuple[str, ...]
    levels: tuple[str, ...]
    _unit_index: dict[str, int] = field(init=False, repr=False)
    _level_index: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_unit_index", {name: index for index, name in enumerate(self.units)})
        object.__setattr__(self, "_level_index", {name: index for index, name in enumerate(self.levels)})

    def unit(self, reference: Any, where: str) -> int:
        return _resolved("unit", reference, self._unit_index, where)

    def level(self, reference: Any, where: str) -> int:
        return _resolved("level", reference, self._level_index, where)

    def place(self, reference: Any, where: str) -> tuple[int, int]:
        if not isinstance(reference, tuple) or len(reference) != 2:
            raise InvalidProblem(f"{where}: {reference!r} is not a (unit, level)")
        return self.unit(reference[0], where), self.level(reference[1], where)

    def listed(self, units: Iterable[int]) -> str:
        return ", ".join(self.units[unit] for unit in units)

    def at(self, place: tuple[int, int]) -> str:
        return f"{self.units[place[0]]} at {self.levels[place[1]]}"


def _resolved(what: str, reference: Any, index: Mapping[str, int], where: str) -> int:
    if isinstance(reference, str):
        if reference not in index:
            raise InvalidProblem(f"{where}: no {what} is named {reference}")
        return index[reference]
    if isinstance(reference, bool) or not isinstance(reference, int | np.integer):
        raise InvalidProblem(f"{where}: a {what} is an index or a name, found {reference!r}")
    if not 0 <= reference < len(index):
        raise InvalidProblem(f"{where} names {what} {reference}, but {what}s go from 0 to {len(index) - 1}")
    return int(reference)


def number(what: str, given: object, hint: str | None = None) -> float:
    """A float; infinite ones are allowed, NaN is not."""
    if isinstance(given, bool) or not isinstance(given, int | float | np.integer | np.floating):
        raise InvalidProblem(f"{what} is no number but {given!r}", hint=hint)
    try:
        value = float(given)
    except OverflowError:
        raise InvalidProblem(
            f"{what} is beyond what a float can hold, 1.8e308", hint="for no limit say math.inf"
        ) from None
    if math.isnan(value):
        raise InvalidProblem(f"{what} is NaN")
    return value


def table(what: str, given: ArrayLike) -> NDArray[np.float64]:
    """A copy of a (units, levels) table."""
    try:
        array = np.array(given, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidProblem(f"the {what} table is not a table of numbers: {error}") from error
    if array.ndim != 2 or 0 in array.shape:
        raise InvalidProblem(f"the {what} table must be (units, levels), at least one of each; found {array.shape}")
    return array


def cost_tables(costs: Any) -> dict[str, NDArray[np.float64]]:
    if not isinstance(costs, Mapping):
        raise InvalidProblem(f"costs are tables by resource, found {type(costs).__name__}", hint='costs={"bytes": ...}')
    if not costs:
        raise InvalidProblem("a problem needs the cost of at least one resource")
    if _LOSS in costs:
        raise InvalidProblem("no resource can be named loss", hint="give it as losses, or under another name")
    return {resource: table(f"{resource} cost", given) for resource, given in costs.items()}


def common_shape(tables: Mapping[str, NDArray[np.float64]]) -> tuple[int, int]:
    shapes = {name: (entries.shape[0], entries.shape[1]) for name, entries in tables.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InvalidProblem(f"all tables must have the same units and levels; found {found}")
    return next(iter(shapes.values()))


def names(what: str, given: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if given is None:
        return tuple(f"{what} {index}" for index in range(count))
    if len(given) != count:
        raise InvalidProblem(f"{len(given)} {what} names for {count} {what}s")
    seen: set[str] = set()
    for name in given:
        if name in seen:
            raise InvalidProblem(f"two {what}s are named {name}")
        seen.add(name)
    return tuple(given)


def numbers(costs: Mapping[str, NDArray[np.float64]], losses: NDArray[np.float64] | None, named: Names) -> None:
    for resource, entries in costs.items():
        _refuse(np.isnan(entries), f"{resource} cost is NaN", named)
        _refuse(entries < 0, f"{resource} cost is negative", named)
    if losses is not None:
        _refuse(np.isnan(losses), "loss is NaN", named)
        _refuse(np.isneginf(losses), "loss is -inf", named)


def _refuse(wrong: NDArray[np.bool_], what: str, named: Names) -> None:
    where = np.argwhere(wrong)
    if len(where):
        unit, level = where[0]
        rest = len(where) - 1
        more = f" (and at {rest} more place{'s' if rest > 1 else ''})" if rest else ""
        raise InvalidProblem(f"{what} for {named.at((unit, level))}{more}")


def disjoint(groups: Sequence[Sequence[Any]], named: Names) -> tuple[tuple[int, ...], ...]:
    checked = [tuple(named.unit(unit, "a group") for unit in _several(group, "a group")) for group in groups]
    checked = [group for group in checked if group]
    seen: set[int] = set()
    for unit in (unit for group in checked for unit in group):
        if unit in seen:
            raise InvalidProblem(f"{named.units[unit]} stands in more than one group")
        seen.add(unit)
    return tuple(checked)


def _several(units: Any, where: str) -> Sequence[Any]:
    """A sequence of units; a name by itself would be read as one unit per letter."""
    if isinstance(units, str) or not isinstance(units, Iterable):
        raise InvalidProblem(f"{where}: {units!r} is not a list of units", hint=f"say [{units!r}]")
    return list(units)


def nesting(
    nested: Mapping[Any, Sequence[Any]], groups: Sequence[Sequence[int]], named: Names
) -> dict[tuple[int, int], tuple[int, ...]]:
    checked = {
        named.place(place, "nested"): tuple(named.unit(unit, "nested") for unit in _several(inside, "nested"))
        for place, inside in nested.items()
    }
    places: dict[int, list[tuple[int, int]]] = {}
    for place, inside in checked.items():
        for unit in inside:
            before = places.setdefault(unit, [])
            if before and (before[0][0] != place[0] or place in before):
                raise InvalidProblem(
                    f"{named.units[unit]} is nested in {named.at(before[-1])} and in {named.at(place)}",
                    hint="a unit can be nested in several levels, but of one unit",
                )
            before.append(place)
    parents = {unit: where[0][0] for unit, where in places.items()}
    for unit in parents:
        _no_circle(unit, parents, named)
    for group in groups:
        _nested_alike(group, places, parents, groups, named)
    return {place: inside for place, inside in checked.items() if inside}


def _no_circle(unit: int, parents: Mapping[int, int], named: Names) -> None:
    path = [unit]
    while path[-1] in parents:
        path.append(parents[path[-1]])
        if path[-1] == unit:
            raise InvalidProblem(f"{' is nested in '.join(named.units[member] for member in path)}: a circle")
        if path[-1] in path[:-1]:
            return  # a circle further up, which is named when it is that one's turn


def _nested_alike(
    group: Sequence[int],
    places: Mapping[int, Sequence[tuple[int, int]]],
    parents: Mapping[int, int],
    groups: Sequence[Sequence[int]],
    named: Names,
) -> None:
    """Tied units must always be absent together: nested in the same levels of one unit, or of tied units."""
    for unit in group:
        above = unit
        while above in parents:
            above = parents[above]
            if above in group:
                raise InvalidProblem(f"{named.units[unit]} is tied to {named.units[above]}, which it is nested in")
    sets = {unit: index for index, tied in enumerate(groups) for unit in tied}
    homes = {frozenset((sets.get(unit, -1 - unit), level) for unit, level in places.get(tied, ())) for tied in group}
    if len(homes) > 1:
        raise InvalidProblem(f"the tied units {named.listed(group)} are not nested in the same place")


def pairs(interactions: Mapping[Any, float], named: Names) -> dict[tuple[tuple[int, int], tuple[int, int]], float]:
    """With the pair in the order of its units."""
    checked: dict[tuple[tuple[int, int], tuple[int, int]], float] = {}
    for pair, loss in interactions.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InvalidProblem(f"interactions: {pair!r} is not a pair of (unit, level)")
        first, second = sorted(named.place(place, "interactions") for place in pair)
        between = f"{named.at(first)} and {named.at(second)}"
        if first[0] == second[0]:
            raise InvalidProblem(f"interactions: {between} are the same unit")
        if (first, second) in checked:
            raise InvalidProblem(f"the interaction of {between} is given twice")
        value = number(f"the interaction of {between}", loss)
        if math.isinf(value):
            raise InvalidProblem(f"the interaction of {between} is {value}")
        checked[first, second] = value
    return checked


def budgets(given: Any, costs: Mapping[str, object]) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise InvalidProblem(f"budgets are numbers by resource, found {given!r}", hint='budgets={"bytes": ...}')
    checked: dict[str, float] = {}
    for resource, budget in given.items():
        if resource not in costs:
            raise InvalidProblem(f"budget for {resource}, but costs are known for {', '.join(costs)} only")
        hint = f"give it in the unit of the costs, as in budgets={{{resource!r}: 90e6}}"
        checked[resource] = number(f"the {resource} budget", budget, hint)
    return checked


def objective(minimize: str, max_loss: object, costs: Mapping[str, object], losses: object) -> float:
    """The limit on the loss, infinite where the loss is minimised."""
    if minimize not in (_LOSS, *costs):
        raise InvalidProblem(
            f"{minimize} cannot be minimised; there is loss and there are the costs {', '.join(costs)}"
        )
    limit = number("max_loss", max_loss)
    if minimize == _LOSS and math.isfinite(limit):
        raise InvalidProblem("max_loss limits nothing while the loss is minimised", hint="say minimize=<a resource>")
    if minimize != _LOSS and losses is None:
        raise InvalidProblem(f"the least {minimize} within a loss needs losses")
    return limit
