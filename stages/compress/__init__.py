"""The methods that make levels: one file each, one line in `COMPRESSORS`.

A compressor is a function `fn(weight, hessian, params) -> list[Level]` that makes all levels which its parameters ask
for, of one unit, in one go:

    weight   (out, in), any float dtype, as in the checkpoint; never changed
    hessian  (in, in) `X Xᵀ`, or None; never changed
    params   the class `Params` of the same file, a `MenuEntry`

Other packages join through the entry point group `layerwise.compressors`, with the same `module:function` text.
Neither this module nor the methods import torch before they work, because a workflow is checked without it.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from layerwise.errors import UsageError
from layerwise.stages.contract import Params
from layerwise.stages.registry import lookup, names

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level

COMPRESSORS = {
    "dense": "layerwise.stages.compress.dense:dense",
    "rtn": "layerwise.stages.compress.rtn:rtn",
    "gptq": "layerwise.stages.compress.gptq:gptq",
}


class MenuEntry(Params):
    """Base of every compressor's parameters: one entry of the menu.

    `method` chooses the compressor; a subclass narrows it to its own name.
    """

    method: str

    impl: ClassVar[int] = 1
    """Raised by hand whenever the same inputs would give other levels; part of the stage's key."""

    needs_hessian: ClassVar[bool] = False
    """Whether the method asks for calibration."""

    @abstractmethod
    def level_names(self) -> list[str]:
        """Names of the levels it makes, in their order; known before any is made."""

    def nominal_bits(self) -> Sequence[float] | None:
        """Their bits per weight, if these too are known before; a budget out of reach is then refused at once."""
        return None


@dataclass(frozen=True)
class Compressor:
    """A method and the model of its parameters.

    Args:
        name: what `method` says.
        params: checks a menu entry.
        run: makes the levels; see the module.
    """

    name: str
    params: type[MenuEntry]
    run: Callable[[Tensor, Tensor | None, Any], list[Level]]


def compressor_names() -> list[str]:
    """Every method that a menu may name."""
    return names(COMPRESSORS, "layerwise.compressors")


def find_compressor(name: str) -> Compressor:
    """The compressor behind `method: name`.

    Raises:
        UsageError: nobody offers it; names the nearest known one.
    """
    run = lookup(name, COMPRESSORS, group="layerwise.compressors", kind="method")
    params = getattr(sys.modules[run.__module__], "Params", None)
    if not (isinstance(params, type) and issubclass(params, MenuEntry)):
        raise UsageError(f"method '{name}': {run.__module__} has no class Params, a MenuEntry, beside its function")
    return Compressor(name, params, run)
