"""`lq_lora`: a quantized matrix and a product of two thin ones that share the work: W ≈ Q + B · A.

Alternately Q is quantized from W - BA (`gptq.py`), and BA is the product of rank r that is nearest to W - Q, both as
the inputs see it; the first Q is made of W alone. It stops when the output error does not fall any more, and what was
best is kept. The first round is GPTQ with the adapter of `eora` beside it, so the level is never worse than that.

Source: LQ-LoRA, arXiv:2311.12023, algorithm 1. There Q is rounded to nearest and the error is that of the weights, or
    weighed by Fisher information, as rows and columns allow; here both count by the Hessian of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from layerwise.stages.compress import Task, gptq
from layerwise.stages.compress.factors import check_unpruned, damped

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level


class Params(gptq.Params):
    """Grid and order as of `gptq`, and the adapter."""

    method: Literal["lq_lora"] = "lq_lora"  # type: ignore[assignment]
    rank: int = Field(8, ge=1, description="columns of B and rows of A; at most the smaller side of a weight is taken")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="in which A and B are stored")
    rounds: int = Field(10, ge=1, description="how often at most Q and BA are made in turn")

    def _name_suffixes(self) -> list[str]:
        dtype = [] if self.dtype == "float16" else [self.dtype]
        rounds = [] if self.rounds == 10 else [f"{self.rounds}x"]
        return [*super()._name_suffixes(), f"r{self.rank}", *dtype, *rounds]


def lq_lora(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level for each number of bits.

    Returns:
        levels in the order of `params.level_names`.
    Raises:
        NotFinite: as of `gptq`, a factor is too large for its dtype, or the weight was pruned before.
    """
    check_unpruned(task)
    weight, hessian = task.weights[task.unit], task.statistic(task.unit, "hessian")
    first = gptq.quantized(weight, hessian, params)  # of all bits at once
    levels = []
    for bits, name, Q in zip(params.bits, params.level_names(), first, strict=True):
        one = params.model_copy(update={"bits": (bits,)})
        levels.append(replace(_alternated(weight.double(), hessian, Q, one), name=name))
    return {task.unit: levels}


def _alternated(W: Tensor, hessian: Tensor, Q: Level, params: Params) -> Level:
    """The best of the levels that the two steps in turn give.

    Args:
        W: (out, in), float64.
        hessian: (in, in).
        Q: the first, of W alone.
    """
    H = damped(hessian.double(), params.damp_percent)
    best, least = _with_nearest(W, Q, H, params)
    for number in range(1, params.rounds):
        product = best.tensors["B"].double() @ best.tensors["A"].double()
        (Q,) = gptq.quantized(W - product, hessian, params)
        level, error = _with_nearest(W, Q, H, params)
        if error >= least:
            break
        best, least = replace(level, recipe={**level.recipe, "rounds": number + 1}), error
    return best


def _with_nearest(W: Tensor, Q: Level, H: Tensor, params: Params) -> tuple[Level, float]:
    """Q with the product beside it that makes up best for its error, and the output error that is left."""
    import torch

    from layerwise.stages.compress.factors import best_factors
    from layerwise.stages.levels.adapted import with_adapter

    factors = best_factors(W - Q.decode().double(), params.rank, H)
    dtype = getattr(torch, params.dtype)
    level = with_adapter(Q, factors.A.to(dtype), factors.B.to(dtype), method=params.method)
    level = replace(level, recipe={**level.recipe, "rounds": 1})
    E = W - level.decode().double()
    return level, float(((E @ H) * E).sum())
