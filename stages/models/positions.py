"""How many tokens a model takes at once, and how many it knows, read from its configuration alone.

Left out: models without such a limit (recurrences), and families that keep some positions for themselves; the few that
a model lacks then are told by `CausalLM`, when it is given them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layerwise.errors import DataError

DEFAULT_LENGTH = 2048
"""Tokens of a sequence where neither the workflow nor the model says less."""

NAMES = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "model_max_length")
"""Under which families keep it, in `config.json`."""

PARTS = ("text_config", "llm_config", "language_config")
"""Where the text model stands in the configuration of one that takes images, too."""


def positions(folder: Path) -> int | None:
    """The most tokens that a model takes at once; None if it does not say.

    Args:
        folder: holds its config.json.
    """
    return _number(folder, NAMES)


def _number(folder: Path, names: Iterable[str]) -> int | None:
    """The first of some settings that a configuration has, of the text model before the whole."""
    try:
        config: Any = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):  # whoever loads the model says so
        return None
    if not isinstance(config, dict):
        return None
    nested = [config[part] for part in PARTS if isinstance(config.get(part), dict)]
    found = (part.get(name) for part in (*nested, config) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def vocabulary(folder: Path) -> int | None:
    """How many tokens a model knows; None if it does not say.

    Args:
        folder: holds its config.json.
    """
    return _number(folder, ("vocab_size",))


def length_for(name: str, wanted: int | None, folder: Path) -> int:
    """Tokens of one sequence of a text.

    Args:
        name: of the text in the workflow's `data:` section.
        wanted: what the workflow says; None for as many as the model takes, up to DEFAULT_LENGTH.
        folder: the model's.
    Raises:
        DataError: more than the model takes.
    """
    most = positions(folder)
    if wanted is None:
        return DEFAULT_LENGTH if most is None else min(DEFAULT_LENGTH, most)
    if most is not None and wanted > most:
        raise DataError(
            f"data.{name}: sequences of {wanted} tokens, but {folder.name} takes at most {most} "
            "(its config.json says so)",
            hint=f"set sequence_length to {most} or less; left out, it follows the model",
        )
    return wanted
