"""`width`: half-blocks with fewer heads or channels; what is left is a smaller dense layer.

Groups that can go together (`layerwise.stages.models.channels`) are ranked by what they add to the half-block's answer
on the calibration tokens, tr(W_g H_gg W_gᵀ), from the Hessian H of the output projection's inputs and the projection's
columns W_g; of a channel that is the squared norm of its activations times that of its weights. All widths come from
one ranking, so a narrower half-block is a part of a wider one. What is kept of the output projection then makes up for
what went, as far as the kept channels tell it:

    W' = W_K + W_R H_RK (H_KK + damping)⁻¹

the least squares solution, K kept and R removed. How wide each block is, is left to whoever solves the allocation. With
`then`, the weights that are left are quantized as by `gptq`, the projection after its correction. What was narrowed
before is best compressed further from its dense export: here its zeros would be kept as a mask.

After CFSP (arXiv:2409.13199), which ranks blocks first, by how much they turn the hidden state (the profile's
`influence`), and then channels by their activations; the ranking here is not its formula. The correction is that of OBC
for a set of columns (arXiv:2208.11580, section 4), with damping towards the weights as they were. Left out: constant
parts of removed channels, which a bias could take over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from layerwise.errors import UsageError
from layerwise.stages.compress import MenuEntry, Task
from layerwise.stages.compress.gptq import Params as Rounding
from layerwise.stages.models.channels import Channels, index
from layerwise.stages.quantities import listed

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level

Half = Literal["attention", "mlp"]


class Params(MenuEntry):
    """How much of which half-blocks is kept."""

    method: Literal["width"] = "width"
    units: Annotated[tuple[Half, ...], listed(Half)] = Field(
        ("attention", "mlp"), min_length=1, description="attention, mlp: one of them or both"
    )
    keep: Annotated[tuple[Annotated[float, Field(gt=0)], ...], listed(float)] = Field(
        min_length=1,
        description="one level for each: below 1 the share of the heads or channels that is kept, rounded to what can "
        "be; from 1 on their number, of query heads in attention",
    )
    multiple: int = Field(32, ge=1, description="channels of an mlp are kept in multiples of so many, for the hardware")
    correct: bool = Field(
        True, description="let what is kept of the output projection make up for what went, by least squares"
    )
    damp_percent: float = Field(
        0.01, gt=0, lt=1, description="share of the Hessian's mean diagonal that is added before solving"
    )
    then: Rounding | None = Field(
        None, description="quantize what is kept: `bits` and whatever else `gptq` takes; one level for each bit-width"
    )

    scope: ClassVar[Literal["unit", "block", "half"]] = "half"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        for keep in self.keep:
            if keep >= 1 and keep != int(keep):
                raise ValueError(f"keep {keep:g}: a share is below 1, a number of heads or channels is whole")
            if keep >= 1 and len(set(self.units)) > 1:
                raise ValueError(f"keep {keep:g}: say of which units, for attention counts heads and mlp channels")
            if keep >= 1 and self.units == ("mlp",) and keep % self.multiple:
                raise ValueError(f"keep {keep:g} is no multiple of {self.multiple} channels (`multiple`)")
        if len(set(self.keep)) != len(self.keep):
            raise ValueError("the same width stands twice")
        return self

    def level_names(self) -> list[str]:
        """`width-75%`, `width-96`, `width-75%+gptq-4b-g128`, ..."""
        widths = [f"width-{keep:.0f}" if keep >= 1 else f"width-{100 * keep:.4g}%" for keep in self.keep]
        if self.then is None:
            return widths
        return [f"{width}+{rounded}" for width in widths for rounded in self.then.level_names()]

    def parents(self) -> Collection[str]:
        """Those of `units`."""
        return self.units

    def again(self, level: str) -> None:
        """Not of a single unit."""

    def groups_kept(self, channels: Channels) -> list[int]:
        """How many groups of a half-block each of `keep` is.

        Raises:
            UsageError: one of them cannot be, or is all of them, or two are the same.
        """
        found = [self._groups_kept(keep, channels) for keep in self.keep]
        for number, count in enumerate(found):
            if count in found[:number]:
                first = self.keep[found.index(count)]
                raise UsageError(
                    f"width: keep {first:g} and {self.keep[number]:g} are the same {self._told(count, channels)} of "
                    f"{channels.half}",
                    hint="leave one of them out",
                )
        return found

    def rounded(self, channels: Channels) -> list[str]:
        """Which of the shares are not met to the group, and what they are."""
        return [
            f"keep {keep:g} of {self._told(channels.groups, channels)} is {self._told(count, channels)}"
            for keep, count in zip(self.keep, self.groups_kept(channels), strict=True)
            if keep < 1 and count != keep * channels.groups
        ]

    def _groups_kept(self, keep: float, channels: Channels) -> int:
        total, step = channels.groups, self.multiple if channels.role == "mlp" else 1
        if keep >= 1:
            if keep % channels.heads:
                raise UsageError(
                    f"width: keep {keep:g} of the heads of {channels.half}: {channels.heads} query heads share a key "
                    "and a value head, and go together",
                    hint=f"say a multiple of {channels.heads}",
                )
            count = int(keep) // channels.heads
        else:
            count = max(step, round(keep * total / step) * step)
        if count >= total:
            steps, lower = "", ""
            if step > 1:
                steps, lower = f", in multiples of {step}", ", or lower `multiple`"
            elif channels.heads > 1:
                steps = f", in {total} groups that share a key and a value head"
            raise UsageError(
                f"width: keep {keep:g} of {channels.half} is no less than the {self._told(total, channels)} that it "
                f"has{steps}",
                hint=f"keep fewer{lower}",
            )
        return count

    @staticmethod
    def _told(groups: int, channels: Channels) -> str:
        return f"{groups * channels.heads} {'heads' if channels.role == 'attention' else 'channels'}"


def width(task: Task, params: Params) -> Mapping[str, list[Level]]:
    """Make the levels of a half-block: what each leaves of the weights inside.

    Args:
        task: the half-block, the units inside and what of it can go together.
    Raises:
        NotFinite: a weight or the Hessian of the output projection is NaN or Inf, or the Hessian is zero.
        UsageError: a width that cannot be.
    """
    from layerwise.stages.compress.recursion import check_layer
    from layerwise.stages.levels.parent import parent_level

    channels = task.channels
    assert channels is not None, "the scope of the method says so"
    hessian = task.statistic(channels.out, "hessian")
    for name in channels.units:
        check_layer(task.weights[name], hessian)
    order = saliency(task.weights[channels.out], hessian, channels).argsort(descending=True, stable=True).tolist()
    names = iter(params.level_names())
    found: dict[str, list[Level]] = {name: [] for name in (channels.half, *channels.units)}
    for count in params.groups_kept(channels):
        kept = sorted(order[:count])
        made = _narrowed(task, params, channels, hessian, kept)
        for number in range(len(made[channels.out])):
            name = next(names)
            found[channels.half].append(parent_level("narrow", name=name, method="width", groups=count))
            for unit in channels.units:
                found[unit].append(_as_level(name, made[unit][number], unit, task, channels, kept))
    return found


def saliency(weight: Tensor, hessian: Tensor, channels: Channels) -> Tensor:
    """What each group adds to the answer: (groups,), float64, tr(W_g H_gg W_gᵀ).

    Args:
        weight: (out, in) of the output projection.
        hessian: (in, in) of its inputs.
        channels: where the groups lie.
    """
    import torch

    W, H = weight.double(), hessian.double()
    if all(size == 1 for _, size in channels.columns):
        return (W.square().sum(0) * H.diagonal())[index(channels.columns, range(channels.groups), W, 1)]
    parts = [index(channels.columns, [group], W, 1) for group in range(channels.groups)]
    return torch.stack([((W[:, part] @ H[part][:, part]) * W[:, part]).sum() for part in parts])


def corrected(weight: Tensor, hessian: Tensor, kept: Tensor, damp_percent: float) -> Tensor:
    """The kept columns, (out, kept), float64, with what they make up for; the formula of the module.

    Args:
        weight: (out, in).
        hessian: (in, in).
        kept: (kept,) int64, the columns that stay.
        damp_percent: share of the mean diagonal.
    """
    import torch

    from layerwise.stages.compress.recursion import inverse_factor

    W, H = weight.double(), hessian.double()
    gone = torch.ones(len(H), dtype=torch.bool, device=H.device)
    gone[kept] = False
    within = H[kept][:, kept]
    if not within.diagonal().any():
        return W[:, kept]  # nothing that is kept ever speaks, so it has nothing to tell
    U, _ = inverse_factor(within, damp_percent)
    return W[:, kept] + W[:, gone] @ H[gone][:, kept] @ U.T @ U


def _narrowed(
    task: Task, params: Params, channels: Channels, hessian: Tensor, kept: Sequence[int]
) -> dict[str, list[Level]]:
    """By unit, the levels of what is kept."""
    made = {}
    for name in channels.units:
        W, keep = task.weights[name], task.keep.get(name)
        if name == channels.out:
            columns = index(channels.columns, kept, W, 1)
            part = corrected(W, hessian, columns, params.damp_percent).to(W.dtype) if params.correct else W[:, columns]
            keep = None if keep is None else keep[:, columns]
            own = hessian[columns][:, columns]
        else:
            rows = index(channels.rows[name], kept, W, 0)
            part, own = W[rows], None
            keep = None if keep is None else keep[rows]
        made[name] = _levels(task, params, name, part if keep is None else part * keep, own, keep)
    return made


def _levels(
    task: Task, params: Params, name: str, part: Tensor, hessian: Tensor | None, keep: Tensor | None
) -> list[Level]:
    from layerwise.stages.compress.gptq import quantized
    from layerwise.stages.levels.dense import dense_level

    if params.then is None:
        return [dense_level(part.contiguous())]
    known = task.statistic(name, "hessian") if hessian is None else hessian
    return quantized(part, known, params.then, keep=keep)


def _as_level(name: str, base: Level, unit: str, task: Task, channels: Channels, kept: Sequence[int]) -> Level:
    from layerwise.stages.levels.sliced import sliced_level

    rows, columns = task.weights[unit].shape
    of_rows, of_columns = ((), channels.columns) if unit == channels.out else (channels.rows[unit], ())
    return sliced_level(
        name,
        "width",
        base,
        (rows, columns),
        groups=channels.groups,
        kept=kept,
        rows=of_rows,
        columns=of_columns,
        role=channels.role,
        members=channels.units,
    )
