"""The target of a layer behind compressed layers, against least squares over the inputs themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import NotFinite
from layerwise.stages.compress.gptq import Params, quantized
from layerwise.stages.compress.residual import towards_dense


def inputs_of(seed: int, columns: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (5, columns), and correlated inputs (tokens, columns) of the dense model and behind a prefix."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    X = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    X_hat = X + 0.3 * torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing.flip(0)
    return torch.randn(5, columns, generator=generator, dtype=torch.float64), X, X_hat


@given(
    seed=st.integers(0, 1000), columns=st.integers(2, 12), tokens=st.integers(3, 40), damp=st.sampled_from([0.01, 0.2])
)
def test_it_is_the_least_squares_answer_to_the_dense_outputs(seed: int, columns: int, tokens: int, damp: float) -> None:
    W, X, X_hat = inputs_of(seed, columns, tokens)
    H = X_hat.T @ X_hat
    found = towards_dense(W, H, (X - X_hat).T @ X_hat, damp)
    root = np.sqrt(damp * float(H.diagonal().mean()))  # ‖W X - T X̂‖² + λ ‖W - T‖² as rows of one system
    rows = np.vstack([X_hat.numpy(), root * np.eye(columns)])
    wanted = np.vstack([(X @ W.T).numpy(), root * W.T.numpy()])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    assert np.abs(found.numpy() - expected).max() <= 1e-8 * np.abs(expected).max()


def test_without_a_residual_it_is_the_weight() -> None:
    W, X, _ = inputs_of(0, 8, 30)
    assert torch.equal(towards_dense(W, X.T @ X, torch.zeros(8, 8), 0.01), W)


def test_what_is_quantized_towards_it_is_nearer_to_the_dense_outputs() -> None:
    nearer = 0
    for seed in range(20):
        W, X, X_hat = inputs_of(seed, 16, 200)
        H, params = X_hat.T @ X_hat, Params(bits=3, group_size=8)
        targets = towards_dense(W, H, (X - X_hat).T @ X_hat, 0.01), W
        errors = [(quantized(T, H, params)[0].decode().double() @ X_hat.T - W @ X.T).square().sum() for T in targets]
        nearer += bool(errors[0] < errors[1])
    assert nearer == 20


def test_a_column_whose_inputs_are_all_zero_keeps_its_weights() -> None:
    W, X, X_hat = inputs_of(3, 6, 50)
    X_hat[:, 2] = 0
    found = towards_dense(W, X_hat.T @ X_hat, (X - X_hat).T @ X_hat, 0.01)
    assert torch.equal(found[:, 2], W[:, 2])
    assert not torch.equal(found[:, 3], W[:, 3])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_is_refused(which: int) -> None:
    W, X, _ = inputs_of(0, 4, 30)
    given = [W, X.T @ X, torch.zeros(4, 4)]
    given[which] = given[which].clone().index_fill_(0, torch.tensor([1]), float("nan"))
    with pytest.raises(NotFinite, match="NaN or Inf"):
        towards_dense(*given, 0.01)
