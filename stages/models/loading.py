"""Loads a network of whatever family its source is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerwise.stages.contract import ModelSource
    from layerwise.stages.models.in_blocks import InBlocks


def load_network(source: ModelSource, *, block_by_block: bool = False) -> InBlocks:
    """The network of a source, with the levels of a compressed model laid over it.

    Args:
        source: the model.
        block_by_block: its blocks are run one after another, so that a large one need not be loaded whole.
    Raises:
        UnsupportedModel: it cannot be loaded or taken apart.
        UsageError: it is to be computed on a GPU and there is none, or code of the user's fails.
    """
    if source.python is not None:
        from layerwise.stages.models.classifier import Classifier

        return Classifier.load(source)
    from layerwise.stages.models.causal_lm import CausalLM

    return CausalLM.load(source, block_by_block=block_by_block)
