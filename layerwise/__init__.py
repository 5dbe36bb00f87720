"""layerwise spends a compression budget layer by layer.

The three ways in are the command line (`layerwise run flow.yaml`), the results store (`layerwise.results`) and the
solver library (`layerwise.solvers`). This module loads nothing heavy, so `import layerwise.solvers` stays free of
torch and Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel

__version__ = "0.1.0"


def load(path: str | os.PathLike[str], dtype: str = "float32") -> PreTrainedModel:
    """A folder that was exported with `format: native`, as a transformers model with decoded weights.

    The folder holds all that it takes: neither the dense model nor code of its own is needed.

    Args:
        path: the folder.
        dtype: that the model computes in.
    Returns:
        the model, in evaluation mode; what was dropped is left out of it.
    Raises:
        CorruptArtifact: it is no such folder, or damaged.
        UnsupportedModel: its configuration is that of no causal language model.
    """
    from pathlib import Path

    from layerwise.stages.export.native import load as load_native

    return load_native(Path(path), dtype).model
