"""`sparse_training`: pruned weights trained with masks that move. As many weights of every row, or of every group of an
N:M pattern, are kept in the end as the level keeps.

Every weight has a value behind it, pruned or not, and a mask lets the greatest through. The mask is found anew at each
step, so weights leave it and come back. At the start it lets more through than in the end (gradual magnitude pruning);
while it closes, gradients reach what is pruned, too, ever less of them, so that a weight that is missed grows back.
Then masks settle. Where the loss is looked at, and what is written, is always the mask of the end: a state of a step
when more was kept is never taken for a result.

It begins as the level was: pruned weights have their dense value behind them, as far as that is below what their row or
group keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from layerwise.stages.recover.training_params import TrainingParams

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level
    from layerwise.stages.recover.parts import ModelRepair, Part

BELOW = 0.999
"""Share of the least kept value that a pruned one may have behind it."""


class Params(TrainingParams):
    """How masks close, and how values are trained."""

    method: Literal["sparse_training"] = "sparse_training"
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW, at its greatest")
    initial: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the pruned weights that are pruned at the first step: 0 begins dense, 1 with as many as "
        "in the end",
    )
    closing: float = Field(0.5, ge=0, le=1, description="share of the steps after which masks are those of the end")
    regrow: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of its gradient that a pruned weight gets at the first step; none once masks are closed",
    )

    def misfit(self, recipe: Mapping[str, Any]) -> str | None:
        """It fits pruned weights that keep their values, by single weights or N:M."""
        base = recipe["base"] if recipe["encoding"] == "adapted" else recipe
        if base["encoding"] != "mask":
            return f"{base['encoding']} has no values of its own"
        return "its blocks go as a whole" if base.get("block") is not None else None


def sparse_training(task: ModelRepair, params: Params) -> list[Part]:
    """Masks and values of each unit.

    Source: the schedule of gradual magnitude pruning, arXiv:1710.01878, equation 1; gradients to pruned weights that
        fade, arXiv:2402.04744, section 3 (N:M), in the place of GraNet's regrowth by the greatest gradients, arXiv:
        2106.10404.
    """
    return [Masked(name, level, task.dense(name), params) for name, (_, level) in task.levels.items()]


class Masked:
    """The values and the mask of one unit.

    Args:
        unit: its name.
        level: what the model has of it.
        weight: (out, in), what the dense model has.
        params: of the repair.
    """

    def __init__(self, unit: str, level: Level, weight: Tensor, params: Params) -> None:
        import torch

        from layerwise.stages.levels.adapted import below
        from layerwise.stages.levels.mask import kept, n_and_m

        self.unit, self.level, self.base, self.params = unit, level, below(level), params
        keep, stored = kept(self.base), self.base.decode()
        self.beside = None if self.base is level else level.decode() - stored
        wanted = weight.float() if self.beside is None else weight.float() - self.beside
        pattern = self.base.recipe.get("pattern")
        self.width = level.shape[1] if pattern is None else n_and_m(pattern)[1]
        self.counts = self._groups(keep, False).sum(2, keepdim=True)
        self.sizes = self._groups(torch.ones_like(keep), False).sum(2, keepdim=True)
        least = self._groups(stored.abs().masked_fill(~keep, torch.inf), torch.inf).amin(2, keepdim=True)
        limit = self._flat((BELOW * least.where(least.isfinite(), 0.0)).expand(*least.shape[:2], self.width))
        self.values = stored.where(keep, wanted.clamp(-limit, limit))
        self.at_step(None)

    def _groups(self, values: Tensor, filling: float) -> Tensor:
        """(out, groups, width): what the level keeps a number of, whole rows or the groups of a pattern."""
        from torch.nn.functional import pad

        padded: Tensor = pad(values, (0, -values.shape[1] % self.width), value=filling)
        return padded.view(len(values), -1, self.width)

    def _flat(self, groups: Tensor) -> Tensor:
        return groups.flatten(1)[:, : self.level.shape[1]]

    @property
    def free(self) -> Mapping[str, Tensor]:
        return {f"{self.unit}/values": self.values}

    @property
    def rates(self) -> Mapping[str, float]:
        return {}

    def at_step(self, step: int | None) -> None:
        """Take the mask of a step; that of the end, and no gradient for what is pruned, for None."""
        self._pruned, self._gradient = 1.0, 0.0
        closed = self.params.closing * self.params.steps
        if step is not None and step < closed:
            left = 1 - step / closed
            # s_t = s_f + (s_i - s_f)(1 - t / nΔt)³   (equation 1, as a share of s_f)
            self._pruned = 1 + (self.params.initial - 1) * left**3
            self._gradient = self.params.regrow * left

    def keep(self) -> Tensor:
        """(out, in) bool: what is let through now."""
        import torch

        from layerwise.stages.compress.pruning import keep_first

        sizes = self._groups(self.values.detach().abs(), -torch.inf)
        pruned = ((self.sizes - self.counts) * self._pruned).long()
        return self._flat(keep_first(sizes, self.sizes - pruned))

    def tensors(self) -> Mapping[str, Tensor]:
        from layerwise.stages.recover.parts import stored_as

        keep = self.keep()
        W = stored_as(self.values, self.base.tensors["values"].dtype) * keep
        if self._gradient:
            W = W + self._gradient * (self.values - self.values.detach()) * ~keep  # zero, but for the gradient
        return {self.unit: W if self.beside is None else W + self.beside}

    def levels(self) -> Mapping[str, Level]:
        from layerwise.stages.levels.adapted import over
        from layerwise.stages.levels.mask import mask_level

        self.at_step(None)
        known = {key: value for key, value in self.base.recipe.items() if key != "index"}
        recipe = known | {"repairs": [*known.get("repairs", ()), "sparse_training"]}
        values = self.values.detach().to(self.base.tensors["values"].dtype)
        return {
            self.unit: over(self.level, mask_level(f"{self.base.name}+sparse_training", recipe, values, self.keep()))
        }

    def parameters(self) -> Mapping[str, Tensor]:
        return {}
