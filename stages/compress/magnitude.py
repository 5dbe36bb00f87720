"""`magnitude`: unstructured pruning; of each unit the weights of least magnitude become zero.

The baseline of pruning: it needs no data. Source: Han et al., arXiv:1506.02626, section 3.1, one threshold a layer and
no retraining.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from layerwise.stages.compress import MenuEntry, Task

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level

Share = Annotated[float, Field(gt=0, lt=1)]


class Params(MenuEntry):
    """How much is pruned."""

    method: Literal["magnitude"] = "magnitude"
    sparsity: Annotated[
        tuple[Share, ...],
        BeforeValidator(
            lambda value: value if isinstance(value, list | tuple) else (value,),
            json_schema_input_type=float | list[float],
        ),
    ] = Field(min_length=1, description="share of the weights that become zero, one level for each; a number or a list")

    @field_validator("sparsity")
    @classmethod
    def _distinct(cls, sparsity: tuple[float, ...]) -> tuple[float, ...]:
        if len({percent(share) for share in sparsity}) != len(sparsity):
            raise ValueError("the same sparsity stands twice")
        return sparsity

    def level_names(self) -> list[str]:
        """`magnitude-50%`, ..."""
        return [f"magnitude-{percent(share)}" for share in self.sparsity]


def percent(share: float) -> str:
    """`50%`, `62.5%`."""
    return f"{100 * share:.4g}%"


def magnitude(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level for each sparsity.

    Returns:
        levels in the order of `params.sparsity`, values in the dtype of the checkpoint.
    Raises:
        NotFinite: a weight is NaN or Inf.
    """
    from layerwise.stages.compress.grid import check_finite
    from layerwise.stages.levels.mask import mask_level

    weight = task.weights[task.unit]
    check_finite("weight", weight)
    levels = []
    for name, share in zip(params.level_names(), params.sparsity, strict=True):
        keep = keep_largest(weight.abs(), share)
        if task.unit in task.keep:
            keep &= task.keep[task.unit]
        levels.append(mask_level(name, {"method": "magnitude", "sparsity": share}, weight, keep))
    return {task.unit: levels}


def keep_largest(saliency: Tensor, sparsity: float) -> Tensor:
    """The entries that are kept when a share of them goes: those of greatest saliency, of equals the earlier ones.

    Args:
        saliency: any shape.
        sparsity: share that goes; as many entries as that is, rounded.
    Returns:
        bool, the same shape.
    """
    import torch

    flat = saliency.flatten()
    keep = torch.zeros_like(flat, dtype=torch.bool)
    order = flat.argsort(descending=True, stable=True)
    keep[order[: flat.numel() - round(sparsity * flat.numel())]] = True
    return keep.view(saliency.shape)
