"""`statistics`: the weights of norms, fitted anew so that what they hand on is again what it was in the dense model.

Norm by norm, in the order in which they run, each behind those that were fitted before it: a norm's output is affine in
its weight, a + γ · n, channel by channel, so the weight with the least squared distance to the dense model's outputs is
a quotient of two sums. It takes no gradients, and a few forward passes of every block. The size is the same.

Left out: biases, which few of these models have.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from layerwise.errors import UsageError
from layerwise.stages.recover import RepairEntry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from layerwise.stages.models.causal_lm import CausalLM


class Params(RepairEntry):
    """On how much text at a time, and how far."""

    method: Literal["statistics"] = "statistics"
    batch_size: int = Field(8, ge=1, description="sequences that run at a time")
    damp_percent: float = Field(
        0.01, ge=0, lt=1, description="share of a norm's mean energy that pulls towards what its weight was before"
    )

    scope: ClassVar[Literal["unit", "parameters", "model"]] = "parameters"
    of_units: ClassVar[bool] = False


def statistics(student: CausalLM, dense: CausalLM, sequences: Tensor, params: Params) -> dict[str, Tensor]:
    """Fit the weights of all norms that run.

    Args:
        student: the compressed model, decoded; its norms are changed.
        dense: its teacher, with the same blocks.
        sequences: (sequences, length) int64, on their device.
    Returns:
        the new weights, by the names of the parameters.
    Raises:
        UsageError: the two have not the same blocks.
    Source: the re-estimated batch norms of LayerCalib-IP, arXiv:2006.10518, section 3.3, for norms whose statistics are
        those of a token.
    """
    if student.n_blocks != dense.n_blocks:
        raise UsageError(
            f"the model has {student.n_blocks} blocks, the workflow's dense one, its teacher, {dense.n_blocks}",
            hint="repair a model that was made of the workflow's",
        )
    found: dict[str, Tensor] = {}
    runs = _Runs(student, dense, sequences, params.batch_size)
    for position in range(student.n_blocks + 1):
        for name in runs.norms(position):
            weight = student.parameter(f"{name}.weight")
            products, squares = runs.sums(position, name)
            pull = params.damp_percent * squares.mean()
            fitted = (products + pull * weight.double()) / (squares + pull)
            fitted = fitted.where(fitted.isfinite(), weight.double())
            weight.data.copy_(fitted)
            found[f"{name}.weight"] = weight.detach().float().clone()
        runs.go_on(position)
    return found


class _Runs:
    """Both models on their way through the blocks, on all sequences."""

    def __init__(self, student: CausalLM, dense: CausalLM, sequences: Tensor, batch_size: int) -> None:
        self.student, self.dense = student, dense
        self.batches = sequences.split(batch_size)
        self.hidden = [[network.begin(ids).hidden for ids in self.batches] for network in (student, dense)]
        self._inside = f"{student.block_path}."

    def norms(self, position: int) -> list[str]:
        """Modules of one part that run, with a weight of one dimension, in their order."""
        ran: list[str] = []
        with ExitStack() as stack:
            for name, module in self.student.model.named_modules():
                weight = dict(module.named_parameters(recurse=False)).get("weight")
                if weight is not None and weight.dim() == 1 and self._in(name, position):
                    stack.callback(module.register_forward_hook(_once(ran, name)).remove)
            self._run(self.student, 0, position, 0)
        return ran

    def _in(self, name: str, position: int) -> bool:
        if position < self.student.n_blocks:
            return name.startswith(f"{self._inside}{position}.")
        return not name.startswith(self._inside)

    def sums(self, position: int, name: str) -> tuple[Tensor, Tensor]:
        """Of a norm, Σ n (y - a) and Σ n² over all tokens, by channels, in float64; y is the dense model's output."""
        import torch

        module = self.student.module(name)
        weight = self.student.parameter(f"{name}.weight")
        totals = [torch.zeros_like(weight, dtype=torch.float64) for _ in range(2)]
        for number in range(len(self.batches)):
            seen: list[tuple[Tensor, Tensor]] = []
            for which, network in enumerate((self.student, self.dense)):
                with ExitStack() as stack:
                    hook = network.module(name).register_forward_hook(_kept(seen))
                    stack.callback(hook.remove)
                    self._run(network, which, position, number)
            (inputs, _), (_, y) = seen
            with torch.no_grad():
                a, one = (
                    torch.func.functional_call(module, {"weight": torch.full_like(weight, value)}, (inputs,)).double()
                    for value in (0, 1)
                )
            n = (one - a).flatten(0, -2)
            totals[0] += (n * (y.double() - a).flatten(0, -2)).sum(0)
            totals[1] += n.square().sum(0)
        return totals[0], totals[1]

    def go_on(self, position: int) -> None:
        """Take the hidden states past one block."""
        if position < self.student.n_blocks:
            for which, network in enumerate((self.student, self.dense)):
                self.hidden[which] = [
                    self._run(network, which, position, number) for number in range(len(self.batches))
                ]

    def _run(self, network: CausalLM, which: int, position: int, number: int) -> Tensor:
        hidden, stream = self.hidden[which][number], network.begin(self.batches[number])
        if position == network.n_blocks:
            return network.end(hidden, stream)
        return network.run_block(position, hidden, stream)


def _once(ran: list[str], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if name not in ran:
            ran.append(name)

    return hook


def _kept(seen: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((args[0], output))

    return hook
