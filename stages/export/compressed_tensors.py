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
`asymmetric`. Experts that the model computes with as one stacked parameter stay dense; transformers 5.23 looks for
packed ones once a folder is quantized, and fails on dense ones, so they need `dense_experts`. Left out: activation
quantization, float formats, packed experts.

Source: compressed-tensors 0.20, `quantization/quant_config.py` and `compressors/pack_quantized`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import UnsupportedModel
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
from layerwise.stages.models.network import Unit

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from layerwise.stages.levels.level import Level

VERSION = "0.20.0"
"""Of compressed-tensors: the layout that is written, and recorded in the folder."""

SAFE_BITS = (4, 8)
"""Widths that every reader has a kernel for."""


def compressed_tensors(
    source: ModelSource,
    out: Path,
    *,
    any_bits: bool = False,
    asymmetric: bool = False,
    dense_experts: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the folder.

    Raises:
        UnsupportedModel: it cannot hold a level, a part is dropped, layers that engines fuse differ, or transformers
            would not load it; nothing is written then.
    """
    form = held(any_bits=any_bits, asymmetric=asymmetric, dense_experts=dense_experts)
    if not dense_experts and source.compressed is not None:
        stacked = stacked_experts(source)
        if stacked is not None:
            raise UnsupportedModel(f"compressed-tensors cannot hold {stacked}: {_STACKED}")
    write_packed(source, out, form, shard_bytes=shard_bytes)


def held(*, any_bits: bool = False, asymmetric: bool = False, dense_experts: bool = False) -> PackedFormat:
    """The format with these settings."""
    refuse = partial(why_not, any_bits=any_bits, asymmetric=asymmetric, dense_experts=dense_experts)
    return PackedFormat("compressed-tensors", refuse, layout, packed_tensors, _configure)


# --- what it can hold, and at what size -------------------------------------------------------------------------------


_STACKED = (
    "transformers does not load experts that stay dense beside packed layers; `dense_experts: true` writes them all "
    "the same, for vLLM"
)


def why_not(
    unit: Unit,
    recipe: Mapping[str, Any],
    *,
    any_bits: bool = False,
    asymmetric: bool = False,
    dense_experts: bool = False,
) -> str | None:
    """Why this format cannot hold a level; None if it can."""
    if unit.role == "expert" and not dense_experts:
        return _STACKED
    why = why_not_packed(unit, recipe)
    if why is not None or recipe["encoding"] not in PACKED:
        return why
    reasons = (
        (reordered(recipe), "it has no place for columns that are grouped in another order"),
        (
            not recipe["sym"] and not asymmetric,
            "transformers does not reload asymmetric layers; `asymmetric: true` forces it",
        ),
        (
            recipe["bits"] not in SAFE_BITS and not any_bits,
            f"only 4 and 8 bits load everywhere, not {recipe['bits']}; `any_bits: true` allows them",
        ),
    )
    return first_that_holds(reasons)


def layout(unit: Unit, recipe: Mapping[str, Any]) -> Layout:
    """The tensors that a packed level becomes, by the ends of their names."""
    rows, columns = unit.shape
    bits: int = recipe["bits"]
    groups = columns // group_size(recipe, columns)
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_packed": ("I32", (rows, -(-columns * bits // 32))),
        "weight_scale": ("F16", (rows, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if not recipe["sym"]:
        found["weight_zero_point"] = ("I32", (-(-rows * bits // 32), groups))
    return found


# --- configuration ----------------------------------------------------------------------------------------------------


def _configure(schemes: Mapping[str, Scheme], source: ModelSource) -> dict[str, Any]:
    return quantization_config(schemes, linear_layers(source))


def quantization_config(schemes: Mapping[str, Scheme], linears: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of a `config.json`.

    Args:
        schemes: by module.
        linears: every linear layer of the model.
    """
    targets: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        targets.setdefault(scheme, []).append(name)
    nothing = {"input_activations": None, "output_activations": None}
    groups = {
        f"group_{number}": {"targets": names, "weights": _weights(scheme), "format": "pack-quantized", **nothing}
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


def _weights(scheme: Scheme) -> dict[str, Any]:
    """The `weights` of a group: what the format calls quantization arguments."""
    channel = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
    }


def linear_layers(source: ModelSource) -> list[str]:
    """Names of a model's linear layers; its weights are not read."""
    import torch

    return [name for name, module in _without_weights(source).named_modules() if isinstance(module, torch.nn.Linear)]


def stacked_experts(source: ModelSource) -> str | None:
    """The first parameter that holds the weights of several experts; None if there is none."""
    return next((name for name, tensor in _without_weights(source).named_parameters() if tensor.dim() == 3), None)


def _without_weights(source: ModelSource) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from layerwise.stages.models.trust import loading

    with loading(source.path, source.trust) as options, torch.device("meta"):
        config = AutoConfig.from_pretrained(source.path, **options)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust)
    return model


# --- tensors ----------------------------------------------------------------------------------------------------------


def packed_tensors(level: Level) -> dict[str, Tensor]:
    """A `grid` or `masked_grid` level as the format stores it, by the ends of the names."""
    import torch

    from layerwise.kernels.packing import pack

    bits = level.recipe["bits"]
    codes, scale, zero = equal_groups(level)
    tensors = {
        "weight_packed": level.tensors["codes"] if level.recipe["encoding"] == "grid" else pack(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(level.shape, dtype=torch.int64),
    }
    if zero is not None:
        tensors["weight_zero_point"] = pack(zero.T, bits).T
    return tensors
