"""Lets the weights of a block that are still to be compressed make up for those that are, by gradient descent.

What `layerwise.stages.compress.residual` does for one layer in closed form, this does for all that is left of a block:
before each step their weights move until the block answers as it does in the dense model, on the inputs that the
compressed prefix leaves. A level is then made of what its weight has become.

Source: QuIP#, arXiv:2402.04396, section 5: tuning within a block, weight by weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from layerwise.stages.compress.tuning import Free, Tuned, tune

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.compress.block_run import BlockRun

STEP_SIZE = 0.01
"""Of the first step, as a share of the root mean square of a weight. KL of the demo model with levels of 2 bits and 50
steps for each step of a block: 0.317 with 0.003, 0.278 with 0.01 (0.301 with the residual alone, 0.414 with none)."""

BATCH_SIZE = 8


class Moving:
    """A weight that is still to be compressed; a part of `tuning.tune`.

    Args:
        name: of its unit.
        weight: (out, in); not changed.
        keep: (out, in) bool, what an earlier pruning left; the rest stays zero.
    """

    def __init__(self, name: str, weight: Tensor, keep: Tensor | None = None) -> None:
        self.name, self.keep = name, keep
        self.weight = weight.detach().float().clone()
        self._step_size = STEP_SIZE * float(self.weight.square().mean().sqrt())

    @property
    def free(self) -> list[Free]:
        """All of it."""
        return [Free(self.weight, self._step_size, rule="adam")]

    def tensors(self) -> dict[str, Tensor]:
        """What the block runs with."""
        return {self.name: self.weight if self.keep is None else self.weight * self.keep}


class Settled:
    """Weights that are compressed; nothing of them moves.

    Args:
        weights: by unit, as they decode.
    """

    free: Sequence[Free] = ()

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = dict(weights)

    def tensors(self) -> dict[str, Tensor]:
        """What the block runs with."""
        return self._weights


def make_up(
    block: BlockRun, settled: Mapping[str, Tensor], moving: Sequence[Moving], *, steps: int, seed: int
) -> Tuned:
    """Move the weights that are left; the best that were found stand in them afterwards.

    Args:
        block: with the inputs that the prefix leaves and the answers of the dense model.
        settled: weights that stay, by unit.
        moving: weights that are changed in place.
        steps: of gradient descent.
        seed: of the order of the sequences.
    Raises:
        NotFinite: NaN or Inf in the block's inputs or answers, or in a loss on the way.
    """
    return tune(block, [Settled(settled), *moving], steps=steps, batch_size=BATCH_SIZE, seed=seed)
