"""The unstructured kernel against float64, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels import unstructured_matvec as module
from layerwise.kernels.unstructured import Unstructured
from layerwise.kernels.unstructured_matvec import unstructured_matvec

Error = Callable[[Tensor, Tensor], float]

BOUND = 1e-3
"""Of the relative Frobenius error: the result is rounded to 11 bits (2.8e-4 at most), sums are in float32."""


def sparse(n: int, k: int, density: float) -> Tensor:
    generator = torch.Generator().manual_seed(n + k)
    return (torch.randn(n, k, generator=generator) * (torch.rand(n, k, generator=generator) < density)).half()


def activations(m: int, k: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("n", "k", "density"), [(37, 700, 0.3), (4, 2100, 0.5), (1, 1, 1.0), (9, 513, 1.0), (6, 3000, 0.002)]
)
def test_it_multiplies(
    guard: Any, device: torch.device, relative_error: Error, m: int, n: int, k: int, density: float
) -> None:
    weight, x = sparse(n, k, density), activations(m, k)
    with guard:
        y = unstructured_matvec(guard.around(x.to(device)), guard.around(Unstructured.pack(weight).to(device)))
    assert y.shape == (m, n)
    assert y.dtype == torch.float16
    assert relative_error(y.cpu(), x.double() @ weight.double().T) <= BOUND


@pytest.mark.parametrize("along", [0, 1])
def test_nonzeros_may_lie_along_either_axis(
    guard: Any, device: torch.device, relative_error: Error, monkeypatch: pytest.MonkeyPatch, along: int
) -> None:
    monkeypatch.setattr(module, "ALONG", along)
    weight, x = sparse(21, 1500, 0.4), activations(4, 1500)
    with guard:
        y = unstructured_matvec(guard.around(x.to(device)), guard.around(Unstructured.pack(weight).to(device)))
    assert relative_error(y.cpu(), x.double() @ weight.double().T) <= BOUND


def test_rows_without_nonzeros_give_zero(guard: Any, device: torch.device) -> None:
    weight = sparse(11, 600, 0.3)
    weight[[0, 4, 5, 6, 7, 10]] = 0
    with guard:
        y = unstructured_matvec(activations(2, 600).to(device), guard.around(Unstructured.pack(weight).to(device)))
    assert torch.equal((y == 0).all(dim=0).cpu(), (weight == 0).all(dim=1))


def test_a_weight_of_zeros_gives_zero(device: torch.device) -> None:
    y = unstructured_matvec(activations(3, 40).to(device), Unstructured.pack(torch.zeros(5, 40)).to(device))
    assert torch.equal(y.cpu(), torch.zeros(3, 5, dtype=torch.float16))


def test_columns_beyond_32767_are_found(device: torch.device) -> None:
    weight = torch.zeros(2, 65536)
    weight[0, [5, 32767, 32768, 65535]] = 1
    x = (torch.arange(65536) % 100)[None].half()
    assert unstructured_matvec(x.to(device), Unstructured.pack(weight).to(device)).tolist() == [[175.0, 0.0]]


def test_bfloat16_activations_meet_float16_weights(device: torch.device, relative_error: Error) -> None:
    """Everything is widened before it is multiplied; only the result is rounded (cut off, in the interpreter)."""
    weight, x = sparse(20, 300, 0.4), activations(2, 300, torch.bfloat16)
    y = unstructured_matvec(x.to(device), Unstructured.pack(weight).to(device))
    assert y.dtype == torch.bfloat16
    assert relative_error(y.cpu(), x.double() @ weight.double().T) <= 2**-7


def test_weights_of_32_bits_are_not_rounded(guard: Any, device: torch.device) -> None:
    """Of 1 + 2^-20 only the last bit is left: it is gone if the weight is ever a half."""
    weight = torch.zeros(5, 300)
    weight[:, 7], weight[:, 290] = 1 + 2**-20, -1.0
    with guard:
        packed = guard.around(Unstructured.pack(weight).to(device))
        y = unstructured_matvec(torch.full((2, 300), 2.0**10).half().to(device), packed)
    assert torch.equal(y.cpu(), torch.full((2, 5), 2.0**-10).half())


def test_the_same_input_gives_the_same_bits(device: torch.device) -> None:
    x, packed = activations(4, 900).to(device), Unstructured.pack(sparse(30, 900, 0.5)).to(device)
    assert torch.equal(unstructured_matvec(x, packed), unstructured_matvec(x, packed))


def test_what_it_cannot_take_is_refused(device: torch.device) -> None:
    x, packed = activations(5, 64).to(device), Unstructured.pack(sparse(8, 64, 0.5)).to(device)
    with pytest.raises(UsageError, match="at most 4 rows of activations, not 5"):
        unstructured_matvec(x, packed)
    with pytest.raises(UsageError, match="must be m x 64, not 64"):
        unstructured_matvec(x[0], packed)
    with pytest.raises(UsageError, match="its starts is not contiguous, or not aligned to 16 bytes"):
        unstructured_matvec(x[:1], replace(packed, starts=torch.cat([packed.starts[:1], packed.starts])[1:]))
    assert unstructured_matvec(x[:0], packed).shape == (0, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 4])
def test_bfloat16_on_a_gpu(device: torch.device, relative_error: Error, m: int) -> None:
    weight, x = sparse(1000, 4096, 0.3).bfloat16(), activations(m, 4096, torch.bfloat16)
    y = unstructured_matvec(x.to(device), Unstructured.pack(weight).to(device))
    # The result is rounded to 8 bits.
    assert relative_error(y.cpu(), x.double() @ weight.double().T) <= 2**-8
