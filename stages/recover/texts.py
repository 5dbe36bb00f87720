"""A text that repairs read."""

from __future__ import annotations

from dataclasses import dataclass

from layerwise.stages.data.text import Tokens


@dataclass(frozen=True)
class Text:
    """One of the workflow's texts, cut into sequences.

    Args:
        name: its key in the workflow's `data:` section.
        tokens: the sequences.
    """

    name: str
    tokens: Tokens
