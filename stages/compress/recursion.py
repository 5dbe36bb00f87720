"""The recursion of GPTQ and SparseGPT: column by column, those still to come making up for each error.

What a column leaves to those after it is passed on lazily: at once to the few beside it, to the rest of its block by
matrix products over halves, and beyond the block when the block is done. The sums are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import AliasChoices, Field

from layerwise.errors import NotFinite
from layerwise.stages.compress.grid import check_finite

if TYPE_CHECKING:
    from torch import Tensor

DampPercent = Annotated[
    float,
    Field(
        gt=0,
        lt=1,
        validation_alias=AliasChoices("damp_percent", "percdamp", "dampening_frac", "rel_damp"),
        description="share of the Hessian's mean diagonal that is added to its diagonal",
    ),
]
"""A method's parameter of that name."""

DAMP_STEP = 0.01
LEAF = 8
"""Columns that are corrected one by one; more are halved, and one half corrects the other by a matrix product."""


def check_layer(weight: Tensor, hessian: Tensor) -> None:
    """Raise NotFinite if there is a NaN or Inf, or if the Hessian, (in, in) or (groups, in, in), is zero."""
    check_finite("weight", weight)
    check_finite("Hessian", hessian)
    if not hessian.diagonal(dim1=-2, dim2=-1).any():
        raise NotFinite("the Hessian is zero: no calibration token reached this layer", hint="calibrate on more text")


def inverse_factor(H: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """The upper triangular U with UᵀU = (H + damping)⁻¹, whose rows are the corrections.

    With J for reversal and L Lᵀ = J H J, U = J L⁻¹ J.

    Args:
        H: (in, in), float64 or float32.
        damp_percent: share of the mean diagonal to add; raised in steps of 0.01 as long as H is not positive definite.
    Returns:
        U, and the share that was added.
    Raises:
        NotFinite: no share below 1 is enough.
    """
    import torch

    used, mean = damp_percent, H.diagonal().mean()
    while used < 1:
        reversed_H = H.flip(0, 1)
        reversed_H.diagonal().add_(used * mean)
        L, failed = torch.linalg.cholesky_ex(reversed_H)
        if not failed and L.isfinite().all():
            eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
            return torch.linalg.solve_triangular(L, eye, upper=False).flip(0, 1), used
        used = round(used + DAMP_STEP, 9)
    raise NotFinite("the Hessian is not positive definite, whatever the damping", hint="calibrate again")


def blocks(columns: int, block_size: int, groups: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """Cut the columns into blocks, none of which ends inside a group that started in it.

    So whenever a group starts, its columns carry all corrections, or get them within the block.

    Args:
        groups: sizes of groups of neighbours, of every kind that there is.
    """
    start = 0
    while start < columns:
        end = min(start + block_size, columns)
        if end < columns:
            end = _last_cut(start, end, groups)
        yield start, end
        start = end


def pass_on(
    flat: Tensor,
    U: Tensor,
    column: Callable[[int], Tensor],
    cuts: Sequence[tuple[int, int]],
    groups: Sequence[int] = (),
) -> None:
    """Go through all columns.

    Args:
        flat: (in, ...), the weight with columns as rows, changed in place: a column carries all corrections when its
            turn comes, and so do all columns of its group when the group's first has its turn.
        U: (in, in), from `inverse_factor`.
        column: settles column j, and gives E_j = (W_j - Q_j) / U_jj, (...,); it may change `flat[j]`.
        cuts: from `blocks`.
        groups: as of `blocks`.
    Raises:
        NotFinite: corrections overflow.
    Source: GPTQ, arXiv:2210.17323, algorithm 1, and SparseGPT, arXiv:2301.00774, algorithm 1. The outer loop is theirs
        over blocks, `err` is E, U is (H⁻¹) after the Cholesky factorisation.
    """
    import torch

    def halves(err: Tensor, start: int, end: int) -> None:
        """Columns start to end - 1, and what they leave to each other: W -= E [H⁻¹]_j, within the block."""
        if end - start <= LEAF:
            for j in range(start, end):
                err[j - start] = column(j)
                flat[j + 1 : end].addr_(U[j, j + 1 : end], err[j - start], alpha=-1)
            return
        middle = _last_cut(start, (start + end) // 2, groups)
        halves(err[: middle - start], start, middle)
        flat[middle:end].addmm_(U[start:middle, middle:end].T, err[: middle - start], alpha=-1)
        halves(err[middle - start :], middle, end)

    for start, end in cuts:
        err = torch.empty_like(flat[start:end])
        halves(err, start, end)
        flat[end:].addmm_(U[start:end, end:].T, err, alpha=-1)  # and beyond it
    if not flat.isfinite().all():
        raise NotFinite("the corrections overflow: the Hessian is close to singular", hint="raise damp_percent")


def _last_cut(start: int, end: int, groups: Sequence[int]) -> int:
    """The last column up to `end` before which no group is cut that started behind `start`.

    There is one: the first column where any group starts, or `end` itself if none does.
    """
    return next(
        cut for cut in range(end, start, -1) if all(not cut % size or cut - cut % size <= start for size in groups)
    )
