"""`compressed_tensors`: a folder that transformers, vLLM and SGLang load, quantized layers packed.

Each linear layer with a symmetric grid becomes, in the place of `<m>.weight`, [out, in],

    <m>.weight_packed   int32 [out, ceil(in · bits / 32)]   our own words: the layout is the same
    <m>.weight_scale    float16 [out, in / group]   [out, 1] if a row is one group
    <m>.weight_shape    int64 [2]
    <m>.weight_zero_point   int32 [ceil(out · bits / 32), groups]   if asymmetric: packed along rows

and `config.json` lists layers of equal arguments under their exact names as one group, because several groups for the
class `Linear` overlap, and readers differ in which of them wins. Every other linear layer is in `ignore`. Pruned
weights stand dense with their zeros, without a `sparsity_config`, for which no reader is left; pruned and quantized
ones are packed with the code of zero. Scales stay float16 whatever the model's dtype, as levels have
them; a reader that computes in bfloat16 rounds them to it.

4 and 8 bits load everywhere. Other widths take the word layout of 0.18 and later, and readers without a kernel for them
refuse to load, so they need `any_bits`. Asymmetric layers are not reloaded by transformers 5.23, so they need
`asymmetric`. Left out: activation quantization, float formats, experts in stacked parameters.

Source: compressed-tensors 0.20, `quantization/quant_config.py` and `compressors/pack_quantized`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import ModelSource
from layerwise.stages.export import copy_beside
from layerwise.stages.export.shards import SHARD_BYTES, Part, write_shards
from layerwise.stages.levels.masked_grid import whole_grid
from layerwise.stages.models.checkpoint import Checkpoint
from layerwise.stages.models.compressed import CompressedModel, CompressedUnit
from layerwise.stages.models.network import BEGIN, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level

VERSION = "0.20.0"
"""Of compressed-tensors: the layout that is written, and recorded in the folder."""

SAFE_BITS = (4, 8)
"""Widths that every reader has a kernel for."""

PACKED = ("grid", "masked_grid")
"""Encodings that are written packed; `dense` and `mask` are written dense, and others not at all."""


def compressed_tensors(
    source: ModelSource,
    out: Path,
    *,
    any_bits: bool = False,
    asymmetric: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the folder.

    Raises:
        UnsupportedModel: it cannot hold a level, a part is dropped, or layers that engines fuse differ; nothing is
            written then.
    """
    checkpoint = Checkpoint(source.path, source.trust)
    model = None if source.compressed is None else CompressedModel(source.compressed)
    entries = () if model is None else model.document.units
    recipes = {} if model is None else {entry.unit.name: model.level(entry.unit.name).recipe for entry in entries}
    _check_held(entries, recipes, any_bits=any_bits, asymmetric=asymmetric)
    schemes = {
        entry.unit.name: _scheme(entry.unit, recipes[entry.unit.name])
        for entry in entries
        if recipes[entry.unit.name]["encoding"] in PACKED
    }
    _check_fused((entry.unit for entry in entries), schemes)
    parts = []
    replaced: dict[str, str] = {}
    written: defaultdict[str, list[CompressedUnit]] = defaultdict(list)
    for entry in entries:
        assert entry.stored is not None and model is not None
        if entry.unit.name in schemes:
            module = entry.stored.parts[0].tensor.removesuffix(".weight")
            read = partial(_packed, model, entry.unit.name, module)
            parts.append(Part(f"{module}.weight", size_bytes(entry.unit, recipes[entry.unit.name], 0), read))
            replaced |= dict.fromkeys((view.tensor for view in entry.stored.places), entry.unit.name)
        else:
            for view in entry.stored.places:
                written[view.tensor].append(entry)
    for name in checkpoint.headers:
        if name not in replaced:
            read_dense = partial(_dense, name, checkpoint, model, tuple(written[name]))
            parts.append(Part(name, checkpoint.tensor_bytes(name), read_dense))
    copy_beside(checkpoint, out)
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    if schemes:
        config["quantization_config"] = quantization_config(schemes, linear_layers(source))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_shards(parts, out, shard_bytes=shard_bytes)


# --- what it can hold, and at what size -------------------------------------------------------------------------------


def why_not(unit: Unit, recipe: Mapping[str, Any], *, any_bits: bool = False, asymmetric: bool = False) -> str | None:
    """Why this format cannot hold a level; None if it can."""
    encoding, view = recipe["encoding"], unit.view
    if encoding in ("dense", "mask", "keep"):
        return None
    if encoding not in PACKED:
        return f"it has no place for encoding {encoding}"
    stands_alone = view is not None and view.whole and not view.transposed
    reasons = (
        (
            unit.role not in ("linear", "head") or not stands_alone,
            f"it packs linear layers that stand by themselves, [out, in], and this {unit.role} is none",
        ),
        (BEGIN in unit.positions, "the head shares its weight with the embedding, which is not packed"),
        (recipe.get("group_along") == "outputs", "its groups run along inputs only"),
        (recipe.get("scaled_inputs") is True, "it has no place for scaled inputs"),
        (
            recipe.get("desc_act") is True and recipe["group_size"] != -1,
            "it has no place for columns that are grouped in another order",
        ),
        (
            not recipe["sym"] and not asymmetric,
            "transformers does not reload asymmetric layers; `asymmetric: true` forces it",
        ),
        (
            recipe["bits"] not in SAFE_BITS and not any_bits,
            f"only 4 and 8 bits load everywhere, not {recipe['bits']}; `any_bits: true` allows them",
        ),
    )
    return next((why for holds, why in reasons if holds), None)


