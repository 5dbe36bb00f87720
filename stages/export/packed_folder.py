"""What the formats with packed linear layers share: what may be packed, what engines fuse, and the folder itself.

A packed layer stands as a few tensors in the place of its `weight`; everything else is written as in the checkpoint,
with levels that are no grid decoded. A format says how a grid becomes tensors and what `config.json` says of it, and
which levels it cannot hold; nothing is written if there is one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import ModelSource
from layerwise.stages.export import copy_beside
from layerwise.stages.export.held import PACKED, Held, Recipe
from layerwise.stages.export.shards import Layout, Part, write_shards
from layerwise.stages.levels.masked_grid import whole_grid
from layerwise.stages.models.checkpoint import Checkpoint
from layerwise.stages.models.compressed import CompressedModel, CompressedUnit
from layerwise.stages.models.network import BEGIN, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level
    from layerwise.stages.models.stored import Stored


@dataclass(frozen=True)
class Scheme:
    """How the layer of a unit is packed; what an engine fuses has one.

    Args:
        bits: of a code.
        group_size: columns that share a scale, -1 for the whole row.
        sym: without zero points.
        desc_act: columns are grouped in another order than theirs.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool = False

    def __str__(self) -> str:
        group = "row" if self.group_size == -1 else self.group_size
        more = f"{'' if self.sym else ', asymmetric'}{', in another order' if self.desc_act else ''}"
        return f"{self.bits} bits in groups of {group}{more}"


@dataclass(frozen=True)
class PackedFormat(Held):
    """A format that is written here.

    Args:
        tensors: of a packed level, as `layout` has them.
        configure: `quantization_config`, from the scheme of every packed module and the model.
    """

    tensors: Callable[[Level], Mapping[str, Tensor]]
    configure: Callable[[Mapping[str, Scheme], ModelSource], dict[str, Any]]


