"""Layer statistics from calibration text: the Hessian of each unit's inputs, one block at a time.

The hidden states of all calibration sequences stand before one block; the block runs on them batch by batch while hooks
add up `H = X X^T` for every distinct input; the results replace the hidden states, the Hessians go to disk, and the
next block follows. So memory holds the hidden states once and the Hessians of one block, whatever the depth. Units that
read the same tensor (q, k and v) share one Hessian. Sums are in float32 and in a fixed order: same bytes every time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from layerwise.results.durable import settle_file
from layerwise.stages.models.causal_lm import CausalLM, Unit


def collect(
    model: CausalLM,
    units: Sequence[Unit],
    sequences: Tensor,
    folder: Path,
    *,
    batch_size: int,
) -> dict[str, str]:
    """Write one file of Hessians per block.

    Args:
        model: the dense model.
        units: the units to take statistics for.
        sequences: (sequences, length) int64.
        folder: gets `block-<index>.safetensors` with float32 (in, in) tensors, named by the first unit that reads
            the input.
        batch_size: sequences that run at a time.
    Returns:
        unit name to the name of its Hessian.
    """
    batches = sequences.split(batch_size)
    hidden = [model.embed(batch).hidden for batch in batches]
    aliases: dict[str, str] = {}
    for index in range(len(model.blocks)):
        members = [unit for unit in units if unit.block == index]
        with _HessianHooks(model, members) as hooks:
            for number, batch in enumerate(batches):
                # Masks and positions are made anew for each block: cheap, and of the size of the hidden states if kept.
                hidden[number] = model.run_block(index, hidden[number], model.embed(batch))
        save_file(hooks.hessians, folder / "unfinished")
        settle_file(folder / "unfinished", folder / f"block-{index}.safetensors")
        aliases |= hooks.aliases
    return aliases


class _HessianHooks:
    """Adds up `X X^T` for the inputs of some linear layers while a block runs."""

    def __init__(self, model: CausalLM, units: Sequence[Unit]) -> None:
        self.modules = {unit.name: model.module(unit.name) for unit in units}
        self.hessians: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self._owners: dict[int, tuple[str, Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _HessianHooks:
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(self._observe(name)))
        return self

    def __exit__(self, *failure: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._owners.clear()

    def _observe(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            X: Tensor = args[0]
            owner, _ = self._owners.get(id(X), (None, None))
            if owner is not None and self.aliases.get(name, owner) == owner:
                self.aliases[name] = owner
                return
            # The tensor is kept, so that its id stays its own; the next call of the same unit replaces it.
            self._owners = {key: kept for key, kept in self._owners.items() if kept[0] != name} | {id(X): (name, X)}
            self.aliases[name] = name
            rows = X.reshape(-1, X.shape[-1]).float()
            H = rows.T @ rows
            self.hessians[name] = self.hessians[name] + H if name in self.hessians else H

        return observe


class Statistics:
    """A `calibrate` artifact: what it knows of each unit.

    Args:
        folder: the artifact.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, Any] = json.loads((folder / "units.json").read_text(encoding="utf-8"))
        self.units: list[dict[str, Any]] = self.index["units"]

    def hessian(self, unit: dict[str, Any]) -> Tensor:
        """`X X^T` of a unit's inputs, (in, in) float32, summed over the calibration tokens."""
        with safe_open(self.folder / f"block-{unit['block']}.safetensors", framework="pt") as file:
            tensor: Tensor = file.get_tensor(unit["hessian"])
            return tensor


def describe(unit: Unit, tensor: str, hessian: str) -> dict[str, Any]:
    """A unit's entry in `units.json`.

    Args:
        unit: the unit.
        tensor: name of its weight in the checkpoint.
        hessian: name of its Hessian.
    """
    return {**asdict(unit), "shape": list(unit.shape), "tensor": tensor, "hessian": hessian}


def add_up(parts: Sequence[Path], target: Path) -> None:
    """The sum, tensor by tensor and in the order given, of safetensors files with the same names."""
    total: dict[str, Tensor] = {}
    for part in parts:
        with safe_open(part, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                total[name] = total[name] + tensor if name in total else tensor
    save_file(total, target)
