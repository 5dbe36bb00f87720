"""The entries under `stages:`, read into one `Draft` per instance.

A draft may still have mistakes: its connections and its texts are checked together with those of the sound ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from layerwise import stages as registry
from layerwise.errors import UsageError, WorkflowError
from layerwise.pipeline.executors import Resources
from layerwise.pipeline.workflow.binding import Reference, Wiring
from layerwise.pipeline.workflow.expressions import Names, aligned_stage, resolve, unresolved
from layerwise.pipeline.workflow.fileformat import ResourcesEntry, StageEntry
from layerwise.pipeline.workflow.foreach import Item, Items
from layerwise.pipeline.workflow.layers import merge
from layerwise.pipeline.workflow.limits import MAX_CHARACTERS, MAX_INSTANCES, MAX_UNFOLDED
from layerwise.pipeline.workflow.mistakes import validate
from layerwise.pipeline.workflow.placing import Asked
from layerwise.pipeline.workflow.report import Report, suggest
from layerwise.pipeline.workflow.yaml12 import KeyPath, Place, Tree
from layerwise.stages.contract import Params, Stage

FindStage: TypeAlias = Callable[[str], Stage] | Mapping[str, Stage]
"""How a name after `uses:` becomes a stage: a function that raises UsageError for an unknown one, or a table."""


class Catalogue:
    """The stages that `uses:` may name."""

    def __init__(self, find_stage: FindStage) -> None:
        self._find = find_stage

    def find(self, name: str) -> Stage:
        """The stage behind a name; raises UsageError for an unknown one."""
        if not isinstance(self._find, Mapping):
            return self._find(name)
        if name not in self._find:
            raise UsageError(f"unknown stage '{name}'{suggest(name, self._find)}")
        return self._find[name]

    def names(self) -> list[str]:
        """Every name, as far as it can be known: a function of the caller's own cannot be asked."""
        if isinstance(self._find, Mapping):
            return list(self._find)
        return registry.stage_names() if self._find is registry.find_stage else []

    def makers(self, artifact: str) -> list[str]:
        """The names of the stages that give a type of artifact."""
        found = []
        for name in self.names():
            try:
                found += [name] if self.find(name).gives == artifact else []
            except ImportError:  # a broken plug-in that the workflow does not use is no reason to stop
                continue
        return found


@dataclass(frozen=True)
class Draft:
    """A stage instance as the file has it.

    Args:
        params: None if they have mistakes.
        given: what stands under `with`, for the places.
        asked: the resources of one task and its device, the workflow's defaults filled in.
    """

    wiring: Wiring
    params: Params | None
    given: Tree
    asked: Asked
    description: str | None


def read_stages(
    tree: Tree, params: Tree, resources: Tree, device: str, catalogue: Catalogue, report: Report
) -> list[Draft]:
    """Every instance of every stage, in the order of the file.

    Args:
        tree: the whole workflow, `stages:` not yet resolved.
        params: the declared parameters.
        resources: the workflow's default resources.
        device: the workflow's.
    """
    entries = tree.entries.get("stages", Tree({}, tree.place)).entries
    names: Names = {"params": params}
    items = Items(entries, names, report)
    drafts: dict[str, Draft] = {}
    allowance = Allowance(report)
    for name, entry in entries.items():
        for item in items.of(name):
            own_names = names if item is None else {**names, "item": item.value}
            reader = _Reader(name, entry, item, own_names, report)
            allowance.take(reader.tree, reader.place, reader.path)
            draft = reader.read(resources, device, catalogue)
            if draft.wiring.id in drafts:
                text = f"there are two stages '{draft.wiring.id}'; rename one"
                report.add(draft.wiring.place, draft.wiring.path, text)
            drafts.setdefault(draft.wiring.id, draft)
    return list(drafts.values())


