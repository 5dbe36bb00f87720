"""Gradient checkpointing: the same gradients, from less that is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from layerwise.stages.recover.losses import divergence
from layerwise.stages.recover.training import Speaker
from layerwise.stages.recover.training_params import TrainingParams


def gradients(network: Any, ids: torch.Tensor, *, checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Of weights that are not the network's own, and the bytes that the pass forward keeps for them."""
    given = {"method": "made up", "checkpointing": checkpointing, "loss": {"kl": 1.0, "squarehead": 1.0}}
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for unit in network.units:
        if unit.block is not None:
            weight = network.weight(unit).float()
            tensors[unit.name] = (weight + 0.05 * torch.randn(weight.shape, generator=generator)).requires_grad_(True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = Speaker(network, TrainingParams.model_validate(given)).answer(ids, tensors)
    with torch.no_grad():
        dense = network.logits(ids)
    loss = divergence(answer.logits, dense) + sum(state.square().mean() for state in answer.hidden)
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {name: one for name, one in zip(tensors, found, strict=True) if one is not None}, sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "granitemoe", "gemma2"])
def test_gradients_are_the_same_and_less_is_kept(load_model: Callable[[str], Any], family: str) -> None:
    network = load_model(family)
    ids = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    plain, much = gradients(network, ids, checkpointing=False)
    again, little = gradients(network, ids, checkpointing=True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert any(bool(one.any()) for one in plain.values())
    assert little < much / 2
    assert not any("forward" in vars(block) for block in network.blocks)
