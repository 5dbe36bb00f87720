"""The methods that make levels: one file each, one line in `COMPRESSORS`.

A compressor is a function `fn(task, params) -> {unit: levels}` that makes all levels which its parameters ask for, of
one unit or, with scope `block`, of all units of a block, in one go; with scope `half`, of a half-block and of the units
inside, which have these levels where the half-block has the one of the same name:

    task     what it works on, a `Task`; never changed
    params   the class `Params` of the same file, a `MenuEntry`

Other packages join through the entry point group `layerwise.compressors`, with the same `module:function` text.
Neither this module nor the methods import torch before they work, because a workflow is checked without it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from layerwise.stages.contract import Params
from layerwise.stages.models.network import Unit
from layerwise.stages.registry import lookup, names, params_beside

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.compress.block_run import BlockRun
    from layerwise.stages.levels.level import Level
    from layerwise.stages.models.channels import Channels

COMPRESSORS = {
    "dense": "layerwise.stages.compress.dense:dense",
    "rtn": "layerwise.stages.compress.rtn:rtn",
    "gptq": "layerwise.stages.compress.gptq:gptq",
    "gptq_sequential": "layerwise.stages.compress.gptq_sequential:gptq_sequential",
    "awq": "layerwise.stages.compress.awq:awq",
    "learned_rounding": "layerwise.stages.compress.learned_rounding:learned_rounding",
    "trellis": "layerwise.stages.compress.trellis:trellis",
    "trellis_nearest": "layerwise.stages.compress.trellis_nearest:trellis_nearest",
    "magnitude": "layerwise.stages.compress.magnitude:magnitude",
    "sparsegpt": "layerwise.stages.compress.sparsegpt:sparsegpt",
    "wanda": "layerwise.stages.compress.wanda:wanda",
    "low_rank": "layerwise.stages.compress.low_rank:low_rank",
    "lq_lora": "layerwise.stages.compress.lq_lora:lq_lora",
    "drop": "layerwise.stages.compress.drop:drop",
    "width": "layerwise.stages.compress.width:width",
}

COMPRESSOR_GROUP = "layerwise.compressors"


class MenuEntry(Params):
    """Base of every compressor's parameters: one entry of the menu.

    `method` chooses the compressor; a subclass narrows it to its own name.
    """

    method: str

    impl: ClassVar[int] = 1
    """Raised by hand whenever the same inputs would give other levels; part of the stage's key."""

    scope: ClassVar[Literal["unit", "block", "half"]] = "unit"
    """What a task is."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Statistics that the method reads, by their names in `layerwise.stages.calibrate.STATISTICS`."""

    @abstractmethod
    def level_names(self) -> list[str]:
        """Names of the levels it makes, in their order; known before any is made."""

    def nominal_bits(self) -> Sequence[float] | None:
        """Their bits per weight, if these too are known before; a budget out of reach is then refused at once."""
        return None

    def parents(self) -> Collection[str]:
        """Roles of parents that it makes levels for; none for a method that works on weights."""
        return ()

    def fallback(self) -> MenuEntry | None:
        """What makes levels under the same names, in the same order, for a unit that too few tokens reached."""
        return None

    def refuses(self, unit: Unit) -> str | None:
        """Why it makes no levels of a unit, whose levels are then those of its fallback; None if it does.

        A convolution in groups has a statistic for each of them, which a method must be written for.
        """
        return "its inputs come in groups" if unit.groups > 1 and self.needs else None

    def again(self, level: str) -> MenuEntry | None:
        """What makes one of its levels alone, of a single unit and from another Hessian; None if nothing does.

        `apply` asks, to make the levels of an allocation for the inputs that they will get (`remake`).
        """
        return self if self.scope == "unit" and self.needs == {"hessian"} else None

    @property
    def offers_unchanged(self) -> bool:
        """Whether it makes no level, but lets a search take what the model has already."""
        return False


@dataclass(frozen=True)
class Task:
    """What a compressor works on.

    Args:
        weights: by unit, (out, in), on the device of the work; any float dtype, as in the checkpoint.
        statistic: of a unit and a name, read when it is asked for, onto the device of the weights; only those that the
            method `needs`.
        units: the units themselves, by name. A parent has no weight.
        keep: by unit, (out, in) bool: what an earlier pruning left; a unit that was not pruned is not in it. A method
            keeps the pruned weights at zero.
        block: of scope `block`, its inputs, its answers in the dense model, and how to run it.
        channels: of scope `half`, what of the half-block can go together.
    """

    weights: Mapping[str, Tensor]
    statistic: Callable[[str, str], Tensor]
    units: Mapping[str, Unit]
    keep: Mapping[str, Tensor] = field(default_factory=dict)
    block: BlockRun | None = None
    channels: Channels | None = None

    @property
    def unit(self) -> str:
        """The one unit of a task of scope `unit`."""
        (name,) = self.units
        return name


@dataclass(frozen=True)
class Compressor:
    """A method and the model of its parameters.

    Args:
        params: checks a menu entry.
        run: makes the levels; see the module.
    """

    params: type[MenuEntry]
    run: Callable[[Task, Any], Mapping[str, list[Level]]]


def compressor_names() -> list[str]:
    """Every method that a menu may name."""
    return names(COMPRESSORS, COMPRESSOR_GROUP)


def find_compressor(name: str) -> Compressor:
    """The compressor behind `method: name`.

    Raises:
        UsageError: nobody offers it; names the nearest known one.
    """
    run = lookup(name, COMPRESSORS, group=COMPRESSOR_GROUP, kind="method")
    return Compressor(params_beside(run, MenuEntry, name), run)  # type: ignore[type-abstract]  # it is only compared with