def write_packed(source: ModelSource, out: Path, form: PackedFormat, *, shard_bytes: int) -> dict[str, Any]:
    """Write a folder.

    Returns:
        `quantization_config`; empty if nothing is packed.
    Raises:
        UnsupportedModel: the format cannot hold a level, a part is dropped, or layers that engines fuse differ;
            nothing is written then.
    """
    checkpoint = Checkpoint(source.path, source.trust)
    model = None if source.compressed is None else CompressedModel(source.compressed)
    entries = () if model is None else model.document.units
    recipes = {} if model is None else {entry.unit.name: model.level(entry.unit.name).recipe for entry in entries}
    _check_held(entries, recipes, form)
    schemes = {
        entry.unit.name: scheme_of(entry.unit, recipes[entry.unit.name])
        for entry in entries
        if recipes[entry.unit.name]["encoding"] in PACKED
    }
    _check_fused((entry.unit for entry in entries), schemes)
    parts = []
    replaced: set[str] = set()
    modules: dict[str, Scheme] = {}
    written: defaultdict[str, list[CompressedUnit]] = defaultdict(list)
    for entry in entries:
        assert entry.stored is not None and model is not None
        if entry.unit.name in schemes:
            module = module_of(entry.stored)
            modules[module] = schemes[entry.unit.name]
            read = partial(_packed, model, entry.unit.name, module, form)
            assert form.layout is not None
            layout = named_layout(module, form.layout(entry.unit, recipes[entry.unit.name]))
            parts.append(Part(f"{module}.weight", layout, read))
            replaced |= {view.tensor for view in entry.stored.places}
        else:
            for view in entry.stored.places:
                written[view.tensor].append(entry)
    for name in checkpoint.headers:
        if name not in replaced:
            read_dense = partial(_dense, name, checkpoint, model, tuple(written[name]))
            parts.append(Part(name, {name: checkpoint.headers[name][1:]}, read_dense))
    copy_beside(checkpoint, out)
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    quantization = form.configure(modules, source) if modules else {}
    if modules:
        config["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_shards(parts, out, shard_bytes=shard_bytes)
    return quantization


# --- what can be packed -----------------------------------------------------------------------------------------------


def why_not_packed(unit: Unit, recipe: Recipe) -> str | None:
    """Why none of the formats can hold a level; None if that is left to each."""
    encoding, view = recipe["encoding"], unit.view
    if encoding not in PACKED:
        held = encoding in ("dense", "mask", "keep")
        return None if held else f"it has no place for encoding {encoding}"
    stands_alone = view is not None and view.whole and not view.transposed
    reasons = (
        (
            unit.role not in ("linear", "head") or not stands_alone,
            f"it packs linear layers that stand by themselves, [out, in], and this {unit.role} is none",
        ),
        (BEGIN in unit.positions, "the head shares its weight with the embedding, which is not packed"),
        (recipe.get("group_along") == "outputs", "its groups run along inputs only"),
        (recipe.get("scaled_inputs") is True, "it has no place for scaled inputs"),
    )
    return first_that_holds(reasons)


def first_that_holds(reasons: Iterable[tuple[bool, str]]) -> str | None:
    """The first reason whose condition is true."""
    return next((why for holds, why in reasons if holds), None)


def reordered(recipe: Recipe) -> bool:
    """Whether columns are grouped in another order than theirs."""
    return recipe.get("desc_act") is True and recipe["group_size"] != -1


def group_size(recipe: Recipe, columns: int) -> int:
    """Columns of a group in the file; the whole row if it is one group.

    Readers refuse a last group that is shorter. Groups are cut up until all are equal, and each piece gets the scale
    of its group: 40 columns in groups of 16 become groups of 8.
    """
    size: int = recipe["group_size"]
    return columns if size == -1 or size >= columns else gcd(size, columns)


def scheme_of(unit: Unit, recipe: Recipe) -> Scheme:
    """How a level that can be held is packed."""
    size = group_size(recipe, unit.shape[1])
    return Scheme(recipe["bits"], -1 if size == unit.shape[1] else size, recipe["sym"], reordered(recipe))


def equal_groups(level: Level) -> tuple[Tensor, Tensor, Tensor | None]:
    """The grid of a level as files have it, in groups of `group_size`.

    Returns:
        codes (out, in) uint8, scale (out, groups) float16, zero (out, groups) uint8 or None if symmetric.
    """
    import torch

    codes, scale, zero = whole_grid(level)
    columns = level.shape[1]
    size = group_size(level.recipe, columns)
    if columns % max(1, level.recipe["group_size"]) and size < columns:
        group = torch.arange(0, columns, size) // level.recipe["group_size"]
        scale, zero = scale[:, group], None if zero is None else zero[:, group]
    return codes, scale, zero


def _check_held(entries: Iterable[CompressedUnit], recipes: Mapping[str, Recipe], form: PackedFormat) -> None:
    refused = [
        (entry.unit.name, entry.level, why)
        for entry in entries
        if (why := form.why_not(entry.unit, recipes[entry.unit.name])) is not None
    ]
    if refused:
        unit, level, why = refused[0]
        raise UnsupportedModel(
            f"{form.name} cannot hold {len(refused)} of the levels, the first is {level} of {unit}: {why}",
            hint=f"say `format: {form.name.replace('-', '_')}` in `allocate`, too: then such levels are not offered",
        )


def _check_fused(units: Iterable[Unit], schemes: Mapping[str, Scheme]) -> None:
    """Refuse layers that an engine joins into one (`3.self_attn.q_proj+k_proj+v_proj`) with unequal arguments."""
    groups: defaultdict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        if unit.group is not None:
            groups[unit.group].append(unit)
    for group, members in groups.items():
        packed = [unit.name for unit in members if unit.name in schemes]
        different = [name for name in packed if schemes[name] != schemes[packed[0]]]
        if different:
            what = f"{packed[0]} has {schemes[packed[0]]}, {different[0]} {schemes[different[0]]}"
        elif packed and len(packed) < group.count("+") + 1:
            what = f"{packed[0]} has {schemes[packed[0]]}, and others of them are dense"
        else:
            continue
        raise UnsupportedModel(
            f"serving engines join block {group.replace('.', ', ', 1)} into one layer, but {what}",
            hint="say `tie: fused` in `allocate`",
        )


# --- tensors ----------------------------------------------------------------------------------------------------------


def module_of(stored: Stored) -> str:
    """The module that a packed weight belongs to, as the checkpoint calls it."""
    return stored.parts[0].tensor.removesuffix(".weight")


def named_layout(module: str, layout: Layout) -> Layout:
    """A layout by whole names."""
    return {f"{module}.{name}": entry for name, entry in layout.items()}


def _packed(model: CompressedModel, unit: str, module: str, form: PackedFormat) -> dict[str, Tensor]:
    return {f"{module}.{name}": tensor for name, tensor in form.tensors(model.level(unit)).items()}


def _dense(
    name: str, checkpoint: Checkpoint, model: CompressedModel | None, entries: Sequence[CompressedUnit]
) -> dict[str, Tensor]:
    """A tensor of the checkpoint, with what levels stand in it decoded."""
    tensor = checkpoint.read(name)
    for entry in entries:
        assert model is not None and entry.stored is not None
        for view, piece in entry.stored.pieces(model.level(entry.unit.name).decode(), checkpoint):
            if view.tensor == name:
                view.write(tensor, piece)
    return {name: tensor}
