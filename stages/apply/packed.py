"""A compressed model in packed form: written beside its levels, and loaded as a model that runs on kernels.

`packed.safetensors` holds what every linear layer's weight is stored as, `<unit>/<tensor>`, and `packed.json` the
settings that `layerwise.kernels.packed.rebuild` needs. A level without a kernel stands there as the dense weight that
it decodes to. Units that are no linear layer of their own (experts, a tied head) have no packed form; they run decoded.

Left out: loading without the dense weights of the units, which are read and then replaced one by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import UsageError
from layerwise.stages.contract import ModelSource

if TYPE_CHECKING:
    from torch import Tensor, nn

    from layerwise.kernels.linear import Choose
    from layerwise.kernels.packed import Packed
    from layerwise.stages.levels.database import Database
    from layerwise.stages.levels.level import Level

TENSORS = "packed.safetensors"
SETTINGS = "packed.json"


def pack_units(
    database: Database, levels: Mapping[str, str], instead: Callable[[str], Level | None] = lambda unit: None
) -> dict[str, Packed]:
    """The weights of linear layers as kernels take them, by unit.

    Args:
        database: holds the levels.
        levels: unit to level name.
        instead: of a unit, the level in the place of the database's, if there is one.
    """
    units = database.index.by_name
    return {
        unit: pack_or_dense(instead(unit) or database.level(unit, level))
        for unit, level in levels.items()
        if units[unit].unit.replaceable
    }


def pack_or_dense(level: Level) -> Packed:
    """A level as a kernel takes it; one without a kernel as the dense weight that it decodes to, in float32."""
    from layerwise.kernels.dense import Dense

    packed = level.encoding.pack(level)
    return Dense(level.shape, level.decode()) if packed is None else packed


def save_packed(
    folder: Path,
    database: Database,
    levels: Mapping[str, str],
    instead: Callable[[str], Level | None] = lambda unit: None,
) -> list[str]:
    """Write the packed form of an allocation.

    Args:
        folder: where.
        database, levels, instead: as of `pack_units`.
    Returns:
        the units whose level has no kernel; parents need none.
    """
    from safetensors.torch import save_file

    from layerwise.kernels.dense import Dense

    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for unit, packed in pack_units(database, levels, instead).items():
        settings[unit] = packed.settings
        tensors |= {f"{unit}/{part}": tensor.contiguous() for part, tensor in packed.tensors.items()}
    weights = [unit for unit in levels if not database.index.by_name[unit].is_parent]
    without = [unit for unit in weights if settings.get(unit, {}).get("format") in (None, Dense.format)]
    save_file({name: tensors[name] for name in sorted(tensors)}, folder / TENSORS)
    document = {"units": settings, "no_kernel": without}
    (folder / SETTINGS).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return without


def read_packed(folder: Path) -> dict[str, Packed]:
    """What `save_packed` wrote, by unit.

    Raises:
        UsageError: the model was applied without its packed form.
    """
    from safetensors.torch import load_file

    from layerwise.kernels.packed import rebuild

    if not (folder / SETTINGS).is_file():
        raise UsageError(f"{folder} has no packed weights", hint="apply the allocation with `packed: true`")
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / TENSORS).items():
        unit, _, part = key.rpartition("/")
        tensors.setdefault(unit, {})[part] = tensor
    document = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    return {unit: rebuild(settings, tensors[unit]) for unit, settings in document["units"].items()}


def load_packed(source: ModelSource, folder: Path, choose: Choose | None = None) -> nn.Module:
    """A runnable model on packed weights: the Hugging Face model with `PackedLinear`s, in evaluation mode.

    Args:
        source: the dense model that the allocation was made for.
        folder: a `model` artifact of `apply` with `packed: true`.
        choose: which backend does which work, as a rule a `Dispatcher`; without it the dense one.
    Raises:
        UsageError: there is no packed form, or it is that of another model.
        UnsupportedModel: the dense model cannot be loaded.
    """
    from layerwise.kernels.linear import replace_linears
    from layerwise.stages.models.causal_lm import CausalLM
    from layerwise.stages.models.compressed import source_of

    network = CausalLM.load(source_of(folder, source))
    return replace_linears(network.model, read_packed(folder), choose)