def size_bytes(unit: Unit, recipe: Mapping[str, Any], dense_bytes: int) -> int:
    """Bytes of the tensors that a level becomes.

    Args:
        unit: whose level.
        recipe: the level's; one that can be held.
        dense_bytes: of the unit in the checkpoint.
    """
    if recipe["encoding"] not in PACKED:
        return dense_bytes
    rows, columns = unit.shape
    bits: int = recipe["bits"]
    groups = columns // group_size(recipe, columns)
    zeros = 0 if recipe["sym"] else -(-rows * bits // 32) * groups * 4
    return rows * -(-columns * bits // 32) * 4 + rows * groups * 2 + 16 + zeros


def group_size(recipe: Mapping[str, Any], columns: int) -> int:
    """Columns of a group in the file; the whole row if it is one group.

    Readers refuse a last group that is shorter. Groups are cut up until all are equal, and each piece gets the scale
    of its group: 40 columns in groups of 16 become groups of 8.
    """
    size: int = recipe["group_size"]
    return columns if size == -1 or size >= columns else gcd(size, columns)


def _check_held(entries: Iterable[CompressedUnit], recipes: Mapping[str, Mapping[str, Any]], **options: bool) -> None:
    refused = [
        (entry.unit.name, entry.level, why)
        for entry in entries
        if (why := why_not(entry.unit, recipes[entry.unit.name], **options)) is not None
    ]
    if refused:
        unit, level, why = refused[0]
        raise UnsupportedModel(
            f"compressed-tensors cannot hold {len(refused)} of the levels, the first is {level} of {unit}: {why}",
            hint="say `format: compressed_tensors` in `allocate`, too: then such levels are not offered",
        )


def _check_fused(units: Iterable[Unit], schemes: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse layers that an engine joins into one (`3.self_attn.q_proj+k_proj+v_proj`) with unequal arguments."""
    groups: defaultdict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        if unit.group is not None:
            groups[unit.group].append(unit)
    for group, members in groups.items():
        packed = [unit.name for unit in members if unit.name in schemes]
        different = [name for name in packed if schemes[name] != schemes[packed[0]]]
        if different:
            one, other = (_in_words(schemes[name]) for name in (packed[0], different[0]))
            what = f"{packed[0]} has {one}, {different[0]} {other}"
        elif packed and len(packed) < group.count("+") + 1:
            what = f"{packed[0]} has {_in_words(schemes[packed[0]])}, and others of them are dense"
        else:
            continue
        raise UnsupportedModel(
            f"serving engines join block {group.replace('.', ', ', 1)} into one layer, but {what}",
            hint="say `tie: fused` in `allocate`",
        )


def _in_words(scheme: Mapping[str, Any]) -> str:
    group = scheme["group_size"] or "row"
    return f"{scheme['num_bits']} bits in groups of {group}{'' if scheme['symmetric'] else ', asymmetric'}"


# --- configuration ----------------------------------------------------------------------------------------------------


def _scheme(unit: Unit, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The `weights` of a group: what the format calls quantization arguments."""
    size = group_size(recipe, unit.shape[1])
    channel = size == unit.shape[1]
    return {
        "num_bits": recipe["bits"],
        "type": "int",
        "symmetric": recipe["sym"],
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else size,
        "dynamic": False,
    }


def quantization_config(schemes: Mapping[str, Mapping[str, Any]], linears: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of a `config.json`.

    Args:
        schemes: by module, its quantization arguments.
        linears: every linear layer of the model.
    """
    targets: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        targets.setdefault(json.dumps(scheme), []).append(name)
    nothing = {"input_activations": None, "output_activations": None}
    groups = {
        f"group_{number}": {"targets": names, "weights": json.loads(scheme), "format": "pack-quantized", **nothing}
        for number, (scheme, names) in enumerate(targets.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "pack-quantized",
        "version": VERSION,
        "ignore": [name for name in linears if name not in schemes],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": groups,
    }


def linear_layers(source: ModelSource) -> list[str]:
    """Names of a model's linear layers; its weights are not read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from layerwise.stages.models.trust import loading

    with loading(source.path, source.trust) as options, torch.device("meta"):
        config = AutoConfig.from_pretrained(source.path, **options)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust)
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


# --- tensors ----------------------------------------------------------------------------------------------------------


def _packed(model: CompressedModel, unit: str, module: str) -> dict[str, Tensor]:
    return {f"{module}.{name}": tensor for name, tensor in packed_tensors(model.level(unit)).items()}


def packed_tensors(level: Level) -> dict[str, Tensor]:
    """A `grid` or `masked_grid` level as the format stores it, by the ends of the names."""
    import torch

    from layerwise.kernels.packing import pack

    bits = level.recipe["bits"]
    codes, scale, zero = whole_grid(level)
    columns = level.shape[1]
    size = group_size(level.recipe, columns)
    if columns % max(1, level.recipe["group_size"]) and size < columns:
        group = torch.arange(0, columns, size) // level.recipe["group_size"]
        scale, zero = scale[:, group], None if zero is None else zero[:, group]
    tensors = {
        "weight_packed": level.tensors["codes"] if level.recipe["encoding"] == "grid" else pack(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(level.shape, dtype=torch.int64),
    }
    if zero is not None:
        tensors["weight_zero_point"] = pack(zero.T, bits).T
    return tensors


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
