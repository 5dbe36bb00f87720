"""`lora`: adapters of low rank beside levels, trained end to end.

An adapter that is there already (of `eora`, say) is trained on; else one starts with B at zero, so that the model
begins as it was. Beside a grid it stays apart, and its bytes are counted. A pruned weight takes it in where its mask
lets it: the product is masked in training, too, and nothing is added to the file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from layerwise.stages.recover.training_params import TrainingParams

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from layerwise.stages.levels.level import Level
    from layerwise.stages.recover.parts import ModelRepair, Part


class Params(TrainingParams):
    """The adapter, and how it is trained."""

    method: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1, description="of new adapters; those that are there keep theirs")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="in which new adapters are stored")
    merge: bool = Field(True, description="take adapters into pruned weights, as far as their masks let them")

    adds_adapters: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """`lora-r8`."""
        return f"lora-r{self.rank}"


def lora(task: ModelRepair, params: Params) -> list[Part]:
    """One adapter for each unit.

    Source: LoRA, arXiv:2106.09685; the merge under a mask as in PERP, arXiv:2312.15230, section 3.
    """
    import torch

    generator = torch.Generator().manual_seed(params.seed)
    return [Adapter(name, level, params, generator) for name, (_, level) in task.levels.items()]


class Adapter:
    """The adapter of one unit."""

    def __init__(self, unit: str, level: Level, params: Params, generator: object) -> None:
        import torch

        from layerwise.stages.levels.adapted import below
        from layerwise.stages.levels.mask import kept

        assert isinstance(generator, torch.Generator)
        self.unit, self.level, self.params = unit, below(level), params
        self.base = self.level.decode()
        rows, columns = level.shape
        if level is self.level:
            rank = min(params.rank, rows, columns)
            A = torch.randn((rank, columns), generator=generator).to(self.base.device) / columns**0.5
            B = torch.zeros((rows, rank), device=self.base.device)
            self.dtype = getattr(torch, params.dtype)
        else:
            A, B = level.tensors["A"].float().clone(), level.tensors["B"].float().clone()
            self.dtype = level.tensors["A"].dtype
        self.A, self.B = A, B
        merged = params.merge and self.level.recipe["encoding"] == "mask"
        self.keep = kept(self.level) if merged else None

    @property
    def free(self) -> Mapping[str, Tensor]:
        return {f"{self.unit}/A": self.A, f"{self.unit}/B": self.B}

    @property
    def rates(self) -> Mapping[str, float]:
        return {}

    def tensors(self) -> Mapping[str, Tensor]:
        from layerwise.stages.recover.parts import stored_as

        if self.keep is not None:
            values = self.base + self.B @ self.A
            return {self.unit: stored_as(values, self.level.tensors["values"].dtype) * self.keep}
        return {self.unit: self.base + stored_as(self.B, self.dtype) @ stored_as(self.A, self.dtype)}

    def levels(self) -> Mapping[str, Level]:
        from layerwise.stages.levels.adapted import with_adapter

        if self.keep is None:
            A, B = (tensor.detach().to(self.dtype) for tensor in (self.A, self.B))
            return {self.unit: with_adapter(self.level, A, B, method="lora")}
        values = self.tensors()[self.unit].detach()[self.keep].to(self.level.tensors["values"].dtype)
        recipe = dict(self.level.recipe) | {"repairs": [*self.level.recipe.get("repairs", ()), "lora"]}
        tensors = {**self.level.tensors, "values": values}
        return {self.unit: replace(self.level, name=f"{self.level.name}+lora", recipe=recipe, tensors=tensors)}

    def parameters(self) -> Mapping[str, Tensor]:
        return {}
