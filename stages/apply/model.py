"""A `model` artifact: one allocation made real, as the tensors that differ from the dense checkpoint.

`weights.safetensors` holds every unit's weight in the checkpoint's own name, layout and dtype; `allocation.json` says
where it came from. Everything else of the model is still the dense checkpoint's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.stages.allocate.allocation import Allocation

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "weights.safetensors"


def save_applied(folder: Path, allocation: Allocation, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Write the artifact.

    Args:
        folder: where.
        allocation: what was applied.
        tensors: by name in the checkpoint, as stored there.
        names: unit to the name of its tensor.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / WEIGHTS)
    document = {"allocation": asdict(allocation), "tensors": dict(names)}
    (folder / "allocation.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


class AppliedModel:
    """Reads the artifact, memory-mapped; what it says of the allocation needs no torch.

    Args:
        folder: the artifact.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.folder / "allocation.json").read_text(encoding="utf-8"))
        return document

    @cached_property
    def allocation(self) -> dict[str, Any]:
        """The allocation, as `Allocation` writes itself."""
        allocation: dict[str, Any] = self._document["allocation"]
        return allocation

    @cached_property
    def tensors(self) -> dict[str, str]:
        """Unit to the name of its tensor."""
        tensors: dict[str, str] = self._document["tensors"]
        return tensors

    def read(self, tensor: str) -> Tensor:
        """One changed tensor, by its name in the checkpoint."""
        from safetensors import safe_open

        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            found: Tensor = file.get_tensor(tensor)
            return found


class AppliedModels:
    """Several compressed models of one dense model, seen as levels: level i of a unit is its weight in model i.

    Args:
        folders: their artifacts.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.models = [AppliedModel(folder) for folder in folders]
        self.unit_names = tuple(dict.fromkeys(unit for model in self.models for unit in model.tensors))

    def weight(self, unit: str, level: int) -> Tensor | None:
        """A unit's weight in one of the models, in the checkpoint's layout; None where it stayed dense."""
        model = self.models[level]
        return model.read(model.tensors[unit]) if unit in model.tensors else None
