"""Which device is current while a launcher runs. Two GPUs are played, so none is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layerwise.kernels.activations import on_its_device
from layerwise.kernels.block_sparse_matmul import block_sparse_matmul
from layerwise.kernels.low_rank_matmul import low_rank_matmul
from layerwise.kernels.n_m_matmul import n_m_matmul
from layerwise.kernels.unstructured_matvec import unstructured_matvec


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The devices that are entered; device 0 is current at first."""
    current, seen = [0], list[int]()

    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        seen.append(device.index)
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", enter)
    return seen


def on(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device))


def test_a_launcher_runs_on_the_device_of_its_activations(entered: list[int]) -> None:
    launcher = on_its_device(lambda x, *, other: (x, other, torch.cuda.current_device()))
    x = on("cuda:1")
    assert launcher(x, other=5) == (x, 5, 1)
    assert torch.cuda.current_device() == 0
    assert entered == [1]


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_the_current_device_is_not_entered_again(entered: list[int], device: str) -> None:
    on_its_device(lambda x: x)(on(device))
    assert entered == []


@pytest.mark.parametrize("launcher", [block_sparse_matmul, low_rank_matmul, n_m_matmul, unstructured_matvec])
def test_every_launcher_enters_it(entered: list[int], launcher: Any) -> None:
    with pytest.raises(AttributeError):  # a stand-in for activations has no shape
        launcher(on("cuda:1"), SimpleNamespace(shape=(1, 1)))
    assert entered == [1]
