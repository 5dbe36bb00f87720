"""Models whose blocks are read when they run: the same numbers, and never more than one block in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.stages.contract import ModelSource
from layerwise.stages.models import streamed
from layerwise.stages.models.causal_lm import CausalLM
from layerwise.stages.models.loading import load_network
from layerwise.stages.models.survey import survey_model

IDS = torch.arange(24).reshape(3, 8) * 7 % 256


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "STREAM_BYTES", 0)


def has_memory(block: nn.Module) -> bool:
    return any(parameter.data.untyped_storage().size() for parameter in block.parameters())


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_streamed_model_is_the_model(model_folder: Callable[[str], Path], family: str, dtype: str) -> None:
    source = ModelSource(model_folder(family), dtype)
    whole, one_by_one = load_network(source), load_network(source, block_by_block=True)
    assert whole.streamed is None
    assert one_by_one.streamed is not None
    assert torch.equal(one_by_one.logits(IDS), whole.logits(IDS))
    assert one_by_one.units == whole.units
    assert one_by_one.parents == whole.parents
    stream = one_by_one.begin(IDS)
    hidden = stream.hidden
    for block in range(one_by_one.n_blocks):
        hidden = one_by_one.run_block(block, hidden, stream)
        assert [has_memory(other) for other in one_by_one.blocks] == [
            other == block for other in range(one_by_one.n_blocks)
        ]
    assert torch.equal(one_by_one.end(hidden, stream), whole.logits(IDS))


@pytest.mark.usefixtures("everything_is_large")
def test_calling_the_parts_around_the_blocks_reads_no_block(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_network(ModelSource(model_folder("llama")), block_by_block=True)
    network.bring(1)
    read: list[Any] = []
    monkeypatch.setattr(streamed.Checkpoint, "read", lambda self, name: read.append(name))
    stream = network.begin(IDS)
    network.end(stream.hidden, stream)
    assert not read


@pytest.mark.usefixtures("everything_is_large")
def test_the_survey_of_a_streamed_model_is_that_of_the_whole(
    model_folder: Callable[[str], Path], any_family: str
) -> None:
    """Mixtures whose experts are stacked when they are loaded are loaded whole, and that is the answer, too."""
    source = ModelSource(model_folder(any_family))
    assert survey_model(source) == survey_model(source, CausalLM.load(source))
