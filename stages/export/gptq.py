"""`gptq` and `gptq_v2`: a folder that GPTQModel and vLLM load, quantized layers packed.

Each linear layer with a grid becomes, in the place of `<m>.weight`, [out, in],

    <m>.qweight   int32 [in · bits / 32, out]       each column one stream of bits, along inputs
    <m>.qzeros    int32 [groups, out · bits / 32]   each row one stream, along outputs; `gptq` stores zero - 1
    <m>.scales    float16 [groups, out]
    <m>.g_idx     int32 [in]                        the group of each input

Symmetric layers have the zero point 2^(bits-1). The stream of `gptq` has no code for the zero point 0: readers add 1 to
whole words, and a carry would spill into the neighbour. So asymmetric layers take `gptq_v2`.

`config.json` and `quantize_config.json` say the most frequent arguments; layers with others are overridden in
`dynamic`, by regular expressions of their exact names, and layers left dense are excluded there. An engine that fuses
q/k/v or gate/up looks the fused name up, so that stands in the expression, too. transformers reads such folders by
GPTQModel. Left out: 5 to 7 bits, for which readers have a layout of their own, and experts in stacked parameters.

Source: GPTQModel 7.7, `quantization/config.py` and `nn_modules/qlinear/torch.py`; 3 bits as in the GPTQ reference.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.stages.contract import ModelSource
from layerwise.stages.export.held import PACKED
from layerwise.stages.export.packed_folder import (
    PackedFormat,
    Scheme,
    equal_groups,
    first_that_holds,
    group_size,
    reordered,
    why_not_packed,
    write_packed,
)
from layerwise.stages.export.shards import SHARD_BYTES, Layout
from layerwise.stages.models.checkpoint import Checkpoint
from layerwise.stages.models.network import Unit
from layerwise.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level

BITS = (2, 3, 4, 8)
"""Widths whose layout all readers share."""

GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
"""Group sizes that readers take, beside the whole row."""

FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}
"""Layers that engines join, and the name of what they become."""


def gptq(source: ModelSource, out: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the folder, `checkpoint_format: gptq`.

    Raises:
        UnsupportedModel: it cannot hold a level, a part is dropped, or layers that engines fuse differ; nothing is
            written then.
    """
    _write(source, out, version=1, shard_bytes=shard_bytes)


