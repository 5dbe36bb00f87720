"""`block_inputs`: the hidden states before every block and after the last, (sequences, length, width), of the dense
model.

For methods that look at a whole block: its inputs, and as its target the inputs of the next one. They are kept on disk
as they are, in the dtype that the model is computed in, one file for each block and shard, and memory-mapped: blocks
plus one, times tokens, times width.
"""

from __future__ import annotations

from typing import NoReturn

from layerwise.stages.calibrate import Statistic


def _never(*of: object) -> NoReturn:
    raise AssertionError("hidden states are neither measured nor merged")


BLOCK_INPUTS = Statistic("hidden", _never, _never, _never, size_bytes=lambda unit: 0)
