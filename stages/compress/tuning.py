"""Tunes what an encoding leaves free, a block at a time, until the block answers as it does in the dense model.

The engine knows no encoding. It is given parts, each of which turns free parameters into the weights of units (or any
other parameters of the block, such as norms), differentiably; where a weight is rounded, a part passes the gradient
straight through (`round_through`). The loss is the mean squared difference of the block's output. Free parameters move
by the sign of their gradient, or by Adam where their scale is unknown, and the step size falls linearly to zero.

Losses of single batches are too noisy to compare: the best parameters are those with the least loss on the same
sequences, looked at before the first step and after every tenth of the steps. So the result is never worse there than
what the parts began with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from layerwise.errors import NotFinite

if TYPE_CHECKING:
    from layerwise.stages.compress.block_run import BlockRun

CHECKS = 10
"""How often the loss is looked at."""
CHECKED_BATCHES = 4
"""Batches of sequences, spread over all, that it is looked at on; 3-7 % of the time of the steps."""


@dataclass(frozen=True)
class Free:
    """A tensor that may move.

    Args:
        tensor: a leaf; changed in place.
        step_size: of the first step, in the tensor's own unit.
        bounds: least and greatest value.
        rule: `sign` steps by the sign of the gradient, as SignRound does; `adam` for what has no natural unit.
    """

    tensor: Tensor
    step_size: float
    bounds: tuple[float, float] | None = None
    rule: Literal["sign", "adam"] = "sign"


class Part(Protocol):
    """What an encoding leaves free of one unit or of several."""

    @property
    def free(self) -> Sequence[Free]:
        """What moves."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """What the block runs with, differentiable in `free`: by unit (out, in), or by the name of a parameter."""
        ...


@dataclass(frozen=True)
class Tuned:
    """What tuning did.

    Args:
        before, after: mean squared error of the block's output on the sequences that are looked at.
        step: after how many steps the best was found; 0 if nothing was better than the start.
    """

    before: float
    after: float
    step: int


def tune(block: BlockRun, parts: Sequence[Part], *, steps: int, batch_size: int, seed: int) -> Tuned:
    """Move what is free; leaves the best that was found in place.

    Args:
        block: with its inputs and what it should answer.
        parts: what it runs with; everything else stays as it is.
        steps: of gradient descent.
        batch_size: sequences for each step; all, if there are fewer.
        seed: of the order in which sequences are taken, with the number of the block.
    Raises:
        NotFinite: NaN or Inf in the block's inputs, in its dense answers, or in a loss on the way.
    Source: SignRound, arXiv:2309.05516, algorithm 1.
    """
    for what, tensor in (("inputs", block.inputs), ("answers", block.outputs)):
        if not tensor.isfinite().all():
            raise NotFinite(f"the {what} of block {block.index} have NaN or Inf among them", hint="calibrate again")
    free = [one for part in parts for one in part.free]
    leaves = [one.tensor.requires_grad_(True) for one in free]
    by_adam = [{"params": [one.tensor], "lr": one.step_size} for one in free if one.rule == "adam"]
    adam = torch.optim.Adam(by_adam) if by_adam else None
    batches = _batches(len(block.inputs), batch_size, seed * 1_000_003 + block.index)
    checked = _spread(len(block.inputs), batch_size)
    before = least = _loss(block, parts, checked)
    best, best_step = [leaf.detach().clone() for leaf in leaves], 0
    for step in range(steps):
        remaining = 1 - step / steps  # the step size falls linearly
        error = block.answer(_merged(parts), batch := next(batches)).float() - block.target(batch).float()
        gradients = torch.autograd.grad(error.square().mean(), leaves, allow_unused=True)
        with torch.no_grad():
            for one, gradient in zip(free, gradients, strict=True):
                if one.rule == "sign" and gradient is not None:  # V ← V - lr · sign(dL/dV)
                    one.tensor.sub_(gradient.sign(), alpha=one.step_size * remaining)
                one.tensor.grad = gradient if one.rule == "adam" else None
            if adam is not None:
                for group, one in zip(adam.param_groups, (one for one in free if one.rule == "adam"), strict=True):
                    group["lr"] = one.step_size * remaining
                adam.step()
            for one in free:
                if one.bounds is not None:
                    one.tensor.clamp_(*one.bounds)
        if (step + 1) * CHECKS // steps > step * CHECKS // steps:
            loss = _loss(block, parts, checked)
            if loss < least:
                least, best_step = loss, step + 1
                best = [leaf.detach().clone() for leaf in leaves]
    with torch.no_grad():
        for leaf, value in zip(leaves, best, strict=True):
            leaf.copy_(value)
            leaf.requires_grad_(False)
            leaf.grad = None
    return Tuned(before, least, best_step)


def round_through(values: Tensor) -> Tensor:
    """Rounded to whole numbers; the gradient passes as if it were not (straight-through estimator)."""
    return values.detach().round() + (values - values.detach())  # exactly whole: the second term is zero


def _merged(parts: Sequence[Part]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part.tensors().items()}


def _batches(n_sequences: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches without end: each round takes the sequences in an order of its own; a rest too small is left out."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, n_sequences)
    while True:
        order = torch.randperm(n_sequences, generator=generator)
        yield from order[: n_sequences - n_sequences % size].split(size)


def _spread(n_sequences: int, batch_size: int) -> Sequence[Tensor]:
    """The sequences that losses are compared on, spread over all, in batches."""
    wanted = min(n_sequences, CHECKED_BATCHES * batch_size)
    spread: Sequence[Tensor] = torch.linspace(0, n_sequences - 1, wanted).round().long().split(batch_size)
    return spread


@torch.no_grad()
def _loss(block: BlockRun, parts: Sequence[Part], batches: Sequence[Tensor]) -> float:
    tensors = _merged(parts)
    total, count = 0.0, 0
    for batch in batches:
        error = block.answer(tensors, batch).float() - block.target(batch).float()
        total += error.double().square().sum().item()
        count += error.numel()
    if not total < float("inf"):
        raise NotFinite(f"the answers of block {block.index} are no longer finite", hint="make the step size smaller")
    return total / count
