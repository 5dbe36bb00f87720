"""Our kernels as backends: what they refuse, in words, and on a GPU that they multiply."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels import triton_backends
from layerwise.kernels.backends import BACKENDS, Work, find_backend, prepare
from layerwise.kernels.block_sparse import BlockSparse
from layerwise.kernels.dense import Dense
from layerwise.kernels.low_rank import LowRank
from layerwise.kernels.n_m_sparse import NMSparse
from layerwise.kernels.packed import Packed
from layerwise.kernels.quantized import Quantized
from layerwise.kernels.quantized_matmul import Launch, launch
from layerwise.kernels.unstructured import Unstructured

OURS = [backend.name for backend in BACKENDS.values() if backend.ours]


def weights(dtype: torch.dtype = torch.float16) -> dict[str, Packed]:
    """One weight of 64 x 256 for each of our backends."""
    generator = torch.Generator().manual_seed(0)
    codes, scale = torch.randint(0, 16, (64, 256), generator=generator, dtype=torch.uint8), torch.ones(64, 2).half()
    sparse = torch.randn(64, 256, generator=generator).to(dtype)
    sparse[:, ::2] = 0
    quantized = Quantized.pack(codes, scale, bits=4, group_size=128)
    A, B = torch.randn(8, 256, generator=generator), torch.randn(64, 8, generator=generator)
    return {
        "triton_quantized": quantized,
        "triton_block_sparse": BlockSparse.pack(
            codes, scale, torch.eye(2) > 0, bits=4, group_size=128, block=(32, 128)
        ),
        "triton_low_rank": LowRank((64, 256), A, B, quantized),
        "triton_n_m": NMSparse.pack(sparse),
        "triton_unstructured": Unstructured.pack(sparse),
    }


@pytest.mark.parametrize("name", OURS)
def test_other_formats_are_refused_in_words(name: str) -> None:
    reason = find_backend(name).refuses(
        Dense((64, 256), torch.zeros(64, 256)), Work(1, torch.float16, torch.device("cuda"))
    )
    assert reason is not None
    assert reason.endswith("not dense")


@pytest.mark.parametrize("name", OURS)
def test_a_processor_is_refused_in_words(name: str) -> None:
    with pytest.raises(UsageError, match="of 64 x 256: the Triton kernels need a CUDA device, not cpu"):
        prepare(name, weights()[name], Work(1, torch.float16, torch.device("cpu")))


def test_launches_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def watched(packed: Quantized, m: int) -> Launch:
        made.append(m)
        return launch(packed, m)

    monkeypatch.setattr(triton_backends, "launch", watched)
    monkeypatch.setattr(triton_backends, "MAX_LAUNCHES", 2)
    packed = weights()["triton_quantized"].to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(iter(packed.tensors.values())).device
    multiply = triton_backends.QUANTIZED.prepare(packed, Work(1, torch.float16, device))
    for m in (1, 2, 1, 3, 2, 1):
        assert multiply(torch.ones(m, 256, device=device).half()).shape == (m, 64)
    assert made == [1, 2, 3, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_multiplies_on_a_gpu(
    device: torch.device, relative_error: Callable[[Tensor, Tensor], float], name: str, dtype: torch.dtype
) -> None:
    packed = weights(dtype)[name].to(device)
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    y = prepare(name, packed, Work(2, dtype, device))(x)
    assert relative_error(y, x.double() @ packed.dense().double().T) <= (1e-3 if dtype == torch.float16 else 2**-7)
