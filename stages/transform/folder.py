"""A changed network as a Hugging Face folder: the names, dtypes and files of the checkpoint that it was loaded from.

Where a parameter stands there is found while the network is as it was loaded, because some are known by their contents
only (`layerwise.stages.models.stored`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import UnsupportedModel
from layerwise.stages.models.folder import INDEX
from layerwise.stages.models.network import Unit, View
from layerwise.stages.models.stored import Locator, Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from layerwise.stages.models.causal_lm import CausalLM
    from layerwise.stages.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Layout:
    """How the parameters of a network lie in its checkpoint.

    Args:
        checkpoint: that it was loaded from.
        named: parameters that are stored whole, with the tensor; a tied one under each of its names that is stored.
        units: those that are stored in another form.
    """

    checkpoint: Checkpoint
    named: Mapping[str, str]
    units: tuple[tuple[Unit, Stored], ...]

    @classmethod
    def of(cls, network: CausalLM, checkpoint: Checkpoint) -> Layout:
        """That of a network which is as it was loaded.

        Raises:
            UnsupportedModel: a unit's weight is nowhere in the checkpoint.
        """
        locator = Locator(network, checkpoint)
        named = {name: stored for name in network.parameters if (stored := locator.named(name))}
        known = {id(network.parameter(name)) for name in named}
        others = [unit for unit in network.units if _identity(network, unit) not in known]
        return cls(checkpoint, named, tuple((unit, locator.find(unit)) for unit in others))

    def added(self, network: CausalLM, changed: Collection[str]) -> list[str]:
        """Of the parameters that were changed, those that need a tensor of their own: a head that was tied before.

        Raises:
            UnsupportedModel: another one is stored in no form that can be written.
        """
        known = {id(network.parameter(name)) for name in self.named}
        known |= {_identity(network, unit) for unit, _ in self.units}
        missing = [name for name in changed if id(network.parameter(name)) not in known]
        head = _weight_of(network, "get_output_embeddings")
        for name in missing:
            if network.tied or network.parameter(name) is not head:
                raise UnsupportedModel(
                    f"{self.checkpoint.folder}: no tensor {name} of that shape, so what it became cannot be written",
                    hint="load the model with transformers and save it again with `save_pretrained`",
                )
        return missing

    def round(self, network: CausalLM, added: Collection[str]) -> None:
        """Round every parameter to the dtype that it is stored in."""
        for name in (*self.named, *added):
            tensor = network.parameter(name).data
            tensor.copy_(tensor.to(self._dtype(network, name)))
        for unit, stored in self.units:
            network.overwrite(unit, network.weight(unit).to(self.checkpoint.dtype(stored.parts[0].tensor)))

    def save(self, network: CausalLM, added: Collection[str], out: Path) -> None:
        """Write weights, config, tokenizer and whatever else stands beside them.

        Args:
            network: in float32 or wider.
            added: from the method of that name.
            out: the folder, which is empty.
        """
        index = self.checkpoint.contents.index
        for file in (*self.checkpoint.beside, *([] if index is None else [index])):
            shutil.copyfile(file, out / file.name)
        *others, last = self.checkpoint.files
        for file in others:
            self._save_file(file, network, {}, out)
        new = {name: network.parameter(name).data.to(self._dtype(network, name)) for name in added}
        self._save_file(last, network, new, out)
        if new:
            _tell_index(out, str(self.checkpoint.place_of(last)), new)
            _tell_config(out / "config.json")

    def _save_file(self, file: Path, network: CausalLM, new: Mapping[str, Tensor], out: Path) -> None:
        """One weight file: the same tensors, with their values now, and new ones."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
            metadata = opened.metadata()
        for name, stored in self.named.items():
            if stored in tensors:
                tensors[stored].copy_(network.parameter(name).data)
        for view, piece in self._pieces(network):
            if view.tensor in tensors:
                view.write(tensors[view.tensor], piece)
        tensors |= new
        target = out / self.checkpoint.place_of(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, target, metadata=metadata)

    def _pieces(self, network: CausalLM) -> Iterator[tuple[View, Tensor]]:
        for unit, stored in self.units:
            yield from stored.pieces(network.weight(unit), self.checkpoint)

    def _dtype(self, network: CausalLM, name: str) -> torch.dtype:
        """That a parameter is stored in; of a new head, that of the embedding."""
        if name not in self.named:
            embedding = _weight_of(network, "get_input_embeddings")
            name = next(name for name in self.named if network.parameter(name) is embedding)
        return self.checkpoint.dtype(self.named[name])


def _identity(network: CausalLM, unit: Unit) -> int:
    assert unit.view is not None
    return id(network.parameter(unit.view.tensor))


def _weight_of(network: CausalLM, getter: str) -> Tensor | None:
    """The weight of the embedding or the head."""
    weight: Any = getattr(getattr(network.model, getter)(), "weight", None)
    return weight  # type: ignore[no-any-return]


def _tell_index(out: Path, file: str, new: Mapping[str, Tensor]) -> None:
    """Say where new tensors are, if the weights are in several files."""
    path = out / INDEX
    if path.is_file():
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] |= dict.fromkeys(new, file)
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += sum(value.numel() * value.element_size() for value in new.values())
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tell_config(path: Path) -> None:
    """Say that the head has a weight of its own."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *config.values()):
        if part is config or (isinstance(part, dict) and "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
