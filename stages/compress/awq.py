"""`awq`: scale up the input channels that carry large activations before rounding, and scale their inputs down.

Units of a block that read the same input share one scale for each input channel, s = mean|x|^α, so that whatever gives
them their input can take over the division. α is searched for each such group: the one with the least squared error of
their outputs, which the Hessian of the input gives exactly, without running anything. α = 0 is rounding to nearest, so
no level is worse than that on the calibration text. The scales are part of a level (`input_scale` of the `grid`
encoding), rounded to float16 before anything is quantized, and cost 16 bits for each input.

All bit-widths share the statistics; each has its own α. Left out: the published code's search for clipped ranges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from layerwise.errors import NotFinite
from layerwise.stages.compress import Task, rtn
from layerwise.stages.compress.grid import GridParams, check_finite, dequantize, fit, grid_or_masked, quantize
from layerwise.stages.compress.precision import precision_recipe, working_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level

RANGE = 1e-4
"""Least scale before it is normalised, as in the published code: of channels that are hardly ever active."""


class Params(GridParams):
    """Grid, and how finely α is searched."""

    method: Literal["awq"] = "awq"
    grid_points: int = Field(20, ge=1, description="values of the exponent that are tried, evenly spaced from 0 to 1")

    scope: ClassVar[Literal["unit", "block"]] = "block"
    needs: ClassVar[frozenset[str]] = frozenset({"block_inputs", "channels", "hessian"})

    def _name_suffixes(self) -> list[str]:
        return [] if self.grid_points == 20 else [f"{self.grid_points}points"]

    def fallback(self) -> rtn.Params:
        """Rounding to nearest, on the same grid."""
        return rtn.Params.model_validate(self.model_dump(include={"bits", "group_size", "sym"}))


def awq(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make one level per bit-width of every unit of a block.

    Args:
        task: a block with its inputs, the Hessian and the channels' statistics of its units.
    Returns:
        by unit, levels in the order of `params.bits`; each recipe holds the `alpha` that was chosen.
    Raises:
        NotFinite: NaN or Inf in a weight or a statistic, or weights too large for a float16 scale.
    Source: AWQ, arXiv:2306.00978, section 3.2, equations 4 and 5.
    """
    assert task.block is not None, "a task of scope block"
    levels: dict[str, list[Level]] = {name: [] for name in task.units}
    for names in task.block.groups():
        members = [name for name in names if name in task.units]
        for level_name, bits in zip(params.level_names(), params.bits, strict=True):
            for name, level in _of_one_input(task, members, level_name, bits, params).items():
                levels[name].append(level)
    return levels


def _of_one_input(task: Task, names: Sequence[str], level_name: str, bits: int, params: Params) -> dict[str, Level]:
    """Levels of units that read the same input, with the scale that is best for all of them."""
    import torch

    from layerwise.stages.calibrate.channels import MAGNITUDES

    dtype = working_dtype(task.weights[names[0]].device)
    H = task.statistic(names[0], "hessian").to(dtype)
    channels = task.statistic(names[0], "channels").double()
    check_finite(f"Hessian of {names[0]}", H)
    check_finite(f"channels of {names[0]}", channels)
    weights = {name: task.weights[name].detach().double() for name in names}
    for name, weight in weights.items():
        check_finite(f"weight of {name}", weight)
    best: tuple[float, float, Tensor, dict[str, _Rounded]] | None = None
    for point in range(params.grid_points):
        alpha = point / params.grid_points
        divisor = _input_scale(channels[MAGNITUDES], alpha)
        rounded = {name: _round(weight / divisor, bits, params) for name, weight in weights.items()}
        error = 0.0
        for name, (_, _, _, values) in rounded.items():
            keep = task.keep.get(name)
            E = weights[name] - values * divisor * (1 if keep is None else keep)
            E = E.to(dtype)
            error += float(((E @ H) * E).sum())  # ‖(Q(W · s) / s - W) X‖²   (eq. 4)
        if best is None or error < best[0]:
            best = error, alpha, divisor, rounded
    if best is None:
        raise NotFinite(f"no scale of the inputs of {names[0]} gives finite errors", hint="calibrate again")
    _, alpha, divisor, rounded = best
    recipe = {**params.model_dump(mode="json"), "bits": bits, "alpha": alpha, **precision_recipe(dtype)}
    found = {}
    for name, (codes, scale, zero, _) in rounded.items():
        grid: dict[str, Any] = {"scale": scale, "zero": zero, "keep": task.keep.get(name)}
        scaled = None if torch.equal(divisor, torch.ones_like(divisor)) else divisor
        found[name] = grid_or_masked(level_name, recipe, codes, **grid, input_scale=scaled)
    return found


_Rounded = tuple["Tensor", "Tensor", "Tensor", "Tensor"]
"""Codes (out, in), scale and zero point (out, groups), and the values (out, in) that they stand for."""


def _input_scale(magnitudes: Tensor, alpha: float) -> Tensor:
    """1 / s, what inputs are multiplied by: (in,), with values that float16 holds.

    s = mean|x|^α (eq. 5), over the geometric mean of its ends, as the published code normalises it; the number of
    tokens drops out.
    """
    s = (magnitudes / magnitudes.mean().clamp(min=1e-300)).pow(alpha).clamp(min=RANGE)
    return ((s.max() * s.min()).sqrt() / s).clamp(2.0**-14, 65504.0).half().double()


def _round(W: Tensor, bits: int, params: Params) -> _Rounded:
    """To the nearest points of grids of the whole range, in float64."""
    from torch.nn.functional import pad

    rows, columns = W.shape
    size, max_code = params.columns_per_group(columns), 2**bits - 1
    groups = pad(W, (0, -columns % size)).view(rows, -1, size)
    scale, zero = fit(groups.amin(2), groups.amax(2), max_code, params.sym)
    codes = quantize(groups, scale[..., None], zero[..., None], max_code)
    values = dequantize(codes, scale[..., None], zero[..., None])
    return codes.view(rows, -1)[:, :columns], scale, zero, values.reshape(rows, -1)[:, :columns]
