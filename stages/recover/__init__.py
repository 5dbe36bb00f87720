"""`recover`: what wins quality back after compression, with the compressed structure kept.

Each repair is one file and one line in `REPAIRS`: a function and the class `Params` of the same file, a `RepairEntry`.
With scope `unit` the function is `fn(task, params) -> Level`: it makes the level of one unit anew. With scope
`parameters` it is `fn(student, dense, sequences, params) -> tensors` by the names of parameters. With scope `model`
it is `fn(task, params) -> parts`, where `task` is a `parts.ModelRepair` and every `parts.Part` says what of a unit is
free; `training.py` trains them all. Grids, masks and codes stay bit for bit, unless the method is there to change them
and says so. Other packages join through the entry point group `layerwise.repairs`, with the same `module:function`
text.

Neither this module nor the methods import torch before they work, because a workflow is checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from layerwise.stages.contract import Params
from layerwise.stages.registry import lookup, names, params_beside

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level
    from layerwise.stages.models.network import Unit

REPAIRS = {
    "svd": "layerwise.stages.recover.svd:svd",
    "eora": "layerwise.stages.recover.eora:eora",
    "refit": "layerwise.stages.recover.refit:refit",
    "statistics": "layerwise.stages.recover.statistics:statistics",
    "perp": "layerwise.stages.recover.perp:perp",
    "step_size": "layerwise.stages.recover.step_size:step_size",
    "block_qat": "layerwise.stages.recover.block_qat:block_qat",
    "qat": "layerwise.stages.recover.qat:qat",
    "finetune": "layerwise.stages.recover.finetune:finetune",
    "sparse_training": "layerwise.stages.recover.sparse_training:sparse_training",
    "lora": "layerwise.stages.recover.lora:lora",
}

REPAIR_GROUP = "layerwise.repairs"


class RepairEntry(Params):
    """Base of every repair's parameters.

    `method` chooses the repair; a subclass narrows it to its own name.
    """

    method: str

    impl: ClassVar[int] = 1
    """Raised by hand whenever the same inputs would give another model; part of the stage's key."""

    scope: ClassVar[Literal["unit", "parameters", "model"]] = "unit"
    """What it works on at a time; one of scope `model` trains, and its parameters are `TrainingParams`."""

    of_units: ClassVar[bool] = True
    """Whether it is made of compressed units; else of parameters that are none."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Statistics that it reads, by their names in `layerwise.stages.calibrate.STATISTICS`."""

    adds_adapters: ClassVar[bool] = False
    """Whether it may lay adapters beside levels, which only some formats hold."""

    @property
    def name(self) -> str:
        """What the repair goes by in results: its method, and what else tells it from others of that method."""
        return self.method

    def misfit(self, recipe: Mapping[str, Any]) -> str | None:
        """Why it cannot repair a level with such a recipe; None if it can."""
        return None

    def misfit_of(self, unit: Unit, recipe: Mapping[str, Any]) -> str | None:
        """The same of the level of a certain unit."""
        return self.misfit(recipe)


@dataclass(frozen=True)
class UnitRepair:
    """What a repair of scope `unit` works on.

    Args:
        unit: the unit.
        level: what the compressed model has of it, on the device of the work.
        weight: (out, in), what the dense model below has, there too, in the dtype of the checkpoint.
        statistic: by its name, read when it is asked for; only those that the method `needs`.
    """

    unit: Unit
    level: Level
    weight: Tensor
    statistic: Callable[[str], Tensor]


@dataclass(frozen=True)
class Repair:
    """A method and the model of its parameters.

    Args:
        params: checks an entry of the workflow.
        run: see the module.
    """

    params: type[RepairEntry]
    run: Callable[..., Any]


def repair_names() -> list[str]:
    """Every method that a workflow may name."""
    return names(REPAIRS, REPAIR_GROUP)


def find_repair(name: str) -> Repair:
    """The repair behind `method: name`.

    Raises:
        UsageError: nobody offers it; names the nearest known one.
    """
    run = lookup(name, REPAIRS, group=REPAIR_GROUP, kind="method")
    return Repair(params_beside(run, RepairEntry, name), run)
