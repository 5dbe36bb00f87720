"""Gradient checkpointing of blocks whose weights are not their own: a block runs again, with the weights that it had,
when its gradients are wanted.

The model runs with other tensors for some parameters (`torch.func.functional_call`), and has its own again by the time
that gradients are taken; so each block keeps hold of those that it was given.

Source: Training deep nets with sublinear memory cost, arXiv:1604.06174, with a segment for each block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let blocks keep nothing but their inputs while a model runs forward; blocks that are left out stay so."""
    changed = [block for block in blocks if "forward" not in vars(block)]
    for block in changed:
        block.forward = partial(_forward, _Plain(block))
    try:
        yield
    finally:
        for block in changed:
            del block.forward


class _Plain(nn.Module):
    """A block with the forward pass of its class, whatever stands in the place of its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


def _forward(plain: _Plain, *args: Any, **kwargs: Any) -> Any:
    given: dict[str, Tensor] = dict(plain.named_parameters(remove_duplicate=False))

    def run(*inputs: Any, **more: Any) -> Any:
        return functional_call(plain, given, inputs, more)

    return checkpoint(run, *args, use_reentrant=False, **kwargs)