def gptq_v2(source: ModelSource, out: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the folder, `checkpoint_format: gptq_v2`; errors as of `gptq`."""
    _write(source, out, version=2, shard_bytes=shard_bytes)


def _write(source: ModelSource, out: Path, *, version: int, shard_bytes: int) -> None:
    config = write_packed(source, out, _held(version), shard_bytes=shard_bytes)
    if config:
        (out / "quantize_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def held() -> PackedFormat:
    """`gptq`."""
    return _held(1)


def held_v2() -> PackedFormat:
    """`gptq_v2`."""
    return _held(2)


def _held(version: int) -> PackedFormat:
    return PackedFormat(
        "gptq" if version == 1 else "gptq_v2",
        partial(why_not, version=version),
        layout,
        partial(packed_tensors, version=version),
        partial(_configure, version=version),
    )


# --- what it can hold, and at what size -------------------------------------------------------------------------------


def why_not(unit: Unit, recipe: Mapping[str, Any], *, version: int = 1) -> str | None:
    """Why this format cannot hold a level; None if it can."""
    why = why_not_packed(unit, recipe)
    if why is not None or recipe["encoding"] not in PACKED:
        return why
    (rows, columns), bits = unit.shape, recipe["bits"]
    size = group_size(recipe, columns)
    reasons = (
        (bits not in BITS, f"readers agree on a layout for 2, 3, 4 and 8 bits, not for {bits}"),
        (
            rows * bits % 32 != 0 or columns * bits % 32 != 0,
            f"its codes fill whole words of 32 bits along both sides, and {rows} × {columns} of {bits} bits do not",
        ),
        (
            size != columns and size not in GROUP_SIZES,
            f"readers take groups of {', '.join(map(str, GROUP_SIZES))} or a whole row, not of {size}",
        ),
        (
            reordered(recipe) and columns % recipe["group_size"] != 0,
            f"columns in another order need whole groups, and {recipe['group_size']} does not divide {columns}",
        ),
        (
            not recipe["sym"] and version == 1,
            "it stores zero points less 1, so that a zero point of 0 has no code; `format: gptq_v2` holds them",
        ),
    )
    return first_that_holds(reasons)


def layout(unit: Unit, recipe: Mapping[str, Any]) -> Layout:
    """The tensors that a packed level becomes, by the ends of their names."""
    rows, columns = unit.shape
    bits: int = recipe["bits"]
    groups = columns // group_size(recipe, columns)
    return {
        "qweight": ("I32", (columns * bits // 32, rows)),
        "qzeros": ("I32", (groups, rows * bits // 32)),
        "scales": ("F16", (groups, rows)),
        "g_idx": ("I32", (columns,)),
    }


# --- configuration ----------------------------------------------------------------------------------------------------


def _configure(schemes: Mapping[str, Scheme], source: ModelSource, *, version: int) -> dict[str, Any]:
    headers = Checkpoint(source.path, source.trust).headers
    matrices = [name.removesuffix(".weight") for name, header in headers.items() if len(header[2]) == 2]
    return quantization_config(schemes, [name for name in matrices if name not in schemes], version=version)


def quantization_config(schemes: Mapping[str, Scheme], dense: list[str], *, version: int) -> dict[str, Any]:
    """`quantization_config` of a `config.json`.

    Args:
        schemes: by module; at least one.
        dense: modules that are not quantized.
        version: of the format, 1 or 2.
    """
    (base, _), *_ = Counter(schemes.values()).most_common(1)
    excluded: dict[str, dict[str, Any]] = {f"-:{pattern}": {} for pattern in _patterns(dense)}
    overridden: dict[str, dict[str, Any]] = {}
    for scheme in dict.fromkeys(schemes.values()):
        if scheme != base:
            named = _patterns([name for name, own in schemes.items() if own == scheme])
            overridden |= {f"+:{pattern}": _arguments(scheme) for pattern in named}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        **_arguments(base),
        "true_sequential": True,
        "lm_head": "lm_head" in schemes,
        "pack_dtype": "int32",
        "dynamic": excluded | overridden,
        "meta": {"quantizer": [f"layerwise:{__version__}"]},
    }


def _arguments(scheme: Scheme) -> dict[str, Any]:
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.sym,
        "desc_act": scheme.desc_act,
    }


def _patterns(names: list[str]) -> list[str]:
    """Regular expressions that match each of some modules, and what engines fuse them into, and nothing else."""
    patterns: dict[str, None] = {}
    for name in names:
        path, _, last = name.rpartition(".")
        for members, joined in FUSED.items():
            if last in members and all(f"{path}.{member}" in names for member in members):
                patterns[f"^{re.escape(path)}\\.({'|'.join((*members, joined))})$"] = None
                break
        else:
            patterns[f"^{re.escape(name)}$"] = None
    return list(patterns)


# --- tensors ----------------------------------------------------------------------------------------------------------


def packed_tensors(level: Level, *, version: int) -> dict[str, Tensor]:
    """A `grid` or `masked_grid` level as the format stores it, by the ends of the names."""
    import torch

    from layerwise.kernels.packing import pack
    from layerwise.stages.levels.grid import group_grids

    bits, columns = level.recipe["bits"], level.shape[1]
    codes, scale, zero = equal_groups(level)
    if zero is None:
        zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    if reordered(level.recipe):
        group = group_grids(level)[2]
    else:
        group = torch.arange(columns) // group_size(level.recipe, columns)
    return {
        "qweight": pack(codes, bits).T,
        "qzeros": pack(zero.T - (1 if version == 1 else 0), bits),
        "scales": scale.T,
        "g_idx": group.to(torch.int32),
    }
