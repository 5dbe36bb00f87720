"""What every encoding promises; see `layerwise.stages.levels.level.Encoding`."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.errors import UsageError
from layerwise.stages.levels.files import open_unit, read_level, unit_file, write_unit
from layerwise.stages.levels.level import Level, find_encoding
from layerwise.testing.promises import Promise, demand, keep_all, refusal

if TYPE_CHECKING:
    from torch import Tensor


def check_encoding(name: str, levels: Sequence[Level]) -> None:
    """Check every promise of an encoding on levels of it.

    Args:
        name: of the encoding.
        levels: as many different ones as there are ways to store a weight in it: ragged groups, an odd number of
            columns, with and without each optional tensor.
    Raises:
        AssertionError: a promise is broken; says which.
    """
    keep_all(encoding_promises(name, levels))


def encoding_promises(name: str, levels: Sequence[Level]) -> list[Promise]:
    """The promises of `check_encoding`, one by one."""
    demand(levels, "the suite of an encoding needs at least one level")
    return [
        Promise(f"encoding {name}, level {level.name}", text, partial(check, name, level))
        for level in levels
        for text, check in (PARENT if level.shape == (0, 0) else WEIGHT).items()
    ]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits, NaN included."""
    import torch

    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # Element by element as bytes: a comparison of numbers would take -0 for 0, and NaN for something else.
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def demand_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], when: str) -> None:
    """Raise AssertionError unless both hold the same tensors, bit for bit."""
    demand(found.keys() == expected.keys(), f"{when} the tensors are {sorted(found)}, not {sorted(expected)}")
    for key, tensor in expected.items():
        demand(same_bits(found[key], tensor), f"{when} tensor {key} is another one")


def _recipe(name: str, level: Level) -> None:
    demand(level.recipe.get("encoding") == name, f"the recipe says {level.recipe.get('encoding')!r}")
    demand(isinstance(level.recipe.get("method"), str), "the recipe does not say the method")
    through = json.loads(json.dumps(dict(level.recipe), allow_nan=False))
    demand(through == dict(level.recipe), f"{dict(level.recipe)} comes out of JSON as {through}")


def _decodes(name: str, level: Level) -> None:
    import torch

    weight = level.decode()
    demand(weight.shape == level.shape, f"it decodes to {tuple(weight.shape)}, not {level.shape}")
    demand(weight.dtype == torch.float32, f"it decodes to {weight.dtype}")
    demand(same_bits(weight, level.decode()), "decoded twice, it is not the same")


def _unchanged(name: str, level: Level) -> None:
    before = {key: tensor.clone() for key, tensor in level.tensors.items()}
    recipe = json.dumps(dict(level.recipe), sort_keys=True)
    level.decode()
    find_encoding(name).pack(level)
    demand(level.costs == level.costs, "counted twice, its costs are not the same")
    demand_same_tensors(level.tensors, before, "afterwards")
    demand(json.dumps(dict(level.recipe), sort_keys=True) == recipe, "afterwards the recipe is another one")


def _costs(name: str, level: Level) -> None:
    nominal, stored, size = level.encoding.nominal_bits(level), level.stored_bits, 8 * level.size_bytes
    demand(math.isfinite(nominal) and nominal >= 0, f"{nominal} nominal bits")
    demand(stored == int(stored), f"{stored} stored bits are no whole number")
    demand(nominal <= stored, f"{nominal} bits without overhead are more than the {stored} with it")
    demand(stored <= size, f"{stored} bits are said to be stored, but the tensors have only {size}")
    demand(level.parameters == int(level.parameters), f"{level.parameters} parameters are no whole number")
    most = level.n_weights + level.recipe.get("rank", 0) * sum(level.shape)  # those of factors beside the weights
    demand(0 <= level.parameters <= most, f"{level.parameters} parameters of {level.n_weights} weights")


def _written(name: str, level: Level) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_unit(Path(folder), "first", [level])
        file, recipes = open_unit(Path(folder), "first")
        read = read_level(file, recipes, level.name)
        demand((read.name, read.shape) == (level.name, level.shape), f"it comes back as {read.name} of {read.shape}")
        demand(dict(read.recipe) == dict(level.recipe), f"its recipe comes back as {read.recipe}")
        demand_same_tensors(read.tensors, level.tensors, "read back,")
        if level.n_weights:
            demand(same_bits(read.decode(), level.decode()), "read back, it decodes to another weight")
        demand(read.costs == level.costs, f"read back, its costs are {read.costs}, not {level.costs}")
        write_unit(Path(folder), "second", [read])
        first, second = (unit_file(Path(folder), unit).read_bytes() for unit in ("first", "second"))
        demand(first == second, "written again, the file has other bytes")
        written = len(first) - 8 - int.from_bytes(first[:8], "little")  # beside the header of a safetensors file
        demand(level.size_bytes == written, f"its bytes are said to be {level.size_bytes}, and {written} are written")


def _packed(name: str, level: Level) -> None:
    import torch

    packed = find_encoding(name).pack(level)
    if packed is None:
        return
    demand(packed.shape == level.shape, f"packed it is of {packed.shape}, not {level.shape}")
    dense = packed.dense()
    demand(dense.dtype == torch.float32, f"the packed weight is {dense.dtype}")
    demand(torch.equal(dense, level.decode()), "the packed weight is another one")  # -0 and 0 are the same weight


def _label(name: str, level: Level) -> None:
    label = find_encoding(name).label
    text = label(level.recipe)
    demand(isinstance(text, str) and text, f"the label is {text!r}")
    backwards = dict(reversed(json.loads(json.dumps(dict(level.recipe))).items()))
    again = label(backwards)
    demand(again == text, f"for the same recipe, read from a file, it is {again!r}, not {text!r}")


def _no_weight(name: str, level: Level) -> None:
    demand(not level.tensors, f"a parent stores nothing, and here are {sorted(level.tensors)}")
    demand(find_encoding(name).pack(level) is None, "it can be packed")
    refusal(UsageError, "decoding a parent's level", level.decode)


Check = Callable[[str, Level], None]

PARENT: dict[str, Check] = {
    "a recipe is JSON and names encoding and method": _recipe,
    "a parent's level stands for no weight": _no_weight,
    "costs are exact": _costs,
    "a level survives its file, bit for bit": _written,
    "a label depends on nothing but the recipe": _label,
}
"""Of levels of a parent, which have no weight."""

WEIGHT: dict[str, Check] = {
    "a recipe is JSON and names encoding and method": _recipe,
    "a level decodes to the same (out, in) float32 each time": _decodes,
    "decoding, packing and counting change nothing": _unchanged,
    "costs are exact": _costs,
    "a level survives its file, bit for bit": _written,
    "the packed weight is the decoded one exactly": _packed,
    "a label depends on nothing but the recipe": _label,
}
"""Of levels of a weight."""
