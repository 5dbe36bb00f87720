"""`rotation`: turns the residual stream by a random orthogonal matrix, so that no channel stands out.

With Q orthogonal, a network whose stream is X Q computes the same as one whose stream is X, because the root mean
square of a row does not change (SliceGPT, arXiv:2401.15024, section 3.1 and theorem 1; QuaRot, arXiv:2404.00456,
section 4, stage 1a): with weights (out, in), and rows of the stream on the left,

    what writes to the stream    W -> Qᵀ W, b -> b Q, an embedding E -> E Q
    what reads it                W -> W diag(gain) Q, the gain of the norm in between becoming one

Q is a randomized Hadamard matrix, one with random signs of its rows and columns: it spreads every channel evenly over
all, which takes outliers from weights and activations alike (QuIP#, arXiv:2402.04396, section 3). Where the width is no
power of two, the Hadamard matrix of the greatest power of two in it is joined (Kronecker) with a random orthogonal
matrix of the rest, as QuIP# does with matrices that it knows.

LayerNorm subtracts the mean over the channels, so SliceGPT (section 3.2) makes an RMSNorm of it, and takes the mean out
of what writes. No other architecture is needed here: if Q leaves the vector of ones where it is, Q 1 = 1, the mean of
X Q is that of X, and LayerNorm turns along with its input. One reflection makes any orthogonal matrix such a one. The
bias of a LayerNorm goes into the biases of what reads it; where something has none, it stays, divided by the gain and
turned.

Left out: rotations inside a block (of heads, of the inner width of an MLP), which need operations at run time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from layerwise.errors import UnsupportedModel
from layerwise.stages.transform import TransformEntry

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.models.causal_lm import CausalLM
    from layerwise.stages.models.network import Unit
    from layerwise.stages.transform.residual import Norm, Residual

ROWS = 4096
"""Rows that are turned at a time: of a head of 128 thousand tokens, a copy in float64 need not be in memory."""


class Params(TransformEntry):
    """Which of the random rotations."""

    method: Literal["rotation"] = "rotation"
    seed: int = Field(0, ge=0, description="of the random signs, and of what is beside the Hadamard matrix")

    @property
    def name(self) -> str:
        """With the seed, unless it is the first."""
        return f"rotation-seed{self.seed}" if self.seed else "rotation"


def rotation(network: CausalLM, params: Params) -> Collection[str]:
    """Turn the stream of a network.

    Returns:
        the parameters that are other than before.
    Raises:
        UnsupportedModel: a norm stands where its gain cannot be folded, or the stream is not a plain sum.
    """
    from layerwise.stages.transform.residual import find_residual

    residual = find_residual(network)
    _check(residual)
    Q = rotation_matrix(residual.width, params.seed, keep_ones=residual.centred)
    turning = _Turning(network, residual, Q)
    turning.untie()
    turning.fold_biases()
    turning.turn()
    return turning.changed


def rotation_matrix(width: int, seed: int, *, keep_ones: bool = False) -> Tensor:
    """A random orthogonal matrix whose entries are all of about the same size.

    Args:
        width: of the stream.
        seed: two seeds give two matrices.
        keep_ones: make it map the vector of ones to itself.
    Returns:
        (width, width), float64.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randint(0, 2, (2, width), generator=generator).double() * 2 - 1
    power = width & -width
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < power:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    rest, R = torch.linalg.qr(torch.randn(width // power, width // power, generator=generator, dtype=torch.float64))
    rest = (rest * R.diagonal().sign()).contiguous()  # uniform over all orthogonal matrices
    Q: Tensor = left[:, None] * torch.kron(H / power**0.5, rest) * right
    if keep_ones:
        # A reflection that exchanges Qᵀ 1 and 1. It changes entries by O(1 / width), beside 1 / sqrt(width), because
        # with signs on both sides Q 1 and Qᵀ 1 have no large entries.
        ones = torch.ones(width, dtype=torch.float64)
        v = Q.T @ ones - ones
        if v.norm() > 1e-9 * ones.norm():
            v = v / v.norm()
            Q = Q - 2 * torch.outer(Q @ v, v)
    return Q


def _check(residual: Residual) -> None:
    for norm in residual.branch_norms:
        if not norm.even:
            raise UnsupportedModel(
                f"{norm.name} stands between a branch and the residual stream and scales every channel by itself "
                f"(from {norm.gain.min():.3g} to {norm.gain.max():.3g}): after a rotation it would scale others",
                hint="this family cannot be rotated; compress the model as it is",
            )
    for norm, _ in _readers_of(residual):
        if norm.weight is None and not bool((norm.gain == 1).all()):
            raise UnsupportedModel(
                f"the gain of {norm.name} is no parameter of it, so it cannot be folded into what reads it",
                hint="this family cannot be rotated; compress the model as it is",
            )
        if norm.shift is None and norm.bias.any():
            raise UnsupportedModel(
                f"the bias of {norm.name} is no parameter of it, so it cannot be turned",
                hint="this family cannot be rotated; compress the model as it is",
            )
    if not residual.readers or not (residual.writers or residual.rows):
        raise UnsupportedModel(
            "nothing was seen to read the residual stream, or to write to it",
            hint="this family cannot be rotated; compress the model as it is",
        )


def _readers_of(residual: Residual) -> list[tuple[Norm, list[Unit]]]:
    """Every norm that is read, with what reads it."""
    found: dict[str, list[Unit]] = defaultdict(list)
    for unit, norm in residual.readers:
        if norm is not None:
            found[norm.name].append(unit)
    return [(residual.norms[name], units) for name, units in found.items()]


class _Turning:
    """Changes the parameters of a network, each once.

    Args:
        network: to be changed.
        residual: of it.
        Q: (width, width), float64.
    """

    def __init__(self, network: CausalLM, residual: Residual, Q: Tensor) -> None:
        self.network, self.residual, self.Q = network, residual, Q
        self.readers = {unit.name: (unit, norm) for unit, norm in residual.readers}
        self.writers = {unit.name: unit for unit in residual.writers}
        self.changed: dict[str, None] = {}
        self._turned: set[tuple[int, object]] = set()

    def untie(self) -> None:
        """Give the head a weight of its own, unless it is to change as the embedding does."""
        if not self.network.tied:
            return
        (head,) = [unit for unit in self.network.units if unit.role == "head"]
        assert head.view is not None
        weight = self.network.parameter(head.view.tensor)
        written = any(self.network.parameter(name) is weight for name in self.residual.rows)
        norm = self.readers[head.name][1] if head.name in self.readers else None
        if head.name in self.readers and written and (norm is None or bool((norm.gain == 1).all())):
            del self.readers[head.name]  # turned as the embedding
        elif head.name in self.readers or written:
            self.network.untie()
            self.changed[head.view.tensor] = None

    def fold_biases(self) -> None:
        """Take the biases of norms out of them, or make them those of turned norms without a gain."""
        for norm, units in _readers_of(self.residual):
            if norm.shift is None:
                continue
            biases = [f"{unit.name}.bias" for unit in units]
            if all(name in self.network.parameters for name in biases):
                for unit, name in zip(units, biases, strict=True):
                    before = self.network.parameter(name).data.double()
                    self._set(name, before + self.network.weight(unit).double() @ norm.bias)
                self._set(norm.shift, norm.bias * 0)
            elif bool((norm.bias[norm.gain == 0] != 0).any()):
                raise UnsupportedModel(
                    f"{norm.name} has a bias in channels whose gain is zero, and not all that reads it has a bias",
                    hint="this model cannot be rotated; compress it as it is",
                )
            else:
                self._set(norm.shift, (norm.bias / norm.gain).nan_to_num() @ self.Q)

    def turn(self) -> None:
        """Turn what reads and what writes, and set the gains to one."""
        units = {name: unit for name, (unit, _) in self.readers.items()} | self.writers
        for name, unit in units.items():
            assert unit.view is not None
            W = self.network.weight(unit)
            if name in self.readers:
                norm = self.readers[name][1]
                W = turned(W, self.Q, None if norm is None else norm.gain)
            if name in self.writers:
                W = turned(W.T, self.Q).T
            self._once(unit.view.tensor, (unit.view.index, unit.view.rows))
            self.network.overwrite(unit, W)
            self.changed[unit.view.tensor] = None
        for name in self.residual.rows:
            self._once(name, None)
            self._set(name, turned(self.network.parameter(name).data, self.Q))
        for norm, _ in _readers_of(self.residual):
            if norm.weight is not None:
                self._set(norm.weight, norm.gain * 0 + norm.neutral)

    def _once(self, tensor: str, part: object) -> None:
        key = id(self.network.parameter(tensor)), part
        if key in self._turned:
            raise UnsupportedModel(
                f"{tensor} is used in several places of the residual stream, each of which would change it",
                hint="this family cannot be rotated; compress the model as it is",
            )
        self._turned.add(key)

    def _set(self, name: str, value: Tensor) -> None:
        self.network.parameter(name).data.copy_(value)
        self.changed[name] = None


def turned(rows: Tensor, Q: Tensor, gain: Tensor | None = None) -> Tensor:
    """Rows times diag(gain) times Q, computed in float64.

    Args:
        rows: (..., width); any float dtype, which the result has.
        Q: (width, width), float64.
        gain: (width,), float64; ones if left out.
    """
    import torch

    M = Q if gain is None else gain[:, None] * Q
    parts: Sequence[Tensor] = rows.reshape(-1, rows.shape[-1]).split(ROWS)
    return torch.cat([(part.double() @ M).to(rows.dtype) for part in parts]).reshape(rows.shape)
