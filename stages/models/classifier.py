"""A network of the user's own that tells classes apart: any module that takes a batch of tensors and gives logits.

Its blocks are found by running it: of all modules that hold others, the children that pass one tensor from each to the
next, once each, are a chain. The longest chain that holds at least half of the weights is the depth of the network
(the stages of a CNN, the blocks of a vision transformer); where there is none, the network is one block. Linear layers
and convolutions outside of the chain are units, too. What is neither (batch norm) is left alone.

When it is loaded its parts are tried on two entries of the data, and it is refused if they do not give what the network
itself gives. Left out: networks with several inputs or outputs, and dense predictions (segmentation).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import UnsupportedModel
from layerwise.kernels.device import require_gpu
from layerwise.stages.contract import ModelSource
from layerwise.stages.models.code import call
from layerwise.stages.models.folder import SINGLE
from layerwise.stages.models.in_blocks import InBlocks, Stream
from layerwise.stages.models.inputs import observed
from layerwise.stages.models.network import BEGIN, Unit
from layerwise.stages.models.units import Answer, layer_unit

EXAMPLE = "example.safetensors"
"""Beside the weights: `inputs`, two entries of the data to try the network on."""


class Classifier(InBlocks):
    """A network with one answer for each entry of a batch, in evaluation mode, frozen.

    Args:
        model: takes (batch, ...) and gives logits (batch, classes), or an object that has them as `logits`.
        example: two entries or more that differ, (batch, ...).
    Raises:
        UnsupportedModel: it does not run on the example, gives something else, or its parts are not the network.
    """

    only_hidden = (
        "layerwise takes networks that give the same answer to the same input, and whose blocks pass on one tensor and "
        "nothing else; put blocks that share more than that into one module"
    )

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__(model)
        whole = self._run_whole(example)
        self._calls = _Calls.of(model, lambda: self.logits(example))
        blocks = _find_blocks(model, self._calls)
        self._positions = self._calls.sides(blocks)
        self._take_apart(blocks, example, whole, Answer(0, None))
        self._check_end(example, whole)
        self.units = self._with_shares(example)
        del self._calls  # it holds what the example became

    @classmethod
    def load(cls, source: ModelSource) -> Classifier:
        """Make the network by the function that `source.python` names, with the weights in its folder.

        Raises:
            UsageError: the function is not there or fails, or there is no GPU where one is asked for.
            UnsupportedModel: what it gives is no network that can be taken apart.
        """
        from safetensors.torch import load_file

        assert source.python is not None
        assert source.trust, "code runs only where the workflow says trust: true"
        if source.device == "cuda":
            require_gpu()
        model = made_by(source.python).to(getattr(torch, source.dtype))
        put_weights(model, load_file(source.path / SINGLE), source.path)
        example = load_file(source.path / EXAMPLE)["inputs"]
        network = cls(model.to(source.device), example.to(source.device))
        if source.compressed is not None:
            from layerwise.stages.models.compressed import CompressedModel

            CompressedModel(source.compressed).install(network)
        return network

    # --- running it ---

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        inputs = ids.to(next(self.model.parameters()).dtype) if ids.is_floating_point() else ids
        output = self.model(inputs)
        logits: Tensor = getattr(output, "logits", output)
        return logits

    def predictions(self, ids: Tensor) -> int:
        """One for each entry."""
        return 1

    def targets(self, ids: Tensor, labels: Tensor | None) -> Tensor | None:
        """The labels, (batch, 1)."""
        return None if labels is None else labels[:, None]

    # --- finding out what it is made of ---

    @torch.no_grad()
    def _run_whole(self, example: Tensor) -> Tensor:
        name = type(self.model).__name__
        try:
            whole = self.logits(example)
        except Exception as error:  # whatever somebody's code raises
            raise UnsupportedModel(
                f"{name} does not run on a batch of shape {tuple(example.shape)}: {type(error).__name__}: {error}",
                hint="it is called with one tensor: entries of the data, as its function gives them",
            ) from error
        if not isinstance(whole, Tensor) or whole.dim() != 2 or len(whole) != len(example):
            found = tuple(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
            raise UnsupportedModel(
                f"{name} gives {found} for a batch of shape {tuple(example.shape)}, and not logits (batch, classes)",
                hint="wrap it in a module whose forward gives logits of classes",
            )
        return whole

    @torch.no_grad()
    def _check_end(self, example: Tensor, whole: Tensor) -> None:
        """What comes after the blocks must not look at the input again: a level of the stem would be left out there."""
        stream = self.begin(example)
        hidden = stream.hidden
        for index in range(self.n_blocks):
            hidden = self.run_block(index, hidden, stream)
        self._check(self.end(hidden, Stream(example.flip(0), stream.hidden, stream.calls)), whole)

    def _outside(self) -> Sequence[Unit]:
        inside = {id(module) for block in self.blocks for module in block.modules()}
        found = []
        for name, module in self.model.named_modules():
            positions = self._positions.get(module)
            unit = layer_unit(name, name, 0, module)
            if unit is not None and positions and id(module) not in inside:
                found.append(replace(unit, block=None, positions=positions))
        last = max((unit for unit in found if unit.role == "linear"), key=lambda unit: unit.positions[-1], default=None)
        if last is not None and last.positions == (self.n_blocks,):
            found[found.index(last)] = replace(last, role="head")
        return found

    @torch.no_grad()
    def _with_shares(self, example: Tensor) -> tuple[Unit, ...]:
        """The units with how often each is multiplied for one entry."""
        rows: dict[str, int] = {}

        def count(unit: Unit, X: Tensor, whole: Tensor) -> None:
            rows[unit.name] = rows.get(unit.name, 0) + len(X)

        with observed(self, self.units, count):
            self.logits(example)
        return tuple(
            replace(unit, share=rows[unit.name] / len(example)) if unit.name in rows else unit for unit in self.units
        )


def made_by(python: str) -> nn.Module:
    """The module that a function of the user's gives.

    Raises:
        UsageError: it is not there, fails, or gives something else.
    """
    model = call(python)
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(
            f"{python} gives a {type(model).__name__}, and not a torch.nn.Module",
            hint="the function takes nothing and gives the trained network",
        )
    if not any(True for _ in model.parameters()):
        raise UnsupportedModel(f"{python} gives a network without weights")
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What is stored of a network: every parameter and buffer of its state once, by name."""
    found: dict[tuple[int, int], str] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        found.setdefault((tensor.data_ptr(), tensor.numel()) if tensor.numel() else (id(tensor), 0), name)
    return {name: state[name].detach().cpu().contiguous() for name in found.values()}


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor], where: Path) -> None:
    """Give a network the weights that `weights_of` gave of one like it.

    Raises:
        UnsupportedModel: it is another network.
    """
    state = model.state_dict()
    wrong = [name for name, tensor in weights.items() if name not in state or state[name].shape != tensor.shape]
    if wrong:
        raise UnsupportedModel(
            f"the function gives another network than it gave at first: {wrong[0]} is not in it as in {where}",
            hint="it must give the same network each time it is called",
        )
    for name, tensor in weights.items():
        state[name].copy_(tensor)


