"""`influence`: how much a block or half-block turns the hidden state, 1 - cosine of before and after.

What turns it least is what ShortGPT removes (arXiv:2403.03853, equation 1, of whole blocks). Of a half-block, before is
the hidden state that it is added to: what its block answers without it and the half-blocks behind it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

from layerwise.errors import NotFinite
from layerwise.stages.contract import ModelSource
from layerwise.stages.data.text import Tokens
from layerwise.stages.evaluate.scoring import Measurement

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.models.in_blocks import InBlocks


def measure_influence(
    source: ModelSource, *, tokens: Tokens, wanted: int | None, batch_tokens: int
) -> dict[str, Measurement]:
    """The influence of every parent of a model, a mean over tokens, with its standard error over sequences.

    Args:
        source: the model.
        tokens: the text.
        wanted: tokens of it to use, from its beginning, at least one sequence; all if None.
        batch_tokens: that run at a time.
    Raises:
        NotFinite: a hidden state has NaN or Inf.
    """
    from layerwise.stages.data.text import load_sequences
    from layerwise.stages.models.loading import load_network

    network, sequences = load_network(source), load_sequences(tokens)
    length = network.predictions(sequences)
    if wanted is not None:
        sequences = sequences[: max(1, wanted // length)]
    return influence(network, sequences, batch_size=max(1, batch_tokens // length))


def influence(network: InBlocks, sequences: Tensor, *, batch_size: int) -> dict[str, Measurement]:
    """The same of a loaded network, (sequences, ...)."""
    import torch

    seen: dict[str, list[Tensor]] = defaultdict(list)
    halves = {block: [half for half in network.parents if half.block == block] for block in range(network.n_blocks)}
    for ids in sequences.split(batch_size):
        stream = network.begin(ids.to(network.device))
        hidden = stream.hidden
        for block, parents in halves.items():
            states: dict[str, Tensor] = {}
            after = network.run_block(block, hidden, stream)
            inside = [parent for parent in parents if parent.role != "block"]
            for number, half in enumerate(inside):
                with network.without(inside[number:]):
                    states[half.name] = network.run_block(block, hidden, stream)
            following = [*(states[half.name] for half in inside[1:]), after]
            for half, behind in zip(inside, following, strict=True):
                seen[half.name].append(_turned(states[half.name], behind))
            for parent in parents:
                if parent.role == "block":
                    seen[parent.name].append(_turned(hidden, after))
            hidden = after
    found: dict[str, Measurement] = {}
    for name, parts in seen.items():
        values = torch.cat(parts).double().cpu()
        if not values.isfinite().all():
            raise NotFinite(f"the hidden state has NaN or Inf before or after {name}")
        stderr = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
        tokens = len(values) * network.predictions(sequences)
        found[name] = {"mean": float(values.mean()), "stderr": stderr, "n_tokens": tokens}
    return found


def _turned(before: Tensor, after: Tensor) -> Tensor:
    """1 - cosine of the angle between two hidden states, (batch, ..., width): a mean for each entry of the batch."""
    import torch

    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    return (1 - cosine).flatten(1).mean(1) if cosine.dim() > 1 else 1 - cosine
