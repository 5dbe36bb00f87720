"""The 2:4 kernel against float64, in the interpreter or on a GPU; and the PTX against what it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels import n_m_matmul as module
from layerwise.kernels.n_m_matmul import EXPAND, n_m_matmul
from layerwise.kernels.n_m_sparse import NMSparse

Error = Callable[[Tensor, Tensor], float]

BOUND = 1e-3
"""Of the relative Frobenius error: the result is rounded to 11 bits (2.8e-4 at most), sums are in float32."""


def two_of_four(n: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, -(-k // 4), 4, generator=generator).half()
    kept = torch.rand(weight.shape, generator=generator).argsort(dim=2)[..., :2]
    return torch.zeros_like(weight).scatter(2, kept, weight.gather(2, kept)).flatten(1)[:, :k].contiguous()


def activations(m: int, k: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 72, 512), (3, 1, 256), (16, 130, 300), (17, 64, 7), (33, 70, 258), (64, 16, 256), (2, 100, 1)],
    ids=str,
)
def test_it_multiplies(guard: Any, device: torch.device, relative_error: Error, m: int, n: int, k: int) -> None:
    weight, x = two_of_four(n, k), activations(m, k)
    with guard:
        y = n_m_matmul(guard.around(x.to(device)), guard.around(NMSparse.pack(weight).to(device)))
    assert y.shape == (m, n)
    assert y.dtype == torch.float16
    assert relative_error(y.cpu(), x.double() @ weight.double().T) <= BOUND


def test_a_row_of_a_wider_matrix_is_taken(device: torch.device, relative_error: Error) -> None:
    """It is contiguous, yet its stride is no multiple of the four activations that are read at a time."""
    weight, x = two_of_four(40, 256), activations(3, 259)[:1, :256]
    assert x.is_contiguous()
    assert x.stride(0) % 4
    y = n_m_matmul(x.to(device).as_strided((1, 256), (259, 1)), NMSparse.pack(weight).to(device))
    assert relative_error(y.cpu(), x.double() @ weight.double().T) <= BOUND


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_a_weight_of_zeros_and_one_with_every_place_taken(
    device: torch.device, relative_error: Error, fill: float
) -> None:
    weight = torch.zeros(20, 64, 4)
    weight[..., 1] = weight[..., 2] = fill
    x = activations(2, 256)
    y = n_m_matmul(x.to(device), NMSparse.pack(weight.flatten(1)).to(device))
    assert relative_error(y.cpu(), x.double() @ weight.flatten(1).double().T) <= BOUND


def test_all_six_pairs_of_places_are_told_apart(device: torch.device) -> None:
    """One weight of each pair is 1, and x is the column's number, so y says which columns were met."""
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    weight, expected = torch.zeros(12, 256), []
    for row, (a, b) in enumerate(pairs):
        for which, scale in ((0, (1, 0.5)), (1, (0.5, 1))):
            weight[2 * row + which, 4 * 9 + a], weight[2 * row + which, 4 * 9 + b] = scale
            expected.append(scale[0] * (36 + a) + scale[1] * (36 + b))
    y = n_m_matmul(torch.arange(256)[None].half().to(device), NMSparse.pack(weight).to(device))
    assert y[0].tolist() == expected


def test_the_same_input_gives_the_same_bits(device: torch.device) -> None:
    x, packed = activations(5, 512).to(device), NMSparse.pack(two_of_four(48, 512)).to(device)
    assert torch.equal(n_m_matmul(x, packed), n_m_matmul(x, packed))


def test_splits_agree_with_one_program(
    device: torch.device, relative_error: Error, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = activations(2, 768), two_of_four(16, 768)
    packed = NMSparse.pack(weight).to(device)
    exact = x.double() @ weight.double().T
    for programs in (1, 2, 1000):
        monkeypatch.setattr(module, "PROGRAMS", programs)
        assert relative_error(n_m_matmul(x.to(device), packed).cpu(), exact) <= BOUND


def test_strided_activations_are_copied_and_none_give_none(device: torch.device) -> None:
    x, packed = activations(3, 512).to(device), NMSparse.pack(two_of_four(16, 256)).to(device)
    assert torch.equal(n_m_matmul(x[:, ::2], packed), n_m_matmul(x[:, ::2].contiguous(), packed))
    odd = torch.cat([x.new_zeros(1), x[:, :256].flatten()])[1:].view(3, 256)
    assert torch.equal(n_m_matmul(odd, packed), n_m_matmul(x[:, :256], packed))
    assert n_m_matmul(x[:0, :256], packed).shape == (0, 16)


def test_what_it_cannot_take_is_refused(device: torch.device) -> None:
    packed = NMSparse.pack(two_of_four(16, 256)).to(device)
    x = activations(65, 256).to(device)
    with pytest.raises(UsageError, match="at most 64 rows of activations, not 65"):
        n_m_matmul(x, packed)
    with pytest.raises(UsageError, match="must be m x 256, not 3 x 128"):
        n_m_matmul(x[:3, :128], packed)
    with pytest.raises(UsageError, match="float16 and bfloat16 activations, not float32"):
        n_m_matmul(x[:3].float(), packed)
    with pytest.raises(UsageError, match="float16 and the activations bfloat16; pack it in bfloat16"):
        n_m_matmul(x[:3].bfloat16(), packed)
    with pytest.raises(UsageError, match="only 2:4 has a kernel, not 1:4"):
        n_m_matmul(x[:3], NMSparse.pack(torch.zeros(16, 256), 1, 4).to(device))


def test_a_weight_laid_out_otherwise_is_refused(device: torch.device) -> None:
    packed = NMSparse.pack(two_of_four(16, 256)).to(device)
    turned = packed.masks.T.contiguous().T
    with pytest.raises(UsageError, match="its masks is not contiguous"):
        n_m_matmul(activations(1, 256).to(device), NMSparse(packed.shape, packed.values, turned, 2, 4))


@pytest.mark.parametrize("mask", [0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100])
def test_the_ptx_puts_both_weights_where_their_bits_are(mask: int, run_ptx: Callable[..., dict[str, int]]) -> None:
    """Evaluated by hand: the two groups of a register, the other one with the opposite bits."""
    first, second, other = 0x1111, 0x2222, mask ^ 0b1111
    values = {"$5": first << 16 | 0x3333, "$6": second << 16 | 0x4444, "$7": (0xABC0 | mask) << 16 | 0x5670 | other}
    found = run_ptx(EXPAND.value, values)
    for half, bits, pair in ((16, mask, (first, second)), (0, other, (0x3333, 0x4444))):
        places = [place for place in range(4) if bits >> place & 1]
        for place in range(4):
            expected = pair[places.index(place)] if place in places else 0
            assert found[f"${place}"] >> half & 0xFFFF == expected
    assert found["$4"] & 0x0FFF == 0x567
    assert found["$4"] >> 16 & 0x0FFF == 0xABC


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [(1, 4096, 4096), (16, 1000, 1024), (40, 4096, 300)])
def test_bfloat16_on_a_gpu(device: torch.device, relative_error: Error, m: int, n: int, k: int) -> None:
    weight, x = two_of_four(n, k).bfloat16(), activations(m, k, torch.bfloat16)
    y = n_m_matmul(x.to(device), NMSparse.pack(weight).to(device))
    # The result is rounded to 8 bits.
    assert relative_error(y.cpu(), x.double() @ weight.double().T) <= 2**-8