@dataclass(frozen=True)
class _Call:
    """One call of a module: its first input, what it gave, and how many modules had been called before."""

    taken: Any
    given: Any
    begun: int


class _Calls:
    """Every call of every module in one run of a network."""

    def __init__(self) -> None:
        self.made: dict[nn.Module, list[_Call]] = {}
        self._begun: dict[nn.Module, list[int]] = {}
        self._count = 0

    @classmethod
    def of(cls, model: nn.Module, run: Any) -> _Calls:
        """Of a network while it is run."""
        calls = cls()
        with calls._watching(model), torch.no_grad():
            run()
        return calls

    @contextmanager
    def _watching(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for module in set(model.modules()):
                stack.callback(module.register_forward_pre_hook(self._begin).remove)
                stack.callback(module.register_forward_hook(self._end).remove)
            yield

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._begun.setdefault(module, []).append(self._count)
        self._count += 1

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call_ = _Call(args[0] if args else None, output, self._begun[module].pop())
        self.made.setdefault(module, []).append(call_)

    def once(self, module: nn.Module) -> _Call | None:
        """The one call of a module that takes a tensor and gives one; None for any other."""
        calls = self.made.get(module, [])
        if len(calls) != 1 or not isinstance(calls[0].taken, Tensor) or not isinstance(calls[0].given, Tensor):
            return None
        return calls[0]

    def sides(self, blocks: Mapping[str, nn.Module]) -> dict[nn.Module, tuple[int, ...]]:
        """The positions at which modules outside of the blocks are called: before them, after them, or both."""
        first = min(call_.begun for block in blocks.values() for call_ in self.made[block])
        found = {}
        for module, calls in self.made.items():
            where = {BEGIN if call_.begun < first else len(blocks) for call_ in calls}
            found[module] = tuple(sorted(where))
        return found


def _find_blocks(model: nn.Module, calls: _Calls) -> dict[str, nn.Module]:
    """The blocks by name: the longest chain that holds half of the weights, else the whole network."""
    total = sum(parameter.numel() for parameter in model.parameters())
    best: list[str] = [""]
    for path, container in model.named_modules():
        for chain in _chains(container, calls):
            modules = [container.get_submodule(name) for name in chain]
            held = {parameter for module in modules for parameter in module.parameters()}
            if len(chain) > len(best) and 2 * sum(parameter.numel() for parameter in held) >= total:
                best = [".".join(filter(None, (path, name))) for name in chain]
    return {name: model.get_submodule(name) for name in best}


def _chains(container: nn.Module, calls: _Calls) -> Iterator[list[str]]:
    """Children that pass one tensor from each to the next, in the order in which they stand."""
    chain: list[str] = []
    before: _Call | None = None
    for name, module in container.named_children():
        call_ = calls.once(module)
        if call_ is None or before is None or call_.taken is not before.given:
            yield chain
            chain = []
        chain = [*chain, name] if call_ is not None else []
        before = call_
    yield chain