class Allowance:
    """What the stages of a workflow may add up to; ends the reading where it is more."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.instances = self.values = self.characters = 0

    def take(self, tree: Tree, place: Place, path: KeyPath) -> None:
        """Count one more stage.

        Raises:
            WorkflowError: it is too much; with all mistakes that were found so far.
        """
        self.instances += 1
        self.values += tree.size
        self.characters += tree.characters
        for found, most, what in (
            (self.instances, MAX_INSTANCES, "stages, each foreach unrolled"),
            (self.values, MAX_UNFOLDED, "values in its stages, each foreach unrolled and each expression replaced"),
            (self.characters, MAX_CHARACTERS, "characters in its stages, foreach unrolled and expressions replaced"),
        ):
            if found > most:
                self.report.add(place, path, f"the workflow is too large: more than {most:,} {what}")
                raise WorkflowError(self.report.mistakes, hint="split it into several workflows")


def read_resources(tree: Tree) -> Resources:
    """The resources of one task; the defaults if there are mistakes, which whoever validates the whole reports."""
    entry = validate(ResourcesEntry, tree, (), Report()) or ResourcesEntry()
    return Resources(entry.cpus, entry.gpus, entry.memory)


class _Reader:
    """Reads one instance of one entry."""

    def __init__(self, name: str, entry: Tree, item: Item | None, names: Names, report: Report) -> None:
        self.name, self.item, self.report = name, item, report
        self.path: KeyPath = ("stages", name)
        self.place = entry.key or entry.place
        self.foreach = entry.entries.get("foreach")
        if self.foreach is not None:  # it is `Items` that reads the foreach
            entry = replace(entry, value={key: child for key, child in entry.entries.items() if key != "foreach"})
        self.tree = resolve(entry, names, self.path, report)

    def read(self, default_resources: Tree, default_device: str, catalogue: Catalogue) -> Draft:
        entry = validate(StageEntry, self.tree, self.path, self.report)
        stage = self._stage(catalogue)
        given = self.tree.entries.get("with", Tree({}, self.place, self.place))
        params = None
        if stage is not None and isinstance(given.value, dict):
            params = validate(stage.params, given, (*self.path, "with"), self.report)
        own = self.tree.entries.get("resources", Tree({}, self.place))
        device = entry.device if entry is not None else None
        return Draft(
            wiring=self._wiring(stage, sound=entry is not None),
            params=params,
            given=given,
            asked=Asked(
                read_resources(merge(default_resources, own)),
                device or default_device,
                own_device=device is not None,
                own_gpus="gpus" in own.entries,
            ),
            description=entry.description if entry is not None else None,
        )

    def _stage(self, catalogue: Catalogue) -> Stage | None:
        uses = self.tree.entries.get("uses")
        if uses is None or not isinstance(uses.value, str) or unresolved(uses):
            return None
        try:
            return catalogue.find(uses.value)
        except UsageError as error:
            self.report.add(uses.place, (*self.path, "uses"), error.message)
            return None

    def _wiring(self, stage: Stage | None, *, sound: bool) -> Wiring:
        ports = self.tree.entries.get("inputs", Tree({}, self.place)).entries
        inputs = {port: self._references(child, (*self.path, "inputs", port)) for port, child in ports.items()}
        needs = self._references(self.tree.entries.get("needs", Tree([], self.place)), (*self.path, "needs"))
        followed = aligned_stage(self.foreach) if self.foreach is not None else None
        named = {ref.stage for refs in (needs, *inputs.values()) for ref in refs}
        if self.foreach is not None and followed is not None and followed not in named:
            needs = (*needs, Reference(followed, self.foreach.place, (*self.path, "foreach")))
        id_, axis, index = self.name, None, 0
        if self.item is not None:
            id_, axis, index = f"{self.name}@{self.item.suffix}", self.item.axis, self.item.index
        return Wiring(id_, self.name, stage, self.place, needs, inputs, axis, index, sound)

    def _references(self, tree: Tree, path: KeyPath) -> tuple[Reference, ...]:
        """The stages that a text or a list of texts names."""
        named: list[tuple[KeyPath, Tree]] = [(path, tree)]
        if isinstance(tree.value, list):
            named = [((*path, index), child) for index, child in enumerate(tree.value)]
        found: dict[str, Reference] = {}
        for at, child in named:
            if not isinstance(child.value, str) or unresolved(child):
                continue
            if child.value in found:
                self.report.add(child.place, at, f"'{child.value}' is listed twice")
            found.setdefault(child.value, Reference(child.value, child.place, at))
        return tuple(found.values())
