"""Which device is current while a launcher runs, and whether its kernel may hold PTX. GPUs are played."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layerwise.kernels import activations
from layerwise.kernels.activations import on_its_device, uses_asm
from layerwise.kernels.block_sparse import BlockSparse
from layerwise.kernels.block_sparse_matmul import block_sparse_matmul
from layerwise.kernels.low_rank import LowRank
from layerwise.kernels.low_rank_matmul import low_rank_matmul
from layerwise.kernels.n_m_matmul import n_m_matmul
from layerwise.kernels.n_m_sparse import NMSparse
from layerwise.kernels.packed import Packed
from layerwise.kernels.quantized import Quantized
from layerwise.kernels.quantized_matmul import quantized_matmul
from layerwise.kernels.unstructured_matvec import unstructured_matvec

FOLDER = Path(activations.__file__).parent


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


# --- PTX ---


@pytest.mark.parametrize(
    ("device", "hip", "allowed"), [("cuda:1", None, True), ("cuda:1", "6.4", False), ("cpu", None, False)]
)
def test_ptx_is_for_devices_of_nvidia(
    monkeypatch: pytest.MonkeyPatch, device: str, hip: str | None, allowed: bool
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    assert uses_asm(torch.device(device)) is allowed


def quantized() -> Quantized:
    return Quantized.pack(torch.zeros(32, 128, dtype=torch.uint8), torch.ones(32, 1).half(), bits=4, group_size=128)


def low_rank() -> LowRank:
    return LowRank((32, 128), torch.zeros(4, 128).half(), torch.zeros(32, 4).half(), quantized())


def block_sparse() -> BlockSparse:
    codes, scale, keep = torch.zeros(32, 128, dtype=torch.uint8), torch.ones(32, 1).half(), torch.ones(1, 1).bool()
    return BlockSparse.pack(codes, scale, keep, bits=4, group_size=128, block=(32, 128))


WITH_ASM: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], Packed]]] = {
    "quantized_matmul.quantized_kernel": (quantized_matmul, quantized),
    "low_rank_matmul.low_rank_kernel": (low_rank_matmul, low_rank),
    "block_sparse_matmul.block_sparse_kernel": (block_sparse_matmul, block_sparse),
    "n_m_matmul.n_m_kernel": (n_m_matmul, lambda: NMSparse.pack(torch.zeros(32, 128).half())),
}
"""Each kernel that may hold PTX: its launcher, and a weight."""


@pytest.mark.parametrize("name", WITH_ASM)
def test_every_launcher_asks_whether_its_kernel_may_hold_ptx(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, name: str
) -> None:
    module, _, kernel = name.partition(".")
    launcher, weight = WITH_ASM[name]
    given, asked = list[object](), list[str]()

    class Recording:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, USE_ASM, **constants: given.append(USE_ASM)

    def answer(device: torch.device) -> str:
        asked.append(device.type)
        return "the answer"

    monkeypatch.setattr(f"layerwise.kernels.{module}.{kernel}", Recording())
    monkeypatch.setattr(f"layerwise.kernels.{module}.uses_asm", answer)
    launcher(torch.zeros(1, 128).half().to(device), weight().to(device))
    assert given == ["the answer"]
    assert asked == [device.type]


def test_no_other_kernel_may_hold_ptx() -> None:
    sources = [path for path in FOLDER.glob("*.py") if "@triton.jit" in path.read_text()]
    modules = {path.stem: vars(import_module(f"layerwise.kernels.{path.stem}")) for path in sources}
    found = {
        f"{module}.{name}"
        for module, values in modules.items()
        for name, value in values.items()
        if name.endswith("_kernel") and "USE_ASM" in getattr(value, "arg_names", ())
    }
    assert found == set(WITH_ASM)
