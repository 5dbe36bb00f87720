"""`learned_rounding`: learn which way each weight is rounded, and how far each group's range is clipped.

Beside its weight W a unit has an offset V for each weight, added before it is rounded, and for each group two factors
of the ends of its range. They start as rounding to nearest on the whole range (V = 0, factors 1), and are tuned for all
units of a block together (`tuning.py`), by the sign of their gradient, until the block answers on its recorded inputs
as it does in the dense model. What comes out is a level of the `grid` encoding like any other, so that a search can mix
it with others.

A symmetric grid is not symmetric: it has one code more below zero than above. So the scale may be negative, and the
end with the greater magnitude gets that code; the rest of the grid is the finer for it.

Two differences from the published code: the best parameters are chosen by the loss on a fixed set of sequences, not on
the batch of the step; and inputs of a block are those of the dense model, so that levels of any two units fit together.

Left out: tuning norms and biases, which belong to no unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import AliasChoices, Field

from layerwise.stages.compress import Task, rtn
from layerwise.stages.compress.grid import GridParams, check_finite, clamp_codes, grid_or_masked
from layerwise.stages.levels.scales import SMALLEST_SCALE

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.compress.tuning import Free
    from layerwise.stages.levels.level import Level


class Params(GridParams):
    """Grid, and how long it is tuned."""

    method: Literal["learned_rounding"] = "learned_rounding"
    steps: int = Field(
        200,
        ge=1,
        validation_alias=AliasChoices("steps", "iters"),
        description="of signed gradient descent, for a block",
    )
    batch_size: int = Field(8, ge=1, description="calibration sequences for each step")
    step_size: float | None = Field(
        None,
        gt=0,
        validation_alias=AliasChoices("step_size", "lr"),
        description="of the first step of offsets, in steps of the grid; 1 / steps, if left out",
    )
    clip_step_size: float | None = Field(
        None,
        gt=0,
        validation_alias=AliasChoices("clip_step_size", "minmax_lr"),
        description="of the first step of the ends of a group's range, as a share of them; as step_size, if left out",
    )
    seed: int = Field(0, ge=0, description="of the order in which sequences are taken")

    scope: ClassVar[Literal["unit", "block"]] = "block"
    needs: ClassVar[frozenset[str]] = frozenset({"block_inputs"})

    def _name_suffixes(self) -> list[str]:
        suffixes = [] if self.steps == 200 else [f"{self.steps}steps"]
        suffixes += [] if self.step_size is None else [f"lr{self.step_size:g}"]
        suffixes += [] if self.clip_step_size is None else [f"clip{self.clip_step_size:g}"]
        return suffixes + ([] if self.seed == 0 else [f"seed{self.seed}"])

    def fallback(self) -> rtn.Params:
        """Rounding to nearest: where learning starts, but for the signs of symmetric scales."""
        return rtn.Params.model_validate(self.model_dump(include={"bits", "group_size", "sym"}))


def learned_rounding(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level per bit-width of every unit of a block, from the same recorded inputs.

    Args:
        task: a block with its inputs.
    Returns:
        by unit, levels in the order of `params.bits`. Each recipe holds the mean squared error of the block before and
        after, and the step that was best.
    Raises:
        NotFinite: NaN or Inf in a weight, in the block's inputs or answers, or in a loss; weights too large for a
            float16 scale.
    Source: SignRound, arXiv:2309.05516, equations 3 to 5 and algorithm 1.
    """
    from dataclasses import asdict

    from layerwise.stages.compress.tuning import tune

    assert task.block is not None, "a task of scope block"
    for name, weight in task.weights.items():
        check_finite(f"weight of {name}", weight)
    levels: dict[str, list[Level]] = {name: [] for name in task.units}
    for level_name, bits in zip(params.level_names(), params.bits, strict=True):
        parts = {name: Rounding(name, task.weights[name], bits, params, task.keep.get(name)) for name in task.units}
        tuned = tune(
            task.block, list(parts.values()), steps=params.steps, batch_size=params.batch_size, seed=params.seed
        )
        recipe = {**params.model_dump(mode="json"), "bits": bits, "tuned": asdict(tuned)}
        for name, part in parts.items():
            levels[name].append(part.level(level_name, recipe))
    return levels


