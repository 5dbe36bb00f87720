"""Counters: shared by the launches on a stream, never between a graph and what does not clear it. No GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from layerwise.kernels import split_k
from layerwise.kernels.split_k import LEAST_COUNTERS, counters

GPU = torch.device("cuda:0")


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Which stream is current and whether it is captured, as torch would say it; tensors are made on the processor."""
    state = SimpleNamespace(stream=7, capturing=False)
    zeros = torch.zeros

    def made(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return zeros(*shape, dtype=dtype)

    monkeypatch.setattr(split_k, "_COUNTERS", {})
    monkeypatch.setattr(split_k, "_OUTGROWN", [])
    monkeypatch.setattr(torch, "zeros", made)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    yield state


def test_launches_on_one_stream_share_and_others_do_not(state: SimpleNamespace) -> None:
    first = counters(1, GPU)
    assert counters(LEAST_COUNTERS, GPU) is first
    assert counters(1, torch.device("cuda")) is first
    assert not first.any()
    state.stream = 8
    assert counters(1, GPU) is not first


def test_a_capture_uses_what_is_there(state: SimpleNamespace) -> None:
    first = counters(1, GPU)
    state.capturing = True
    assert counters(1, GPU) is first


@pytest.mark.parametrize("before", [0, 1])
def test_what_is_made_during_a_capture_is_given_to_nobody_else(state: SimpleNamespace, before: int) -> None:
    kept = [counters(1, GPU) for _ in range(before)]
    state.capturing = True
    inside = counters(2 * LEAST_COUNTERS, GPU)
    assert counters(2 * LEAST_COUNTERS, GPU) is not inside
    state.capturing = False
    assert counters(1, GPU) is not inside
    assert all(counters(1, GPU) is first for first in kept)


def test_outgrown_counters_stay_alive_for_graphs_that_hold_them(state: SimpleNamespace) -> None:
    first = counters(1, GPU)
    second = counters(LEAST_COUNTERS + 1, GPU)
    assert len(second) > LEAST_COUNTERS
    assert counters(1, GPU) is second
    assert [kept is first for kept in split_k._OUTGROWN] == [True]


@pytest.mark.gpu
def test_a_graph_without_a_launch_before_it_runs_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_k, "_COUNTERS", {})
    one = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = counters(1, one.device)
        one += made[0]
        made += 1  # whatever a kernel leaves, the graph clears
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert one.item() == 0
