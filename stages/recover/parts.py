"""What a training moves: free tensors, and the weights that come of them, differentiably.

A part holds no more than what is free and what it takes to make weights of it; the loop (`training.py`) knows no
encoding. What is stored in float16 or as whole numbers is rounded on the way, with the gradient passed straight
through, so that the loss is always that of the model which would be written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from layerwise.stages.levels.level import Level
from layerwise.stages.models.causal_lm import CausalLM
from layerwise.stages.models.network import Unit


@dataclass(frozen=True)
class ModelRepair:
    """What a repair of scope `model` works on.

    Args:
        network: the compressed model, decoded, on its device; never changed.
        levels: by name, the units to be repaired, with what the model has of them, on that device.
        dense: gives the weight (out, in) of such a unit in the dense model below, there too.
    """

    network: CausalLM
    levels: Mapping[str, tuple[Unit, Level]]
    dense: Callable[[str], Tensor]


class Part(Protocol):
    """What one repair leaves free of one unit, or of the parameters that are no units."""

    @property
    def free(self) -> Mapping[str, Tensor]:
        """Leaves by name, float32; the loop changes them in place."""
        ...

    @property
    def rates(self) -> Mapping[str, float]:
        """By what the learning rate is multiplied, by the name of a leaf; 1 where it is not named."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """What the model runs with: by unit, its weight (out, in), or by the full name of any other parameter."""
        ...

    def levels(self) -> Mapping[str, Level]:
        """By unit, what is written."""
        ...

    def parameters(self) -> Mapping[str, Tensor]:
        """By the full name of a parameter that is no unit, what is written."""
        ...


@runtime_checkable
class Scheduled(Protocol):
    """A part that is not the same at every step."""

    def at_step(self, step: int | None) -> None:
        """Be as at a step, counted from 0; as it is written for None."""
        ...


def stored_as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values that a dtype holds, in float32; the gradient passes as if they were not rounded."""
    return values.detach().to(dtype).float() + (values - values.detach())  # exactly: the second term is zero
