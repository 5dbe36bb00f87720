"""A network taken apart into what stands before its blocks, the blocks, and what stands after them.

The model's own `forward` knows how its blocks are called (masks, rotary embeddings, positions), so we let it run once
with every block replaced by a recorder that passes the hidden state through; what the recorder saw is how each block
must be called. In the same way the end is the model's own `forward` with every block bypassed. When a model is loaded
its parts are tried on a small batch, and it is refused if they do not give what the model itself gives.

A family says how its forward is called and which modules are its blocks. Left out: blocks that exchange more than the
hidden state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import UnsupportedModel
from layerwise.stages.models.network import BEGIN, Uncovered, Unit
from layerwise.stages.models.streamed import Streamed
from layerwise.stages.models.units import Answer, patched, units_of_block


@dataclass
class Stream:
    """Hidden states on their way through the blocks, and how each block wants to be called.

    Args:
        ids: the batch that runs: (batch, length) token ids, or whatever the network takes, one entry for each index of
            the first dimension.
        hidden: input of the first block, (batch, ...).
        calls: for every block, its arguments after the hidden state, and its keyword arguments.
    """

    ids: Tensor
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


class _Stop(Exception):
    """Leaves a model's forward once everything of interest has been seen."""


class InBlocks(ABC):
    """A dense model in evaluation mode, frozen. Implements `layerwise.stages.models.network.Network`.

    Args:
        model: the module; its parts are found by `_take_apart`.
        streamed: what reads its blocks when they run; None for a model that is loaded whole.
    """

    only_hidden = "layerwise takes networks whose blocks pass on nothing but the hidden state"
    """What to say where the parts are not the model."""

    block_names: tuple[str, ...]
    blocks: Sequence[nn.Module]
    n_blocks: int

    def __init__(self, model: nn.Module, streamed: Streamed | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.streamed = streamed
        self.units: tuple[Unit, ...] = ()
        self.parents: tuple[Unit, ...] = ()
        self.uncovered: tuple[Uncovered, ...] = ()
        self.one_piece: dict[int, str] = {}
        self._silenced: dict[str, dict[str, Answer]] = {}
        self._bypassed: frozenset[nn.Module] = frozenset()

    # --- what a family says ---

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """The plain forward pass of a batch, in one piece: logits, whose last dimension is the classes."""

    @abstractmethod
    def predictions(self, ids: Tensor) -> int:
        """How many predictions the network makes of one entry of a batch."""

    @abstractmethod
    def targets(self, ids: Tensor, labels: Tensor | None) -> Tensor | None:
        """What is to be predicted, (batch, predictions) or of the first so many; None if nobody knows.

        Args:
            ids: a batch.
            labels: (batch,), what stands beside it, if anything does.
        """

    @abstractmethod
    def _outside(self) -> Sequence[Unit]:
        """The units outside of the blocks, in any order."""

    # --- what it holds ---

    @property
    def device(self) -> torch.device:
        """What it is computed on."""
        return next(self.model.parameters()).device

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules())

    def module(self, name: str) -> nn.Module:
        """A submodule by its full name."""
        return self._modules[name]

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by each of its names; a tied one has two."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter by its full name."""
        return self.parameters[name]

    def owner(self, unit: Unit) -> nn.Module | None:
        """The module whose whole weight a unit is; None for a part of a parameter, or one without such a module."""
        module = self._modules.get(unit.name)
        known = unit.view is not None and unit.view.whole and unit.view.tensor == f"{unit.name}.weight"
        return module if known and isinstance(module, _layers()) else None

    def weight(self, unit: Unit) -> Tensor:
        """A unit's weight, (out, in), as a view of the parameter that holds it."""
        assert unit.view is not None, f"{unit.name} has no weight of its own"
        return unit.view.read(self.parameter(unit.view.tensor).data)

    # --- finding out what it is made of ---

    @torch.no_grad()
    def _take_apart(
        self, blocks: Mapping[str, nn.Module], trial: Tensor, whole: Tensor, answer: Answer | None = None
    ) -> None:
        """Find the units and check that the parts give the logits of the whole.

        Args:
            blocks: by their names, in the order in which they run.
            trial: a small batch.
            whole: what the model gives for it.
            answer: in which form the blocks answer; if left out, each is tried on the hidden state before the first.
        Raises:
            UnsupportedModel: its parts are not the model.
        """
        self.block_names, self.blocks = tuple(blocks), tuple(blocks.values())
        self.n_blocks = len(blocks)
        self._answers: list[Answer | None] = [answer] * self.n_blocks
        try:
            units, parents, uncovered, parts = self._tried(trial)
        except UnsupportedModel:
            raise
        except Exception as error:  # whatever a block raises that misses what another one would have left for it
            raise UnsupportedModel(
                f"{type(self.model).__name__}: its blocks do not run one by one: {type(error).__name__}: {error}",
                hint=self.only_hidden,
            ) from error
        self._check(parts, whole)
        self.units = self._with_outside(units)
        self.parents = tuple(parents)
        self.uncovered = (*uncovered, *self._uncovered_outside())

    def _tried(self, trial: Tensor) -> tuple[list[Unit], list[Unit], list[Uncovered], Tensor]:
        """Units, parents and uncovered weights of all blocks, and the logits that the parts give."""
        units, parents, uncovered = [], [], []
        stream = self.begin(trial)
        hidden = stream.hidden
        for index in range(self.n_blocks):
            found = units_of_block(self, index, hidden, stream)
            units += found.units
            parents += found.parents
            uncovered += found.uncovered
            self._silenced |= found.silenced
            if found.one_piece:
                self.one_piece[index] = found.one_piece
            hidden = found.output
        return units, parents, uncovered, self.end(hidden, stream)

    def _with_outside(self, units: Sequence[Unit]) -> tuple[Unit, ...]:
        """The units of the blocks with those that stand outside, in the order of first use."""
        outside = self._outside()
        first = [unit for unit in outside if unit.positions[0] < 0]
        return (*first, *units, *(unit for unit in outside if unit not in first))

    def _check(self, parts: Tensor, whole: Tensor) -> None:
        if parts.shape == whole.shape and torch.allclose(parts, whole, rtol=1e-4, atol=1e-4, equal_nan=True):
            return
        difference = (parts - whole).abs().max().item() if parts.shape == whole.shape else float("nan")
        raise UnsupportedModel(
            f"{type(self.model).__name__}: its blocks, run one by one, give other logits than the model "
            f"(they differ by up to {difference:.3g})",
            hint=self.only_hidden,
        )

    def _uncovered_outside(self) -> Iterator[Uncovered]:
        covered = {unit.view.tensor for unit in self.units if unit.view is not None}
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        for name, parameter in self.model.named_parameters():
            names = {other for other, same in self.parameters.items() if same is parameter}
            if parameter.dim() >= 2 and id(parameter) not in inside and not names & covered:
                yield Uncovered(name, None, parameter.numel(), "it stands outside of the blocks, head and embedding")

    # --- running it ---

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """The plain forward pass, in one piece: what the parts must agree with."""
        return self.forward(ids)

    @torch.no_grad()
    def begin(self, ids: Tensor) -> Stream:
        """Everything before the first block.

        Args:
            ids: (batch, ...), on the network's device.
        """
        hidden: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            state, args, kwargs = _split_hidden(args, kwargs)
            if not calls:
                hidden.append(state)
            calls.append((args, kwargs))
            if self._answers[index] is None:
                self._answers[index] = self._answer(index, state, args, kwargs)
            if len(calls) == self.n_blocks:
                raise _Stop
            return state

        with self._blocks_replaced(record), suppress(_Stop):
            self.logits(ids)
        if len(calls) < self.n_blocks:
            raise UnsupportedModel(
                f"{type(self.model).__name__} runs only {len(calls)} of its {self.n_blocks} blocks",
                hint=self.only_hidden,
            )
        return Stream(ids, hidden[0], calls)

    def _answer(self, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
        """In which form a block answers, from its first call: some give a tuple, and their model unpacks it."""
        block = self.blocks[index]
        self.bring(index)
        output = type(block).forward(block, hidden, *args, **kwargs)
        answer = Answer.of(output)
        if answer is None:
            raise UnsupportedModel(
                f"{type(block).__name__} answers with a {type(output).__name__}", hint=self.only_hidden
            )
        return answer

    def bring(self, index: int) -> None:
        """Make sure that a block has its weights before anybody looks at them; it has them in any case when it runs."""
        if self.streamed is not None:
            self.streamed.bring(self.blocks[index])

    @torch.no_grad()
    def run_block(self, index: int, hidden: Tensor, stream: Stream) -> Tensor:
        """Hidden state after one block, from the hidden state before it; both (batch, ...)."""
        return self.differentiable_block(index, hidden, stream, {})

    def differentiable_block(
        self, index: int, hidden: Tensor, stream: Stream, parameters: Mapping[str, Tensor]
    ) -> Tensor:
        """The same with other tensors for some parameters of the block, by their full names; gradients reach them."""
        args, kwargs = stream.calls[index]
        prefix = joined(self.block_names[index], "")
        inside = {name.removeprefix(prefix): tensor for name, tensor in parameters.items()}
        output = torch.func.functional_call(self.blocks[index], inside, (hidden, *args), kwargs)
        return output if isinstance(output, Tensor) else output[0]

    @torch.no_grad()
    def end(self, hidden: Tensor, stream: Stream) -> Tensor:
        """Logits, from the hidden state after the last block, as `logits` gives them."""
        with self._blocks_replaced(lambda index, args, kwargs: hidden):
            return self.logits(stream.ids)

    @contextmanager
    def _blocks_replaced(self, answer: Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        def replaced(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = answer(index, args, kwargs)
                form = self._answers[index]
                return hidden if form is None else form.wrapped(hidden)

            return forward

        with patched({block: replaced(index) for index, block in enumerate(self.blocks)}):
            before, self._bypassed = self._bypassed, frozenset(self.blocks)
            try:
                yield
            finally:
                self._bypassed = before

    def bypasses(self, module: nn.Module) -> bool:
        """Whether a module is a block that something stands for just now: what it is called with is not its input."""
        return module in self._bypassed

    # --- leaving parts out, and changing weights for good ---

    def modules_of(self, parent: Unit) -> list[str]:
        """The modules that a parent is made of."""
        return [parent.name] if parent.role == "block" else list(self._silenced[parent.name])

    @contextmanager
    def without(self, halves: Sequence[Unit]) -> Iterator[None]:
        """Leave out half-blocks while their block runs; a whole block is left out by not running it."""
        answers = {name: answer for half in halves for name, answer in self._silenced[half.name].items()}
        with patched({self.module(name): answer.silent() for name, answer in answers.items()}):
            yield

    def leave_out(self, names: Sequence[str]) -> None:
        """Leave out half-blocks and blocks for good, with all units inside."""
        for parent in [parent for parent in self.parents if parent.name in names]:
            if parent.role == "block":
                answer = self._answers[parent.block or 0]
                assert answer is not None, "a network was tried when it was made"
                self.module(parent.name).forward = answer.passing_on()
            else:
                for name, answer in self._silenced[parent.name].items():
                    self.module(name).forward = answer.silent()
        gone = set(names)
        for parent in self.parents:  # a block before its halves
            gone |= {parent.name} if parent.parent in gone else set()
        self.parents = tuple(parent for parent in self.parents if parent.name not in gone)
        self.units = tuple(unit for unit in self.units if unit.parent not in gone)

    @property
    def tied(self) -> bool:
        """Whether the head and the embedding share their weight."""
        return any(unit.role == "head" and BEGIN in unit.positions for unit in self.units)

    @torch.no_grad()
    def overwrite(self, unit: Unit, weight: Tensor) -> None:
        """Give a unit another weight (out, in) for good, in the dtype that the network is computed in."""
        assert unit.view is not None
        unit.view.write(self.parameter(unit.view.tensor).data, weight)


def joined(path: str, name: str) -> str:
    """The full name of a module inside another; either may be empty."""
    return f"{path}.{name}" if path else name


def _layers() -> tuple[type, ...]:
    """Modules that are a weight and little else."""
    from transformers.pytorch_utils import Conv1D

    return (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], (), rest
