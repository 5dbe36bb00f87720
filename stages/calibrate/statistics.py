"""The statistics artifact, read: what `calibrate` knows of each unit.

statistics.json                         the survey of the model, which units were looked at, what was gathered
<statistic>/part-<number>.safetensors   one file for each part of the network; see `collect.statistic_file`
model/                                  the model that they are of, if it is not the workflow's
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import UsageError
from layerwise.stages.calibrate import find_statistic
from layerwise.stages.contract import ModelSource
from layerwise.stages.models.compressed import source_of
from layerwise.stages.models.network import Unit
from layerwise.stages.models.survey import Survey

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "statistics.json"
MODEL = "model"


class Statistics:
    """A `calibrate` artifact.

    Args:
        folder: the artifact.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def index(self) -> dict[str, Any]:
        """All of `statistics.json`."""
        index: dict[str, Any] = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        return index

    @cached_property
    def survey(self) -> Survey:
        """What there is in the model."""
        return Survey.from_json(self.index["survey"])

    @property
    def gathered(self) -> tuple[str, ...]:
        """Names of the statistics."""
        return tuple(self.index["gathered"])

    @property
    def selected(self) -> list[str]:
        """Names of the units that were looked at."""
        selected: list[str] = self.index["selected"]
        return selected

    @property
    def counts(self) -> Mapping[str, int]:
        """Tokens that reached each unit; a unit that is not named was never reached."""
        counts: Mapping[str, int] = self.index["counts"]
        return counts

    def model(self, workflow: ModelSource) -> ModelSource:
        """The model that they are of."""
        return source_of(self.folder / MODEL, workflow)

    def tensor(self, unit: Unit, statistic: str) -> Tensor:
        """A statistic of a unit; see the statistic's module for its shape. Of the inputs of a convolution in groups it
        has one more dimension before the others, the group.

        Raises:
            UsageError: it was not gathered, or not for this unit.
        """
        import torch
        from safetensors import safe_open

        from layerwise.stages.calibrate.collect import group_names, statistic_file

        self._check_gathered(statistic)
        if unit.name not in self.selected:
            raise UsageError(
                f"unit {unit.name} was not calibrated", hint="add it to `targets` of the calibrate stage, too"
            )
        kind = find_statistic(statistic)
        owner = self.index["owners"].get(unit.name) if kind.of == "inputs" else unit.name
        path = statistic_file(self.folder, statistic, unit.positions[-1])
        if owner is None or not path.is_file():
            return kind.neutral(unit, self.index["n_tokens"] if not unit.multiplied else 0)
        with safe_open(path, framework="pt") as file:
            if kind.of == "inputs" and unit.groups > 1:
                return torch.stack([file.get_tensor(name) for name in group_names(owner, unit.groups)])
            tensor: Tensor = file.get_tensor(owner) if owner in file.keys() else kind.neutral(unit, 0)  # noqa: SIM118
            return tensor

    def hidden(self, position: int) -> tuple[Tensor, Tensor]:
        """Token ids (sequences, length), and the hidden states before a block or after the last, (sequences, length,
        width); memory-mapped where one shard holds all.

        Raises:
            UsageError: they were not gathered.
        """
        import torch
        from safetensors.torch import load_file

        self._check_gathered("block_inputs")
        files = sorted(
            (self.folder / "block_inputs").glob(f"part-{position + 1}-*.safetensors"),
            key=lambda file: int(file.stem.rpartition("-")[2]),
        )
        parts = [load_file(file) for file in files]
        if len(parts) == 1:
            return parts[0]["ids"], parts[0]["hidden"]
        return torch.cat([part["ids"] for part in parts]), torch.cat([part["hidden"] for part in parts])

    def _check_gathered(self, statistic: str) -> None:
        if statistic not in self.gathered:
            raise UsageError(
                f"the statistics have no {statistic}, only {', '.join(self.gathered) or 'none'}",
                hint=f"add {statistic} to `statistics` of the calibrate stage, or leave that to the menu",
            )
