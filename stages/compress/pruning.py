"""What pruning methods share: how much goes, in which pattern, and, given a score of every weight, which weights.

Counts are exact: of a weight of n elements the least whole number from sparsity · n on become zero, whatever the rows
and blocks are cut into, so no level keeps more than its share, and a budget of the same share can be met by it.
Of an N:M pattern N of every M neighbours in a row are kept; where a row does not divide, of the r columns at its end
ceil(r · N / M). Of equal scores the earlier weight is kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field, field_validator, model_validator

from layerwise.stages.compress import MenuEntry
from layerwise.stages.compress.grid import Grids, fit, quantize
from layerwise.stages.levels.block_grid import block_grid_level
from layerwise.stages.levels.index import spread_blocks
from layerwise.stages.levels.mask import mask_level, n_and_m
from layerwise.stages.levels.masked_grid import masked_grid_level
from layerwise.stages.quantities import listed

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level

Share = Annotated[float, Field(gt=0, lt=1)]
MOST = 32
"""Greatest M of a pattern; kernels take up to 16."""


class Then(Grids):
    """What kept weights are rounded to."""

    grid: Literal["minmax", "mse"] = Field(
        "mse",
        description="minmax: from the least to the greatest kept weight of a group; mse: the range of least squared "
        "error, in which a column counts by what the method knows of it",
    )

    def _name_suffixes(self) -> list[str]:
        return [] if self.grid == "mse" else [self.grid]


@dataclass(frozen=True)
class Amount:
    """How much goes.

    Args:
        name: `50%`, `2:4` or `50%-16x128`.
        share: of the weights, or of the blocks, that becomes zero.
        pattern: (N, M): of every M neighbours in a row N are kept; None for no pattern.
        block: rows and columns of blocks that go as a whole, smaller ones at the ends; None for single weights.
    """

    name: str
    share: float
    pattern: tuple[int, int] | None = None
    block: tuple[int, int] | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """What every level says of it."""
        said: dict[str, Any] = {"sparsity": self.share}
        if self.pattern is not None:
            said["pattern"] = self.name
        if self.block is not None:
            said["block"] = list(self.block)
        return said


class PruningParams(MenuEntry):
    """How much is pruned, in which pattern, and what is done to the rest."""

    sparsity: Annotated[tuple[Share, ...], listed(float)] = Field(
        (), description="share of the weights that become zero, one level for each; a number or a list"
    )
    pattern: Annotated[tuple[str, ...], listed(str)] = Field(
        (),
        validation_alias=AliasChoices("pattern", "mask_structure"),
        description="N:M: of every M neighbours in a row N are kept; one level for each, `2:4` or a list",
    )
    block: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="rows and columns of blocks that go as a whole; [64, 256] is a shape that a kernel skips once the "
        "rest is rounded, [1, 16] with groups of 16 are runs of a row, as GQSA has them; only with `sparsity`",
    )
    then: Then | None = Field(
        None, description="round what is kept to these grids, in the same pass; one level for each amount and bits"
    )

    @field_validator("sparsity")
    @classmethod
    def _distinct(cls, sparsity: tuple[float, ...]) -> tuple[float, ...]:
        if len({percent(share) for share in sparsity}) != len(sparsity):
            raise ValueError("the same sparsity stands twice")
        return sparsity

    @field_validator("pattern")
    @classmethod
    def _patterns(cls, pattern: tuple[str, ...]) -> tuple[str, ...]:
        for text in pattern:
            found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
            if not found or not int(found[1]) < int(found[2]) <= MOST:
                raise ValueError(f"'{text}' is no N:M with N below M and M at most {MOST}, such as 2:4")
        if len(set(pattern)) != len(pattern):
            raise ValueError("the same pattern stands twice")
        return pattern

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.amounts:
            raise ValueError("give `sparsity` or `pattern`, at least one of either")
        if self.block is not None and self.pattern:
            raise ValueError("blocks go by `sparsity`; make N:M patterns in an entry of their own")
        return self

    @property
    def amounts(self) -> list[Amount]:
        """Shares, then patterns, in their order."""
        shape = "" if self.block is None else f"-{self.block[0]}x{self.block[1]}"
        found = [Amount(f"{percent(share)}{shape}", share, block=self.block) for share in self.sparsity]
        for text in self.pattern:
            n, m = n_and_m(text)
            found.append(Amount(text, 1 - n / m, (n, m)))
        return found

    def level_names(self) -> list[str]:
        """`wanda-50%`, `wanda-2:4`, `sparsegpt-50%-4b-g128`, ..."""
        grids = [] if self.then is None else [[name] for name in self.then.grid_names()]
        rest = ["-".join(["", *grid, *self._name_suffixes()]) for grid in grids or [[]]]
        return [f"{self.method}-{amount.name}{end}" for amount in self.amounts for end in rest]

    def _name_suffixes(self) -> list[str]:
        """What else tells apart the levels of two menu entries of this method."""
        return []

    def again(self, level: str) -> MenuEntry | None:
        """The same for the amount and the bits of that level."""
        if super().again(level) is None:
            return None
        each = 1 if self.then is None else len(self.then.bits)
        number, place = divmod(self.level_names().index(level), each)
        one: dict[str, Any] = {"sparsity": self.sparsity[number : number + 1], "pattern": ()}
        if number >= len(self.sparsity):
            one["pattern"] = (self.pattern[number - len(self.sparsity)],)
        if self.then is not None:
            one["then"] = self.then.model_copy(update={"bits": (self.then.bits[place],)})
        return self.model_copy(update=one)


def percent(share: float) -> str:
    """`50%`, `62.5%`."""
    return f"{100 * share:.4g}%"


# --- which weights ----------------------------------------------------------------------------------------------------


def lost(count: int, sparsity: float) -> int:
    """Of so many weights, how many go: the least whole number that is the share."""
    return math.ceil(sparsity * count - 1e-6)  # which a product of floats may miss


def keep_largest(saliency: Tensor, sparsity: float) -> Tensor:
    """The entries that are kept when a share of them goes: those of greatest saliency, of equals the earlier ones.

    Args:
        saliency: any shape.
        sparsity: share that goes; as many entries as `lost` says.
    Returns:
        bool, the same shape.
    """
    return ~least(saliency, lost(saliency.numel(), sparsity))


def least(saliency: Tensor, count: int) -> Tensor:
    """So many entries of least saliency, of equals the later ones: bool, the same shape."""
    import torch

    flat = saliency.flatten()
    if count == 0:
        return torch.zeros_like(saliency, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    goes = flat < threshold
    (equal,) = torch.nonzero(flat == threshold, as_tuple=True)
    goes[equal[len(equal) - (count - int(goes.sum())) :]] = True
    return goes.view(saliency.shape)


def keep_largest_of_rows(saliency: Tensor, sparsity: float) -> Tensor:
    """The same with weights compared only within their row.

    Rows lose equally many; where the share of a row is no whole number, as many that all rows so far have lost theirs.

    Args:
        saliency: (out, in).
    """
    import torch

    rows, columns = saliency.shape
    gone = [after - before for before, after in pairwise(lost(columns * row, sparsity) for row in range(rows + 1))]
    kept = columns - torch.tensor(gone, device=saliency.device)
    return keep_first(saliency, kept[:, None])


def keep_pattern(saliency: Tensor, pattern: tuple[int, int]) -> Tensor:
    """N of every M neighbours in a row.

    Args:
        saliency: (out, in), not negative.
        pattern: (N, M); how many of a shorter group at the end says the module.
    """
    import torch
    from torch.nn.functional import pad

    n, m = pattern
    columns = saliency.shape[1]
    groups = pad(saliency, (0, -columns % m), value=-torch.inf).unflatten(1, (-1, m))
    kept = torch.full((groups.shape[1], 1), n, device=saliency.device)
    kept[-1] = kept_of(m - -columns % m, pattern)
    return keep_first(groups, kept).flatten(1)[:, :columns]


def kept_of(columns: int, pattern: tuple[int, int]) -> int:
    """How many of so many neighbours, at most M, an N:M pattern keeps."""
    return -(-columns * pattern[0] // pattern[1])


def keep_blocks(saliency: Tensor, block: tuple[int, int], sparsity: float) -> Tensor:
    """Of all blocks those of greatest sum, of equals the earlier ones.

    A block at an end counts and costs as a whole one: a kernel fills it up.

    Args:
        saliency: (out, in), not negative.
        block: rows and columns.
        sparsity: share of the blocks that goes; as many as `lost` says.
    """
    return spread_blocks(keep_largest(block_sums(saliency, block), sparsity), block, saliency.shape)


def block_sums(scores: Tensor, block: tuple[int, int]) -> Tensor:
    """(out, in) to (tiles, blocks of a tile)."""
    from torch.nn.functional import pad

    (rows, columns), (tall, wide) = scores.shape, block
    whole = pad(scores, (0, -columns % wide, 0, -rows % tall))
    return whole.reshape(-(-rows // tall), tall, -1, wide).sum(dim=(1, 3))


def keep_first(saliency: Tensor, count: Tensor) -> Tensor:
    """The entries of greatest saliency along the last dimension, of equals the earlier ones.

    Args:
        saliency: (..., n).
        count: how many, broadcast against (..., 1).
    """
    import torch

    order = saliency.argsort(dim=-1, descending=True, stable=True)
    among = (torch.arange(order.shape[-1], device=order.device) < count).expand(order.shape)
    return torch.zeros_like(among).scatter(-1, order, among)


# --- levels -----------------------------------------------------------------------------------------------------------


def chosen_by(
    params: PruningParams,
    saliency: Tensor,
    single: Callable[[Tensor, float], Tensor],
    before: Tensor | None = None,
) -> list[Tensor]:
    """What each amount keeps of a weight whose every element has a score.

    Args:
        saliency: (out, in), not negative; squares of it add up in blocks.
        single: chooses single weights, given the scores and the share that goes.
        before: (out, in) bool, what an earlier pruning left; the rest goes first.
    Returns:
        (out, in) bool for each of `params.amounts`.
    """
    keeps = []
    for amount in params.amounts:
        if amount.block is not None:
            keep = keep_blocks(saliency.double().square(), amount.block, amount.share)
        else:
            scores = saliency if before is None else saliency.where(before, -1)
            keep = single(scores, amount.share) if amount.pattern is None else keep_pattern(scores, amount.pattern)
        keeps.append(keep if before is None else keep & before)
    return keeps


def pruned_levels(
    params: PruningParams, weight: Tensor, keeps: Sequence[Tensor], *, importance: Tensor | None = None
) -> list[Level]:
    """Levels of a weight that keep what each mask keeps, as it is or rounded to the nearest point of a grid.

    Args:
        weight: (out, in), finite.
        keeps: (out, in) bool, one for each of `params.amounts`.
        importance: (out, in), what squared errors of rounding count by, where grids are searched; None if the same.
    Returns:
        in the order of `params.level_names`.
    Raises:
        NotFinite: a kept weight is too large for a float16 scale.
    """
    names = iter(params.level_names())
    levels = []
    for amount, keep in zip(params.amounts, keeps, strict=True):
        said = {"method": params.method, **amount.recipe}
        if params.then is None:
            levels.append(mask_level(next(names), said, weight, keep))
            continue
        for bits in params.then.bits:
            scale, zero, codes = rounded(weight * keep, bits, params.then, importance)
            levels.append(rounded_level(next(names), said, codes, params.then, bits, keep=keep, scale=scale, zero=zero))
    return levels


def grid_recipe(then: Then, bits: int) -> dict[str, Any]:
    """What a level says of the grids of its kept weights."""
    return {"bits": bits, "group_size": then.group_size, "sym": then.sym, "grid": then.grid}


def rounded_level(
    name: str,
    recipe: Mapping[str, Any],
    codes: Tensor,
    then: Then,
    bits: int,
    *,
    keep: Tensor,
    scale: Tensor,
    zero: Tensor,
) -> Level:
    """A level of kept weights on grids, in blocks if its recipe says so.

    Args:
        codes: (out, in).
        keep: (out, in) bool.
        scale, zero: (out, groups).
    Raises:
        NotFinite: a scale is too large for float16.
    """
    encode = masked_grid_level if recipe.get("block") is None else block_grid_level
    return encode(name, {**recipe, **grid_recipe(then, bits)}, codes, keep=keep, scale=scale, zero=zero)


def rounded(weight: Tensor, bits: int, then: Then, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and zero point (out, groups), and codes (out, in), of a pruned weight with its zeros."""
    from torch.nn.functional import pad

    from layerwise.stages.compress.grid_search import search

    rows, columns = weight.shape
    size, max_code = then.columns_per_group(columns), 2**bits - 1
    fill = (0, -columns % size)  # zeros, which change no grid
    W = pad(weight.detach().double(), fill).view(rows, -1, size)
    if then.grid == "minmax":
        scale, zero = fit(W.amin(2), W.amax(2), max_code, then.sym)
    else:
        weigh = None if importance is None else pad(importance.double(), fill).view(rows, -1, size).movedim(2, 0)
        scale, zero = search(W.movedim(2, 0), bits, sym=then.sym, importance=weigh)
    codes = quantize(W, scale[..., None], zero[..., None], max_code).view(rows, -1)[:, :columns]
    return scale, zero, codes
