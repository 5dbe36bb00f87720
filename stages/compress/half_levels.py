"""Lets the methods of scope `half` make their levels, before those of single units: of a half-block and of the units
inside, one task for each."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from layerwise.errors import NotFinite, UnsupportedModel
from layerwise.results.durable import settle_file
from layerwise.stages.compress import find_compressor
from layerwise.stages.compress.chosen import Chosen
from layerwise.stages.compress.params import CompressParams
from layerwise.stages.compress.unit_levels import task_of, too_few
from layerwise.stages.compress.width import Params as Width
from layerwise.stages.contract import Context, ModelSource
from layerwise.stages.models.channels import Channels
from layerwise.stages.models.network import Unit


def compress_halves(context: Context, params: CompressParams, chosen: Chosen) -> Path | None:
    """Let the methods of scope `half` make their levels; gives the folder where they stand.

    Raises:
        UnsupportedModel: an entry of the menu has no half-block that it can work on; says why.
        UsageError: a width that a half-block cannot have.
    """
    from layerwise.stages.models.find_channels import find_channels

    entries = [(number, entry) for number, entry in enumerate(params.menu) if entry.scope == "half"]
    if not entries:
        return None
    folder = context.items / "halves"
    (found,) = context.executor.map(find_channels, [chosen.source], keys=["channels"], note="heads and channels")
    items: list[dict[str, Any]] = []
    for number, entry in entries:
        halves = [parent for parent in chosen.parents if parent.role in entry.parents()]
        known = {half.name: _usable(chosen, params, found[half.name]) for half in halves}
        refused = {name: why for name, why in known.items() if isinstance(why, str)}
        for role in entry.parents():
            names = [half.name for half in halves if half.role == role]
            if all(name in refused for name in names):
                raise UnsupportedModel(
                    f"menu.{number}: {entry.method} cannot narrow {names[0]}: {refused[names[0]]}",
                    hint=f"leave {role} out of its `units`",
                )
        for name, channels in known.items():
            if isinstance(channels, str):
                _write_failure(folder / str(number), name, channels)
                continue
            if isinstance(entry, Width):
                entry.groups_kept(channels)  # mistakes are told before anything is made
            units = [chosen.item(unit) for unit, _ in chosen.units if unit.name in channels.units]
            half = next(half for half in halves if half.name == name)
            items.append({"number": number, "half": half.as_json(), "channels": channels.as_json(), "units": units})
    work = partial(_compress_half, source=chosen.source, statistics=chosen.statistics, params=params, folder=folder)
    keys = [f"half-{half}-{number}" for half, number in ((item["half"]["name"], item["number"]) for item in items)]
    context.executor.map(work, items, keys=keys, note="half-blocks")
    return folder


def _usable(chosen: Chosen, params: CompressParams, found: Any) -> Channels | str:
    """What can go from a half-block, or why it gets no levels."""
    if isinstance(found, str):
        return found
    channels = Channels.from_json(found)
    items = {unit.name: chosen.item(unit) for unit, _ in chosen.units if unit.name in channels.units}
    missing = [name for name in channels.units if name not in items]
    if missing:
        return f"{missing[0]} is not compressed here: add it to `targets`"
    reached = items[channels.out]["tokens"]
    if too_few(reached, params.least_tokens):
        return f"only {reached} calibration tokens reached {channels.out}"
    return channels


def _compress_half(
    item: dict[str, Any], *, source: ModelSource, statistics: Path | None, params: CompressParams, folder: Path
) -> None:
    """Write the levels of one menu entry of a half-block and the units inside."""
    from layerwise.stages.calibrate.statistics import Statistics
    from layerwise.stages.levels.files import write_unit
    from layerwise.stages.levels.parent import parent_level
    from layerwise.stages.models.compressed import Weights
    from layerwise.stages.models.stored import Stored

    half, channels, entry = (
        Unit.from_json(item["half"]),
        Channels.from_json(item["channels"]),
        params.menu[item["number"]],
    )
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