class Rounding:
    """A unit on a grid with offsets before rounding and clipped ranges; a part of `tuning.tune`.

    Args:
        name: of the unit.
        weight: (out, in), any float dtype; worked on in float32.
        bits: per weight.
        params: group size, symmetry, step sizes.
        keep: (out, in) bool, weights that an earlier pruning left.
    """

    def __init__(self, name: str, weight: Tensor, bits: int, params: Params, keep: Tensor | None = None) -> None:
        import torch
        from torch.nn.functional import pad

        self.name, self.keep = name, keep
        self.shape = rows, columns = tuple(weight.shape)
        size = params.columns_per_group(columns)
        self.max_code, self.sym = 2**bits - 1, params.sym
        # Zeros fill up the last group. They change no range, because every range contains zero.
        self.W = pad(weight.detach().float(), (0, -columns % size)).view(rows, -1, size)
        self.low, self.high = self.W.amin(2, keepdim=True).clamp(max=0), self.W.amax(2, keepdim=True).clamp(min=0)
        self.V = torch.zeros_like(self.W)
        self.alpha, self.beta = torch.ones_like(self.high), torch.ones_like(self.low)
        self.step_size = params.step_size or 1 / params.steps
        self.clip_step_size = params.clip_step_size or self.step_size

    @property
    def free(self) -> list[Free]:
        """Offsets, at most half a step of the grid, and the ends of each range, at most as wide as the weights."""
        from layerwise.stages.compress.tuning import Free

        return [
            Free(self.V, self.step_size, (-0.5, 0.5)),
            Free(self.alpha, self.clip_step_size, (0.0, 1.0)),
            Free(self.beta, self.clip_step_size, (0.0, 1.0)),
        ]

    def tensors(self) -> dict[str, Tensor]:
        """The weight as it is rounded now."""
        codes, scale, zero = self.grid()
        W = self._flat((codes - zero) * scale)
        return {self.name: W if self.keep is None else W * self.keep}

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, groups, group size), scales and zero points (out, groups, 1), float32, differentiable."""
        from layerwise.stages.compress.tuning import round_through

        low, high = self.low * self.beta, self.high * self.alpha
        if self.sym:
            half = (self.max_code + 1) // 2
            negative = high > -low  # then codes run against the weights, and the end with one code more is the upper
            scale = high.maximum(-low) / half
            scale = _as_stored(scale) * (1 - 2 * negative.float())
            zero = scale.new_full(scale.shape, half)
        else:
            scale = _as_stored((high - low) / self.max_code)
            zero = clamp_codes(round_through(-low / scale), self.max_code)
        # W̃ = s · (clip(⌊W/s + V⌉ + zp, 0, 2^b - 1) - zp)   (eq. 3)
        return clamp_codes(round_through(self.W / scale + self.V) + zero, self.max_code), scale, zero

    def level(self, name: str, recipe: dict[str, Any]) -> Level:
        """What it decodes to now, encoded."""
        import torch

        with torch.no_grad():
            codes, scale, zero = self.grid()
        grid = {"scale": scale.squeeze(2), "zero": zero.squeeze(2)}
        return grid_or_masked(name, recipe, self._flat(codes), **grid, keep=self.keep)

    def _flat(self, groups: Tensor) -> Tensor:
        return groups.reshape(self.shape[0], -1)[:, : self.shape[1]]


def _as_stored(scale: Tensor) -> Tensor:
    """Positive scales with values that float16 holds; the gradient passes in float32, for many are too small for 16
    bits."""
    stored = scale.detach().half().to(scale.dtype).clamp(min=SMALLEST_SCALE)
    return stored + (scale - scale.detach())
