"""`calibrate`: what is learned of the layers from text before they are compressed.

Each statistic is one file and one line in `STATISTICS`. Other packages join through the entry point group
`layerwise.statistics`, with the same `module:object` text. Nothing here imports torch before it works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from layerwise.stages.registry import lookup, names

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.models.network import Unit

STATISTICS = {
    "hessian": "layerwise.stages.calibrate.hessian:HESSIAN",
    "channels": "layerwise.stages.calibrate.channels:CHANNELS",
    "fisher": "layerwise.stages.calibrate.fisher:FISHER",
    "block_inputs": "layerwise.stages.calibrate.block_inputs:BLOCK_INPUTS",
}

STATISTIC_GROUP = "layerwise.statistics"


@dataclass(frozen=True)
class Statistic:
    """One kind of statistic.

    Args:
        of: what it is taken of: `inputs`, those of a unit, (rows, in), one row for each token that reaches it;
            `gradients`, that of the loss of one sequence to a unit's weight, (out, in); `hidden`, the hidden states
            before each block, which are kept as they are.
        measure: of one batch, a tensor; not of `hidden`. Of a convolution in groups it is called for each group.
        merge: of two such tensors, that of both batches together. Shards are merged in their order.
        neutral: what stands for a unit that nothing multiplies (an embedding that is looked up), given the number of
            tokens.
        size_bytes: what it takes of a unit on disk; of `hidden`, nothing here.
    """

    of: Literal["inputs", "gradients", "hidden"]
    measure: Callable[[Tensor], Tensor]
    merge: Callable[[Tensor, Tensor], Tensor]
    neutral: Callable[[Unit, int], Tensor]
    size_bytes: Callable[[Unit], int]


def statistic_names() -> list[str]:
    """Every statistic that a method may need."""
    return names(STATISTICS, STATISTIC_GROUP)


def find_statistic(name: str) -> Statistic:
    """The statistic of that name.

    Raises:
        UsageError: nobody offers it; names the nearest known one.
    """
    statistic: Statistic = lookup(name, STATISTICS, group=STATISTIC_GROUP, kind="statistic")
    return statistic


def in_order(wanted: Sequence[str]) -> list[str]:
    """Names of statistics, each once, in the order of the table."""
    known = statistic_names()
    return sorted(set(wanted), key=lambda name: known.index(name) if name in known else len(known))
