"""A Hugging Face causal language model, taken apart into embedding, blocks and head.

Works for every family whose blocks are one ModuleList, without a line per family: the model's own `forward` prepares
the inputs of each block (masks, rotary embeddings, positions), so we let it run once with every block replaced by a
recorder that passes the hidden state through. What the recorder saw is how each block must be called. In the same way
the head is the model's own `forward` with every block bypassed. Masks that differ from block to block (Gemma 2) come
out right by themselves. When a model is loaded its parts are tried on a few tokens, in a batch of two, and it is
refused if they do not give the model's own logits, or if its logits depend on tokens that come later.

Of a model that takes more than text (images, sound) it is the text model, with all else left as it is. Left out:
encoder-decoder models, encoders, and blocks that exchange more than the hidden state; these are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import UnsupportedModel
from layerwise.kernels.device import require_gpu
from layerwise.stages.contract import ModelSource
from layerwise.stages.models.network import BEGIN, Uncovered, Unit
from layerwise.stages.models.trust import loading
from layerwise.stages.models.units import Answer, patched, units_of_block, units_outside

TRIAL = (2, 6)
"""Batch and length of the tokens that a model is tried on when it is loaded."""

_ONLY_HIDDEN = "layerwise takes decoder-only models whose blocks pass on nothing but the hidden state"


@dataclass
class Stream:
    """Hidden states on their way through the blocks, and how each block wants to be called.

    Args:
        ids: (batch, length) token ids.
        hidden: (batch, length, width) input of the first block.
        calls: for every block, its arguments after the hidden state, and its keyword arguments.
    """

    ids: Tensor
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


class _Stop(Exception):
    """Leaves a model's forward once everything of interest has been seen."""


