"""`perp`: norms and biases, a few tenths of a percent of a model, trained end to end. No level is touched.

They are stored as they were, in the dtype of the checkpoint, so the size is the same; the repaired model has a dense
model of its own below its levels, for norms and biases are no units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from layerwise.stages.recover.training_params import TrainingParams

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from layerwise.stages.levels.level import Level
    from layerwise.stages.models.causal_lm import CausalLM
    from layerwise.stages.recover.parts import ModelRepair, Part


class Params(TrainingParams):
    """How norms and biases are trained."""

    method: Literal["perp"] = "perp"
    learning_rate: float = Field(3e-3, gt=0, description="of AdamW, at its greatest")

    of_units: ClassVar[bool] = False


def perp(task: ModelRepair, params: Params) -> list[Part]:
    """All parameters of one dimension, in one part.

    Source: PERP, arXiv:2312.15230, section 3.
    """
    from layerwise.errors import UsageError

    part = Parameters(task.network)
    if not part.values:
        raise UsageError("the model has neither norms with weights nor biases", hint="choose another method")
    return [part]


class Parameters:
    """Norms and biases of a network; a shared one once."""

    def __init__(self, network: CausalLM) -> None:
        self.values = {
            name: parameter.detach().float().clone()
            for name, parameter in network.model.named_parameters()
            if parameter.dim() == 1
        }
        self.dtypes = {name: network.parameter(name).dtype for name in self.values}

    @property
    def free(self) -> Mapping[str, Tensor]:
        return self.values

    @property
    def rates(self) -> Mapping[str, float]:
        return {}

    def tensors(self) -> Mapping[str, Tensor]:
        return {name: value.to(self.dtypes[name]) for name, value in self.values.items()}

    def levels(self) -> Mapping[str, Level]:
        return {}

    def parameters(self) -> Mapping[str, Tensor]:
        return {name: value.detach() for name, value in self.values.items()}
