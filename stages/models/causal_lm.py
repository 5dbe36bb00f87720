"""A Hugging Face causal language model, taken apart into embedding, blocks and head.

Works for every family whose blocks are one ModuleList, without a line per family: the model's own `forward` prepares
the inputs of each block (masks, rotary embeddings, positions), so we let it run once with every block replaced by a
recorder that passes the hidden state through. What the recorder saw is how each block must be called. In the same way
the head is the model's own `forward` with every block bypassed. Masks that differ from block to block (Gemma 2) come
out right by themselves. Left out: encoder-decoder models, and blocks that exchange more than the hidden state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import ModelSource
from layerwise.stages.models.checkpoint import Checkpoint

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers that serving engines join into one, because they read the same input."""


@dataclass(frozen=True)
class Unit:
    """A linear layer of a block.

    Args:
        name: full module name.
        kind: its name inside the block (`self_attn.q_proj`).
        block: index of its block.
        shape: (out, in), whatever way round the checkpoint stores it.
        transposed: stored as (in, out), as GPT-2's Conv1D does.
        group: what it is fused with (`3.qkv`), or None.
    """

    name: str
    kind: str
    block: int
    shape: tuple[int, int]
    transposed: bool
    group: str | None

    @property
    def n_weights(self) -> int:
        return self.shape[0] * self.shape[1]


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
    """A dense model in evaluation mode, frozen.

    Args:
        model: the Hugging Face model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.block_path, self.blocks = _find_blocks(model)
        self.units = tuple(self._find_units())
        self._modules: dict[str, nn.Module] = dict(model.named_modules())

    @classmethod
    def load(cls, source: ModelSource) -> CausalLM:
        """Load a local folder.

        Raises:
            UnsupportedModel: not a causal language model, weights missing, or no ModuleList of blocks.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                source.path, dtype=getattr(torch, source.dtype), local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UnsupportedModel(f"cannot load {source.path}: {error}") from error
        if info["missing_keys"] or info.get("mismatched_keys"):
            missing = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", ())]))
            raise UnsupportedModel(
                f"{source.path}: {len(missing)} weights are missing or of another shape, the first is {missing[0]}",
                hint="the folder holds another model than its config.json says",
            )
        return cls(model)

    def module(self, name: str) -> nn.Module:
        """A submodule by its full name."""
        module: nn.Module = self._modules[name]
        return module

    def weight(self, unit: Unit) -> Tensor:
        """The parameter that holds a unit's weight, as the model keeps it."""
        weight = self.module(unit.name).weight
        assert isinstance(weight, Tensor)
        return weight

    def stored_name(self, unit: Unit, checkpoint: Checkpoint) -> str:
        """Name of a unit's weight in the checkpoint.

        Raises:
            UnsupportedModel: the checkpoint keeps it under another name or in another shape.
        """
        shape = tuple(self.weight(unit).shape)
        name = checkpoint.find(f"{unit.name}.weight", shape, str(self.model.base_model_prefix))
        if name is None:
            raise UnsupportedModel(
                f"{checkpoint.folder}: no tensor {unit.name}.weight of shape {shape}",
                hint="load the model with transformers and save it again with `save_pretrained`",
            )
        return name

    def _find_units(self) -> Iterator[Unit]:
        from transformers.pytorch_utils import Conv1D

        for index, block in enumerate(self.blocks):
            for kind, module in block.named_modules():
                if not isinstance(module, nn.Linear | Conv1D):
                    continue
                transposed = isinstance(module, Conv1D)
                rows, columns = module.weight.shape
                yield Unit(
                    name=f"{self.block_path}.{index}.{kind}",
                    kind=kind,
                    block=index,
                    shape=(columns, rows) if transposed else (rows, columns),
                    transposed=transposed,
                    group=_fused_group(index, kind, block),
                )

    # --- running it in parts ---

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Stream:
        """Everything before the first block.

        Args:
            ids: (batch, length), int64.
        """
        hidden: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            state, args, kwargs = _split_hidden(args, kwargs)
            if not calls:
                hidden.append(state)
            calls.append((args, kwargs))
            if len(calls) == len(self.blocks):
                raise _Stop
            return state

        with self._blocks_replaced(record), suppress(_Stop):
            self.model(input_ids=ids, use_cache=False)
        return Stream(ids, hidden[0], calls)

    @torch.no_grad()
    def run_block(self, index: int, hidden: Tensor, stream: Stream) -> Tensor:
        """Hidden state after one block, from the hidden state before it; both (batch, length, width)."""
        args, kwargs = stream.calls[index]
        output = self.blocks[index](hidden, *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    @torch.no_grad()
    def head(self, hidden: Tensor, stream: Stream) -> Tensor:
        """Logits (batch, length, vocabulary), from the hidden state after the last block."""
        with self._blocks_replaced(lambda args, kwargs: hidden):
            logits: Tensor = self.model(input_ids=stream.ids, use_cache=False).logits
        return logits

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """The plain forward pass, in one piece: what the parts must agree with."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    @contextmanager
    def _blocks_replaced(self, answer: Callable[[tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        for block in self.blocks:
            block.forward = lambda *args, **kwargs: answer(args, kwargs)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward  # uncovers the class's own


def select_units(units: Sequence[Unit], targets: Sequence[str], ignore: Sequence[str]) -> list[Unit]:
    """The units that any target names and nothing ignores.

    Args:
        targets: exact names, `re:` and a regular expression that must match from the start, or kinds; empty for all.
        ignore: the same, taken out.
    Raises:
        UnsupportedModel: nothing is left.
    """

    def named(unit: Unit, patterns: Sequence[str]) -> bool:
        return any(
            re.match(pattern[3:], unit.name) is not None
            if pattern.startswith("re:")
            else pattern in (unit.name, unit.kind)
            for pattern in patterns
        )

    chosen = [unit for unit in units if (not targets or named(unit, targets)) and not named(unit, ignore)]
    if not chosen:
        raise UnsupportedModel(
            f"no unit is left: targets {list(targets)}, ignore {list(ignore)}",
            hint=f"units are named like {units[0].name}" if units else "the blocks hold no linear layers",
        )
    return chosen


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], (), rest


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The ModuleList that is the depth of the model: as long as the config says, of one class."""
    config: Any = model.config
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and len({type(block) for block in module}) == 1:
            return name, module
    raise UnsupportedModel(
        f"{type(model).__name__}: no ModuleList of {depth} equal blocks",
        hint="layerwise takes decoder-only models whose blocks stand in one ModuleList",
    )


def _fused_group(index: int, kind: str, block: nn.Module) -> str | None:
    parent, _, leaf = kind.rpartition(".")
    for family in FUSED:
        members = [f"{parent}.{name}" if parent else name for name in family]
        if leaf in family and all(_has_submodule(block, member) for member in members):
            return f"{index}.{parent}.{'+'.join(family)}"
    return None


def _has_submodule(module: nn.Module, name: str) -> bool:
    return any(name == path for path, _ in module.named_modules())