class CausalLM:
    """A dense model in evaluation mode, frozen. Implements `layerwise.stages.models.network.Network`.

    Args:
        model: the Hugging Face model.
    Raises:
        UnsupportedModel: its parts are not the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        with suppress(AttributeError, ValueError):  # a family without experts has nothing to set
            self.model.set_experts_implementation("eager")  # type: ignore[operator]  # one by one, so that each is seen
        self._trial = _trial_ids(model).to(self.device)
        whole = self._run_whole()
        self.block_path, self.blocks = _find_blocks(model, self._trial)
        self.n_blocks = len(self.blocks)
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._answers: list[Answer | None] = [None] * self.n_blocks
        self.units: tuple[Unit, ...] = ()
        self.parents: tuple[Unit, ...] = ()
        self.uncovered: tuple[Uncovered, ...] = ()
        self.one_piece: dict[int, str] = {}
        self._silenced: dict[str, dict[str, Answer]] = {}
        self._examine(whole)

    @classmethod
    def load(cls, source: ModelSource) -> CausalLM:
        """Load a local folder, and lay the levels of a compressed model over it, if the source names one.

        Raises:
            UnsupportedModel: not a causal language model, weights missing, it cannot be taken apart, or it takes code
                of its own that is not trusted.
            UsageError: it is to be computed on a GPU, and there is none.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        if source.device == "cuda":
            require_gpu()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            with loading(source.path, source.trust) as options:
                model, info = AutoModelForCausalLM.from_pretrained(
                    source.path,
                    dtype=getattr(torch, source.dtype),
                    use_safetensors=True,
                    output_loading_info=True,
                    **options,
                )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UnsupportedModel(f"cannot load {source.path}: {error}") from error
        if info["missing_keys"] or info.get("mismatched_keys"):
            missing = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", ())]))
            raise UnsupportedModel(
                f"{source.path}: {len(missing)} weights are missing or of another shape, the first is {missing[0]}",
                hint="the folder holds another model than its config.json says",
            )
        network = cls(model.to(source.device))
        if source.compressed is not None:
            from layerwise.stages.models.compressed import CompressedModel

            CompressedModel(source.compressed).install(network)
        return network

    @property
    def device(self) -> torch.device:
        """What it is computed on."""
        return next(self.model.parameters()).device

    def module(self, name: str) -> nn.Module:
        """A submodule by its full name."""
        module: nn.Module = self._modules[name]
        return module

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
    def _run_whole(self) -> Tensor:
        """The logits of the trial tokens, of a model that runs on tokens and predicts each from those before it."""
        name = type(self.model).__name__
        try:
            whole = self.logits(self._trial)
            changed = self._trial.clone()
            half = changed.shape[1] // 2
            changed[:, half:] = self._trial[:, half:].flip(-1).roll(1, 0)
            moved = (self.logits(changed) - whole).abs().nan_to_num()
        except Exception as error:  # whatever a family's code raises
            raise UnsupportedModel(
                f"{name} does not run on token ids alone: {type(error).__name__}: {error}",
                hint="layerwise takes decoder-only models, which need nothing beside text",
            ) from error
        # What the dtype rounds off is far below, what a token tells far above the square root of its precision.
        if moved[:, :half].max() > torch.finfo(whole.dtype).eps ** 0.5 * moved.max():
            raise UnsupportedModel(
                f"{name} is not causal: what it says of a token depends on later ones, so it predicts nothing",
                hint="an encoder (BERT) is no language model; if this one was trained as a decoder, its config.json "
                "must say so (is_decoder: true)",
            )
        return whole

    @torch.no_grad()
    def _examine(self, whole: Tensor) -> None:
        """Find the units and check that the parts give the logits of the whole."""
        try:
            units, parents, uncovered, parts = self._taken_apart()
        except UnsupportedModel:
            raise
        except Exception as error:  # whatever a block raises that misses what another one would have left for it
            raise UnsupportedModel(
                f"{type(self.model).__name__}: its blocks do not run one by one: {type(error).__name__}: {error}",
                hint=_ONLY_HIDDEN,
            ) from error
        self._check(parts, whole)
        self.units = self._with_outside(units)
        self.parents = tuple(parents)
        self.uncovered = (*uncovered, *self._uncovered_outside())

    def _taken_apart(self) -> tuple[list[Unit], list[Unit], list[Uncovered], Tensor]:
        """Units, parents and uncovered weights of all blocks, and the logits that the parts give."""
        units, parents, uncovered = [], [], []
        stream = self.begin(self._trial)
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
        outside = units_outside(self.model, self.n_blocks)
        first = [unit for unit in outside if unit.positions[0] < 0]
        return (*first, *units, *(unit for unit in outside if unit not in first))

    def _check(self, parts: Tensor, whole: Tensor) -> None:
        if parts.shape == whole.shape and torch.allclose(parts, whole, rtol=1e-4, atol=1e-4, equal_nan=True):
            return
        difference = (parts - whole).abs().max().item() if parts.shape == whole.shape else float("nan")
        raise UnsupportedModel(
            f"{type(self.model).__name__}: its blocks, run one by one, give other logits than the model "
            f"(they differ by up to {difference:.3g})",
            hint=_ONLY_HIDDEN,
        )

    def _uncovered_outside(self) -> Iterator[Uncovered]:
        covered = {unit.view.tensor for unit in self.units if unit.view is not None}
        inside = f"{self.block_path}."
        for name, parameter in self.model.named_parameters():
            names = {other for other, same in self.parameters.items() if same is parameter}
            if parameter.dim() >= 2 and not name.startswith(inside) and not names & covered:
                yield Uncovered(name, None, parameter.numel(), "it stands outside of the blocks, head and embedding")

    # --- running it in parts ---

    @torch.no_grad()
    def begin(self, ids: Tensor) -> Stream:
        """Everything before the first block.

        Args:
            ids: (batch, length), int64, on the network's device.
        """
        hidden: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            state, args, kwargs = _split_hidden(args, kwargs)
            if not calls:
                hidden.append(state)
            if self._answers[index] is None:
                self._answers[index] = self._answer(index, state, args, kwargs)
            calls.append((args, kwargs))
            if len(calls) == self.n_blocks:
                raise _Stop
            return state

        with self._blocks_replaced(record), suppress(_Stop):
            self.model(input_ids=ids, use_cache=False)
        if len(calls) < self.n_blocks:
            raise UnsupportedModel(
                f"{type(self.model).__name__} runs only {len(calls)} of its {self.n_blocks} blocks",
                hint="layerwise takes decoder-only models whose blocks run one after another",
            )
        return Stream(ids, hidden[0], calls)

    def _answer(self, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
        """In which form a block answers, from its first call: some give a tuple, and their model unpacks it."""
        block = self.blocks[index]
        output = type(block).forward(block, hidden, *args, **kwargs)
        answer = Answer.of(output)
        if answer is None:
            raise UnsupportedModel(f"{type(block).__name__} answers with a {type(output).__name__}", hint=_ONLY_HIDDEN)
        return answer

    @torch.no_grad()
    def run_block(self, index: int, hidden: Tensor, stream: Stream) -> Tensor:
        """Hidden state after one block, from the hidden state before it; both (batch, length, width)."""
        return self.differentiable_block(index, hidden, stream, {})

    def differentiable_block(
        self, index: int, hidden: Tensor, stream: Stream, parameters: Mapping[str, Tensor]
    ) -> Tensor:
        """The same with other tensors for some parameters of the block, by their full names; gradients reach them."""
        args, kwargs = stream.calls[index]
        inside = {name.removeprefix(f"{self.block_path}.{index}."): tensor for name, tensor in parameters.items()}
        output = torch.func.functional_call(self.blocks[index], inside, (hidden, *args), kwargs)
        return output if isinstance(output, Tensor) else output[0]

    @torch.no_grad()
    def end(self, hidden: Tensor, stream: Stream) -> Tensor:
        """Logits (batch, length, vocabulary), from the hidden state after the last block."""
        with self._blocks_replaced(lambda index, args, kwargs: hidden):
            logits: Tensor = self.model(input_ids=stream.ids, use_cache=False).logits
        return logits

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """The plain forward pass, in one piece: what the parts must agree with."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    @contextmanager
    def _blocks_replaced(self, answer: Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        def replaced(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = answer(index, args, kwargs)
                form = self._answers[index]
                return hidden if form is None else form.wrapped(hidden)

            return forward

        with patched({block: replaced(index) for index, block in enumerate(self.blocks)}):
            yield

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

    def untie(self) -> None:
        """Give the head a weight of its own for good, a copy of the embedding's; they are two units from here on."""
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        config: Any = self.model.config
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        del self.parameters  # they are one more now
        self.units = self._with_outside([unit for unit in self.units if unit.block is not None])

    @torch.no_grad()
    def overwrite(self, unit: Unit, weight: Tensor) -> None:
        """Give a unit another weight (out, in) for good, in the dtype that the network is computed in."""
        assert unit.view is not None
        unit.view.write(self.parameter(unit.view.tensor).data, weight)


def _layers() -> tuple[type, ...]:
    """Modules that are a weight and little else."""
    from transformers.pytorch_utils import Conv1D

    return (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], (), rest


def _trial_ids(model: nn.Module) -> Tensor:
    """Token ids (batch, length) to try a model on; the sequences differ."""
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 2))  # type: ignore[union-attr,operator]
    batch, length = TRIAL
    return (torch.arange(batch * length).reshape(batch, length) * 7 + 3) % max(1, vocabulary)


def _find_blocks(model: nn.Module, ids: Tensor) -> tuple[str, nn.ModuleList]:
    """The ModuleList that is the depth of the model: as long as the config says, and each of its modules runs."""
    config: Any = model.config
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    ran: set[nn.Module] = set()
    with ExitStack() as stack, torch.no_grad():
        for block in {block for blocks in lists.values() for block in blocks}:
            handle = block.register_forward_pre_hook(lambda module, args: ran.add(module))
            stack.callback(handle.remove)
        model(input_ids=ids, use_cache=False)
    for name, blocks in lists.items():
        if ran.issuperset(blocks):
            return name, blocks
    raise UnsupportedModel(
        f"{type(model).__name__}: no ModuleList of {depth} blocks that all run",
        hint="layerwise takes decoder-only models whose blocks stand in one ModuleList",
    )
