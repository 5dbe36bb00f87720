"""Other weights in a network for a while: it computes with them, and then is itself again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from layerwise.stages.models.installed import installed, laid_out


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mixtral"])  # tied, transposed, stacked
def test_a_network_computes_with_other_weights_and_then_is_itself_again(
    load_model: Callable[[str], Any], family: str
) -> None:
    lm = load_model(family)
    ids = torch.arange(20).reshape(2, 10)
    before, dense = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}, lm.logits(ids)
    generator = torch.Generator().manual_seed(0)
    chosen = [unit for unit in lm.units if unit.block in (None, 1) and unit.view.index in ((), (0,), (3,))]
    weights = {unit: torch.randn(unit.shape, generator=generator) / 8 for unit in chosen}
    other = copy.deepcopy(lm.model)
    for unit, weight in weights.items():
        unit.view.write(other.get_parameter(unit.view.tensor).data, weight)
    with torch.no_grad():
        expected = other(input_ids=ids, use_cache=False).logits
    with installed(lm, {unit: laid_out(lm, unit, weight) for unit, weight in weights.items()}):
        assert torch.equal(lm.logits(ids), expected)
    assert not torch.allclose(expected, dense, atol=1e-2)

    with (
        pytest.raises(ZeroDivisionError),
        installed(lm, {unit: laid_out(lm, unit, weight) for unit, weight in weights.items()}),
    ):
        raise ZeroDivisionError
    assert torch.equal(lm.logits(ids), dense)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
