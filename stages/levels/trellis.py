"""`trellis`: sequences of weights on a bitshift trellis, as a rule of a weight turned on both sides.

    stream   uint8 (bytes,)    the bits of all sequences, layerwise.kernels.trellis_code
    scale    float32 (1,), or float16 (out,): one for each row
    mask     what an earlier pruning left, if there was one, as of `mask`; such a weight is not turned

With C the values of the stream's states, the weight is R_outᵀ (scale · C) R_in; the rotations are computed from a seed
(layerwise.kernels.hadamard) and take no bytes. All is additions and products of single numbers in a fixed order: a
level decodes to the same bits on every device. Scales are plain floats that nothing else depends on, so whoever tunes a
level may replace them.

Source: QTIP, arXiv:2406.11235.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerwise.errors import NotFinite
from layerwise.stages.levels.level import Level

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.kernels.trellis_code import Tiles


def trellis_level(
    name: str,
    recipe: Mapping[str, Any],
    shape: tuple[int, int],
    stream: Tensor,
    *,
    scale: Tensor,
    keep: Tensor | None = None,
) -> Level:
    """Encode a stream and its scales as a level.

    Args:
        name: the level's.
        recipe: with `method`, `bits`, `state_bits`, `columns` (of a tile) and `seed` (of the rotations; None for a
            weight that is not turned); `encoding` is added.
        shape: (out, in).
        stream: (bytes,), uint8.
        scale: (1,) for the whole weight or (out,) for each row of the turned one; of the value 1.
        keep: (out, in) bool, what an earlier pruning left.
    Raises:
        NotFinite: a scale is too large for its dtype.
    """
    import torch

    from layerwise.stages.levels.index import store_index

    stored = scale.to(torch.float32 if len(scale) == 1 else torch.float16)
    if not stored.isfinite().all():
        raise NotFinite(f"level {name}: the weights are too large for a {str(stored.dtype)[6:]} scale")
    tensors, index = ({}, {}) if keep is None else store_index(keep)
    tensors |= {"stream": stream, "scale": stored}
    return Level(name, {"encoding": "trellis", **recipe, **index}, shape, tensors)


def tiles_of(level: Level) -> Tiles:
    """How its weight is cut into sequences."""
    from layerwise.kernels.trellis_code import Tiles

    recipe = level.recipe
    return Tiles(*level.shape, recipe["columns"], recipe["bits"], recipe["state_bits"])


class Trellis:
    """See the module."""

    @staticmethod
    def decode(level: Level) -> Tensor:
        from layerwise.kernels.hadamard import unrotate_both
        from layerwise.stages.levels.mask import kept

        W = tiles_of(level).decode(level.tensors["stream"])
        W *= level.tensors["scale"].float()[:, None]
        if level.recipe["seed"] is not None:
            W = unrotate_both(W, level.recipe["seed"])
        return W * kept(level) if "mask" in level.tensors else W

    @staticmethod
    def nominal_bits(level: Level) -> float:
        return float(level.n_weights * level.recipe["bits"])

    @staticmethod
    def stored_bits(level: Level) -> int:
        from layerwise.stages.levels.index import index_bits

        mask = index_bits(level) if "mask" in level.tensors else 0
        scale = level.tensors["scale"]
        return int(8 * level.tensors["stream"].numel() + 8 * scale.element_size() * scale.numel() + mask)

    @staticmethod
    def parameters(level: Level) -> int:
        from layerwise.stages.levels.mask import kept

        return int(kept(level).sum()) if "mask" in level.tensors else level.n_weights

    @staticmethod
    def pack(level: Level) -> None:
        return None

    @staticmethod
    def label(recipe: Mapping[str, Any]) -> str:
        return f"no kernel: trellis {recipe['bits']:g} bits"
