"""What there is to compress in a model: its units and where they stand in the checkpoint, and what is no unit.

A survey is taken once, where a network is loaded, and written into artifacts; the stages behind read it without
torch. It accounts for every byte of the checkpoint: each stored tensor belongs to units, to the parent that it
stands in, or to the rest of the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from layerwise.stages.models.network import Uncovered, Unit
from layerwise.stages.models.stored import Stored

if TYPE_CHECKING:
    from layerwise.stages.contract import ModelSource
    from layerwise.stages.models.in_blocks import InBlocks


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint.

    Args:
        size_bytes: as stored.
        elements: values in it.
        inside: the innermost parent whose module it belongs to, or None.
    """

    size_bytes: int
    elements: int
    inside: str | None


@dataclass(frozen=True)
class Survey:
    """A model, seen from the outside.

    Args:
        units: every weight that can get a level, with its place in the checkpoint.
        parents: half-blocks and blocks; a block before what is in it.
        uncovered: weights that no unit covers.
        one_piece: blocks that have no half-blocks, and why.
        tensors: everything that is stored.
    """

    units: tuple[tuple[Unit, Stored], ...]
    parents: tuple[Unit, ...]
    uncovered: tuple[Uncovered, ...]
    one_piece: Mapping[int, str]
    tensors: Mapping[str, StoredTensor]

    def innermost(self, parent: str | None, given: Collection[str]) -> str | None:
        """The innermost of some parents that something is in, which stands directly in `parent`."""
        above = {other.name: other.parent for other in self.parents}
        while parent is not None and parent not in given:
            parent = above[parent]
        return parent

    def halves(self, given: Collection[str]) -> dict[str, list[str]]:
        """By block, all that it is made of, where all of that is among some parents: without them it is no block."""
        found: dict[str, list[str]] = defaultdict(list)
        for parent in self.parents:
            if parent.parent is not None:
                found[parent.parent].append(parent.name)
        return {block: halves for block, halves in found.items() if {block, *halves} <= set(given)}

    def left(self, units: Iterable[Unit], parents: Iterable[Unit]) -> dict[str | None, tuple[int, int]]:
        """Bytes and values that are in none of some units: by the innermost of some parents, and None for the rest.

        Args:
            units: those that get levels.
            parents: those that get levels.
        """
        chosen, given = {unit.name for unit in units}, {parent.name for parent in parents}
        taken: dict[str, int] = defaultdict(int)
        for unit, stored in self.units:
            if unit.name in chosen:
                for view in stored.parts:
                    taken[view.tensor] += self.tensors[view.tensor].elements if view.whole else unit.n_weights
                for name in stored.copies:
                    taken[name] = self.tensors[name].elements
        found: dict[str | None, tuple[int, int]] = dict.fromkeys((None, *given), (0, 0))
        for name, tensor in self.tensors.items():
            left = tensor.elements - taken[name]
            owner = self.innermost(tensor.inside, given)
            size_bytes, elements = found[owner]
            width = tensor.size_bytes // max(1, tensor.elements)
            found[owner] = size_bytes + left * width, elements + left
        return found

    def without(self, dropped: Iterable[str]) -> Survey:
        """The model without some of its parents, and all that is inside them."""
        gone = set(dropped)
        for parent in self.parents:  # a block before its halves
            gone |= {parent.name} if parent.parent in gone else set()
        return replace(
            self,
            units=tuple(entry for entry in self.units if entry[0].parent not in gone),
            parents=tuple(parent for parent in self.parents if parent.name not in gone),
            uncovered=tuple(weight for weight in self.uncovered if not _in_any(weight.tensor, gone)),
            tensors={name: tensor for name, tensor in self.tensors.items() if tensor.inside not in gone},
        )

    def as_json(self) -> dict[str, Any]:
        """As it stands in an artifact."""
        return {
            "units": [{"unit": unit.as_json(), "stored": stored.as_json()} for unit, stored in self.units],
            "parents": [parent.as_json() for parent in self.parents],
            "uncovered": [asdict(weight) for weight in self.uncovered],
            "one_piece": {str(block): why for block, why in self.one_piece.items()},
            "tensors": {name: asdict(tensor) for name, tensor in self.tensors.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Survey:
        """What `as_json` gave."""
        return cls(
            tuple((Unit.from_json(entry["unit"]), Stored.from_json(entry["stored"])) for entry in document["units"]),
            tuple(map(Unit.from_json, document["parents"])),
            tuple(Uncovered(**entry) for entry in document["uncovered"]),
            {int(block): why for block, why in document["one_piece"].items()},
            {name: StoredTensor(**entry) for name, entry in document["tensors"].items()},
        )


def take_survey(network: InBlocks, source: ModelSource) -> Survey:
    """Survey a loaded model.

    Raises:
        UnsupportedModel: a unit's weight is nowhere in the checkpoint.
    """
    from layerwise.stages.models.checkpoint import Checkpoint
    from layerwise.stages.models.stored import Locator

    checkpoint = Checkpoint(source.path)
    locator = Locator(network, checkpoint)
    units = tuple((unit, locator.find(unit)) for unit in network.units)
    inside = {view.tensor: unit.parent for unit, stored in units for view in stored.parts}
    for parent in network.parents:  # a block before its halves, so the innermost stays
        for module in network.modules_of(parent):
            inside |= dict.fromkeys(locator.names_inside(module, network.parameters), parent.name)
    tensors = {
        name: StoredTensor(checkpoint.tensor_bytes(name), checkpoint.elements(name), inside.get(name))
        for name in checkpoint.headers
    }
    return Survey(units, network.parents, network.uncovered, network.one_piece, tensors)


def _in_any(tensor: str, modules: Iterable[str]) -> bool:
    return any(tensor.startswith(f"{module}.") for module in modules)


def survey_model(source: ModelSource, network: InBlocks | None = None) -> dict[str, Any]:
    """Load a model and survey it; JSON, for a worker's answer. What a compressed model has dropped is not in it.

    Args:
        source: the model.
        network: the same, if it is loaded already; what a compressed model was made of is loaded for itself.
    """
    from layerwise.stages.models.compressed import CompressedModel
    from layerwise.stages.models.loading import load_network

    if network is None or source.compressed is not None:
        network = load_network(replace(source, compressed=None, device="cpu"), block_by_block=True)
    survey = take_survey(network, source)
    if source.compressed is not None:
        units = CompressedModel(source.compressed).document.units
        survey = survey.without(entry.unit.name for entry in units if entry.unit.is_parent)
    return survey.as_json()
