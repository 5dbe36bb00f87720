"""Blocks that are read from the checkpoint when they run, and forgotten when another one does.

A model is built without weights. What stands outside of its blocks is read at once; a block's parameters keep their
shape, their dtype and their identity, but have no memory until the block is called. Then they are filled from the
memory-mapped safetensors, and those of the block before are let go. So a process holds the embedding, the head and one
block, whatever the depth, and everything else works as with a model that is loaded whole.

Left out: models whose checkpoint keeps weights in another form than they are computed in (experts that are stacked when
they are loaded), and buffers that are not made anew from the configuration; these are loaded whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layerwise.stages.models.checkpoint import Checkpoint

STREAM_BYTES = 1 << 30
"""Weights of a checkpoint from which on blocks are streamed: loading less takes seconds."""


class Streamed:
    """Fills the parameters of one block at a time.

    Args:
        checkpoint: the files.
        names: by parameter, the name of the stored tensor.
        blocks: whose parameters have no memory yet.
    """

    def __init__(self, checkpoint: Checkpoint, names: Mapping[nn.Parameter, str], blocks: Iterable[nn.Module]) -> None:
        self._checkpoint, self._names = checkpoint, names
        self._blocks = frozenset(blocks)
        self._present: nn.Module | None = None
        for block in self._blocks:
            block.register_forward_pre_hook(self._before)

    def bring(self, block: nn.Module) -> None:
        """Make sure that a block has its weights."""
        if block is self._present or block not in self._blocks:
            return
        for parameter in self._present.parameters() if self._present is not None else ():
            parameter.data.untyped_storage().resize_(0)
        self._present = block
        for parameter in block.parameters():
            parameter.data.untyped_storage().resize_(parameter.numel() * parameter.element_size())
            parameter.data.copy_(self._checkpoint.read(self._names[parameter]))

    def _before(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        if "forward" not in vars(block):  # else something stands for it
            self.bring(block)


def without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model whose parameters take no time and no memory; its buffers are as they are always."""
    with _EmptyOnMeta():
        return build()


class _EmptyOnMeta(TorchFunctionMode):
    """Tensors that are made to be filled later have no memory; whatever is computed has."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def streamed(model: nn.Module, checkpoint: Checkpoint, device: str) -> Streamed | None:
    """Give a model that was built without weights those of a checkpoint, block by block.

    Args:
        model: from `without_weights`.
        checkpoint: its files.
        device: where it is computed.
    Returns:
        None if it cannot be read so; then the model is of no use.
    """
    blocks = _blocks(model)
    if not blocks or any(buffer.is_meta for buffer in model.buffers()):
        return None
    inside = {parameter for block in blocks for parameter in block.parameters()}
    prefix = str(getattr(model, "base_model_prefix", ""))
    stored: dict[nn.Parameter, str] = {}
    places = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in places:
        found = checkpoint.find(name, tuple(parameter.shape), prefix)
        if found is not None:
            stored.setdefault(parameter, found)
    if any(parameter not in stored for _, parameter in places):
        return None
    fresh = {
        parameter: _made(parameter, device, None if parameter in inside else checkpoint.read(name))
        for parameter, name in stored.items()
    }
    for name, parameter in places:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, fresh[parameter])
    names = {fresh[parameter]: name for parameter, name in stored.items()}
    model.to(device)  # the buffers
    return Streamed(checkpoint, names, blocks)


def _made(parameter: nn.Parameter, device: str, stored: Tensor | None) -> nn.Parameter:
    """A parameter with what is stored in it; without memory, if that is to be read later."""
    data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    if stored is None:
        data.untyped_storage().resize_(0)
    else:
        data.copy_(stored)
    return nn.Parameter(data, requires_grad=False)


def _blocks(model: Any) -> list[nn.Module]:
    """The modules of the one list that is as long as the model is deep; none where there are several."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    return list(lists[0]) if len(lists) == 1 else []
