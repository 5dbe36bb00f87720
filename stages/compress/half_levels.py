"""Lets the methods of scope `half` make their levels, before those of single units: of a half-block and of the units
inside, one task for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from layerwise.errors import NotFinite, UnsupportedModel
from layerwise.results.durable import settle_file
from layerwise.stages.compress import MenuEntry, find_compressor
from layerwise.stages.compress.chosen import Chosen
from layerwise.stages.compress.params import CompressParams
from layerwise.stages.compress.unit_levels import task_of, too_few
from layerwise.stages.compress.width import Params as Width
from layerwise.stages.contract import Context, ModelSource
from layerwise.stages.models.channels import Channels
from layerwise.stages.models.network import Unit
from layerwise.stages.models.selection import is_large


def compress_halves(context: Context, params: CompressParams, chosen: Chosen) -> Path | None:
    """Let the methods of scope `half` make their levels; gives the folder where they stand.

    Raises:
        UnsupportedModel: an entry of the menu has no half-block that it can work on; says why.
        UsageError: a width that a half-block cannot have.
    """
    from layerwise.stages.models.find_channels import find_channels

    entries = _entries(params)
    if not entries:
        return None
    folder = context.items / "halves"
    (found,) = context.executor.map(find_channels, [chosen.source], keys=["channels"], note="heads and channels")
    halves = {parent.name: parent for parent in chosen.parents}
    items: list[dict[str, Any]] = []
    for number, entry in entries:
        known, refused = _known(number, entry, {name: found[name] for name in halves if name in found})
        for name, channels in known.items():
            why = _why_not_here(chosen, params, channels)
            if why is not None:
                refused[name] = why
        _check_any(number, entry, {name: halves[name].role for name in {**known, **refused}}, refused)
        for name, why in refused.items():
            _write_failure(folder / str(number), name, why)
        for name, channels in known.items():
            if name in refused:
                continue
            units = [chosen.item(unit) for unit, _ in chosen.units if unit.name in channels.units]
            half = halves[name].as_json()
            items.append({"number": number, "half": half, "channels": channels.as_json(), "units": units})
    work = partial(_compress_half, source=chosen.source, statistics=chosen.statistics, params=params, folder=folder)
    keys = [f"half-{half}-{number}" for half, number in ((item["half"]["name"], item["number"]) for item in items)]
    context.executor.map(work, items, keys=keys, note="half-blocks")
    return folder


def noted_halves(params: CompressParams, model: ModelSource) -> Iterator[str]:
    """What stays as wide as it is, told before the run.

    Raises:
        UnsupportedModel, UsageError: as of `compress_halves`, so far as that is known before.
    """
    entries = _entries(params)
    if not entries or is_large(model):
        return
    for number, entry in entries:
        known, refused = _known(number, entry, _found(model))
        if refused:
            name, why = next(iter(refused.items()))
            yield f"{len(refused)} of {len(known) + len(refused)} half-blocks stay as wide as they are: {name}: {why}"
        if isinstance(entry, Width):
            yield from dict.fromkeys(text for channels in known.values() for text in entry.rounded(channels))


@cache
def _found(model: ModelSource) -> dict[str, Any]:
    from layerwise.stages.models.find_channels import find_channels

    return find_channels(model)


def _entries(params: CompressParams) -> list[tuple[int, MenuEntry]]:
    return [(number, entry) for number, entry in enumerate(params.menu) if entry.scope == "half"]


def _known(number: int, entry: MenuEntry, found: Mapping[str, Any]) -> tuple[dict[str, Channels], dict[str, str]]:
    """The half-blocks that an entry of the menu can work on, and of the others why not.

    Raises:
        UnsupportedModel: there are none of a role that it names; says why.
        UsageError: a width that one of them cannot have.
    """
    mine = {name: one for name, one in found.items() if one["role"] in entry.parents()}
    refused = {name: str(one["refused"]) for name, one in mine.items() if "refused" in one}
    _check_any(number, entry, {name: one["role"] for name, one in mine.items()}, refused)
    known = {name: Channels.from_json(one) for name, one in mine.items() if name not in refused}
    if isinstance(entry, Width):
        for channels in known.values():
            entry.groups_kept(channels)
    return known, refused


def _check_any(number: int, entry: MenuEntry, roles: Mapping[str, str], refused: Mapping[str, str]) -> None:
    """Refuse an entry of the menu of which nothing comes for one of the roles that it names."""
    for role in entry.parents():
        names = [name for name, of in roles.items() if of == role]
        if names and all(name in refused for name in names):
            raise UnsupportedModel(
                f"menu.{number}: {entry.method} cannot narrow {names[0]}: {refused[names[0]]}",
                hint=f"leave {role} out of its `units`",
            )


def _why_not_here(chosen: Chosen, params: CompressParams, channels: Channels) -> str | None:
    """Why a half-block gets no levels in this run; None if it does."""
    items = {unit.name: chosen.item(unit) for unit, _ in chosen.units if unit.name in channels.units}
    missing = [name for name in channels.units if name not in items]
    if missing:
        return f"{missing[0]} is not compressed here: add it to `targets`"
    reached = items[channels.out]["tokens"]
    if too_few(reached, params.least_tokens):
        return f"only {reached} calibration tokens reached {channels.out}"
    return None


def _compress_half(
    item: dict[str, Any], *, source: ModelSource, statistics: Path | None, params: CompressParams, folder: Path
) -> None:
    """Write the levels of one menu entry of a half-block and the units inside."""
    from layerwise.stages.calibrate.statistics import Statistics
    from layerwise.stages.levels.files import write_unit
    from layerwise.stages.levels.parent import parent_level
    from layerwise.stages.models.compressed import Weights
    from layerwise.stages.models.stored import Stored

    half, channels = Unit.from_json(item["half"]), Channels.from_json(item["channels"])
    entry = params.menu[item["number"]]
    weights = Weights(source)
    units = {half.name: (half, parent_level("keep"))}
    for one in item["units"]:
        unit = Unit.from_json(one["unit"])
        units[unit.name] = unit, weights.level(unit.name, Stored.from_json(one["stored"]))
    known = None if statistics is None else Statistics(statistics)
    target = folder / str(item["number"])
    try:
        made = find_compressor(entry.method).run(task_of(units, known, source.device, channels=channels), entry)
    except NotFinite as error:
        _write_failure(target, half.name, error.message)
        return
    for name, levels in made.items():
        write_unit(target, name, [level.to("cpu") for level in levels])


def _write_failure(folder: Path, half: str, why: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{half}.partial"
    unfinished.write_text(why, encoding="utf-8")
    settle_file(unfinished, folder / f"{half}.failed")
