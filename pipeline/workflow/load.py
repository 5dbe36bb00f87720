"""From a workflow file to a checked, frozen `Workflow`.

`load_workflow` reads the file and the layers over it (`layers.py`), resolves `${{ }}` (`expressions.py`), validates
every part (`fileformat.py`, `mistakes.py`, `sources.py`), unrolls the stages (`foreach.py`, `entries.py`), connects
them (`binding.py`), lets each learn what those behind it need (`_filled`), and checks their texts (`heldout.py`). It
goes on after a mistake wherever the rest still makes sense, and raises one `WorkflowError` with all of them. No
artifact is looked at and nothing heavy is imported: this also serves `layerwise validate` and a fully cached run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from layerwise import stages as registry
from layerwise.errors import LayerwiseError, WorkflowError
from layerwise.pipeline.executors import Resources
from layerwise.pipeline.workflow.binding import Inputs, bind, run_order
from layerwise.pipeline.workflow.entries import Catalogue, Draft, FindStage, read_resources, read_stages
from layerwise.pipeline.workflow.expressions import resolve
from layerwise.pipeline.workflow.fileformat import VERSION, WorkflowFile
from layerwise.pipeline.workflow.heldout import check_texts
from layerwise.pipeline.workflow.layers import MADE, apply_params, apply_profile, apply_sets, read_files, read_map
from layerwise.pipeline.workflow.mistakes import validate
from layerwise.pipeline.workflow.placing import Asked, gpu_at_hand, place
from layerwise.pipeline.workflow.report import Report, describe
from layerwise.pipeline.workflow.sources import Model, Tensors, Text, check_family, read_model, read_texts
from layerwise.pipeline.workflow.yaml12 import Place, Tree
from layerwise.stages.contract import BEFORE, Params, Stage


@dataclass(frozen=True)
class Node:
    """One stage instance of a workflow.

    Args:
        id: `search`, or `search@ilp` for one instance of a stage with `foreach`.
        stage: what it runs.
        params: its validated parameters.
        inputs: port -> ids of the instances that feed it.
        resources: of one task, the workflow's defaults filled in, and what it computes on.
        asked: what was asked for; the same workflow may be placed otherwise on another machine.
        place: of its key in the file.
    """

    id: str
    stage: Stage
    params: Params
    inputs: Inputs
    resources: Resources
    asked: Asked
    place: Place
    description: str | None = None

    def resolved(self) -> dict[str, Any]:
        """As it would stand in a file, with nothing left to defaults."""
        many = {port: self.stage.takes[port].many for port in self.inputs}
        inputs = {port: list(ids) if many[port] else ids[0] for port, ids in self.inputs.items() if ids}
        return {
            "uses": self.stage.name,
            **({} if self.description is None else {"description": self.description}),
            **({"inputs": inputs} if inputs else {}),
            "with": self.params.model_dump(mode="json", by_alias=True),
            "resources": _resolved_resources(self.asked.resources),
            **({} if self.asked.device == "auto" else {"device": self.asked.device}),
        }


@dataclass(frozen=True)
class Workflow:
    """A workflow without mistakes: every default filled in, every path absolute.

    Args:
        path: the file, absolute.
        data: the texts by name.
        params: the declared parameters with the values that hold.
        resources: the defaults of one task.
        nodes: the stage instances, producers first, otherwise in the order of the file.
    """

    path: Path
    name: str
    description: str | None
    model: Model
    data: Mapping[str, Text | Tensors]
    params: Mapping[str, Any]
    resources: Resources
    nodes: tuple[Node, ...]

    def resolved(self) -> dict[str, Any]:
        """Plain data with nothing left to defaults or to other files: itself a workflow, and it means the same."""
        return {
            "version": VERSION,
            "name": self.name,
            **({} if self.description is None else {"description": self.description}),
            "model": self.model.resolved(),
            "data": {name: text.resolved() for name, text in self.data.items()},
            "params": dict(self.params),
            "resources": _resolved_resources(self.resources),
            "stages": {node.id: node.resolved() for node in self.nodes},
        }


def _resolved_resources(resources: Resources) -> dict[str, Any]:
    memory = {} if resources.memory_bytes is None else {"memory": resources.memory_bytes}
    return {"cpus": resources.cpus, "gpus": resources.gpus, **memory}


def load_workflow(
    source: Path | str | Mapping[str, Any],
    *,
    params: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    profile: str | None = None,
    find_stage: FindStage = registry.find_stage,
) -> Workflow:
    """Read and check a workflow file.

    Args:
        source: the path of the file, whose relative paths are relative to its folder; or what would stand in one of the
            present folder.
        params: values for declared parameters (`-p`), of their type or as text.
        sets: `path.to.key=value` (`-s`), any key of the format; a later one wins. A relative path given in `params` or
            `sets` is relative to the file's folder too, as if it stood there.
        profile: name of a block under `profiles:` to lay over the file.
        find_stage: how a name after `uses:` becomes a stage.
    Raises:
        UsageError: there is no such file.
        WorkflowError: all mistakes that were found, with file, line and column.
    """
    report, catalogue = Report(), Catalogue(find_stage)
    if isinstance(source, Mapping):
        path, tree = Path(MADE), read_map(source, report)
    else:
        path = Path(source)
        tree = read_files(path, report)
    _check_version(tree, report)
    tree = apply_profile(tree, profile, report)
    tree = apply_sets(tree, sets, report)
    tree = apply_params(tree, params or {}, report)

    declared = tree.entries.get("params", Tree({}, tree.place))
    head = _resolve_head(tree, declared, report)
    header = validate(WorkflowFile, head, (), report)
    model = read_model(head, report)
    data = read_texts(head, report)
    check_family(model, data, head, report)
    default_resources = head.entries.get("resources", Tree({}, tree.place))
    device = "auto" if header is None else header.device
    drafts = read_stages(tree, declared, default_resources, device, catalogue, report)
    wirings = [draft.wiring for draft in drafts]
    inputs = bind(wirings, report, catalogue.makers)
    order = run_order(wirings, report)
    drafts = _filled(drafts, inputs, order, report)
    check_texts(drafts, data, report)
    _check_together(drafts, inputs, report)
    if model is not None and model.python is not None:
        _check_any_network(drafts, report)
    placed = _placed(drafts, report)
    if report.mistakes or header is None or model is None:
        raise WorkflowError(report.mistakes, hint=_hint(drafts))

    by_id = {draft.wiring.id: draft for draft in drafts}
    return Workflow(
        path=path.absolute(),
        name=header.name or path.stem,
        description=header.description,
        model=model,
        data={name: text for name, text in data.items() if text is not None},
        params=declared.plain(),
        resources=read_resources(default_resources),
        nodes=tuple(_node(by_id[id_], inputs[id_], *placed[id_]) for id_ in order),
    )


def _check_version(tree: Tree, report: Report) -> None:
    version = tree.entries.get("version")
    if version is None:
        report.add(tree.place, ("version",), f"this key is required; begin the file with 'version: {VERSION}'")
    elif version.value != VERSION or isinstance(version.value, bool):
        text = f"this layerwise reads version {VERSION}, got {describe(version.value)}"
        report.add(version.place, ("version",), text)
        if isinstance(version.value, int) and version.value > VERSION:
            # Whatever else looks wrong may be right in that format.
            raise WorkflowError(report.mistakes, hint="upgrade layerwise")


def _resolve_head(tree: Tree, declared: Tree, report: Report) -> Tree:
    """The workflow without `x-` keys, its expressions resolved outside of the stages, which have names of their own."""
    entries = {name: child for name, child in tree.entries.items() if not name.startswith("x-")}
    for name in entries.keys() - {"version", "params", "profiles", "stages"}:
        entries[name] = resolve(entries[name], {"params": declared}, (name,), report)
    version = entries.get("version", tree)
    entries["version"] = replace(version, value=VERSION)  # a wrong one is reported by _check_version
    return replace(tree, value=entries)


def _filled(drafts: Sequence[Draft], inputs: Mapping[str, Inputs], order: Sequence[str], report: Report) -> list[Draft]:
    """The drafts, each with what the stages that take its artifact need of it.

    A stage with `fill(params, following) -> params` is given the parameters of every instance that takes its artifact
    directly, in running order; those behind it are filled first, so what they were given is seen. Filling what is
    filled must change nothing, because a resolved workflow is read again.
    """
    by_id = {draft.wiring.id: draft for draft in drafts}
    for id_ in reversed(order):
        draft = by_id[id_]
        fill = getattr(draft.wiring.stage, "fill", None)
        followers = [by_id[other] for other in order if any(id_ in ids for ids in inputs.get(other, {}).values())]
        if fill is None or draft.params is None or any(follower.params is None for follower in followers):
            continue  # a mistake, which is reported: who has it may be who needs something
        try:
            by_id[id_] = replace(draft, params=fill(draft.params, [follower.params for follower in followers]))
        except LayerwiseError as error:
            hint = f" ({error.hint})" if error.hint else ""
            report.add(draft.wiring.place, draft.wiring.path, error.message + hint)
    return [by_id[draft.wiring.id] for draft in drafts]


def _check_together(drafts: Sequence[Draft], inputs: Mapping[str, Inputs], report: Report) -> None:
    """Report what a stage finds wrong with its parameters beside those of the stages that feed it."""
    params = {draft.wiring.id: draft.params for draft in drafts}
    for draft in drafts:
        wiring = draft.wiring
        feeding = {port: [params.get(id_) for id_ in ids] for port, ids in inputs.get(wiring.id, {}).items()}
        feeding[BEFORE] = [params.get(id_) for id_ in _before(wiring.id, inputs)]
        complete = draft.params is not None and all(None not in given for given in feeding.values())
        if wiring.stage is None or wiring.stage.check is None or not complete:
            continue
        for path, text in wiring.stage.check(draft.params, feeding):
            report.add(draft.given.place_of(path), (*wiring.path, "with", *path), text)


def _check_any_network(drafts: Sequence[Draft], report: Report) -> None:
    """Report stages that take language models only, where the model is a network of the user's own."""
    for draft in drafts:
        stage, params = draft.wiring.stage, draft.params
        if stage is not None and params is not None and not (stage.any_network and stage.any_network(params)):
            how = "" if stage.any_network is None else ", with these parameters"
            report.add(draft.wiring.place, draft.wiring.path, f"{stage.name} takes language models only{how}")


def _placed(drafts: Sequence[Draft], report: Report) -> dict[str, tuple[Asked, Resources]]:
    """What remains of each stage's request, and what its tasks get."""
    at_hand = cache(gpu_at_hand)
    found = {}
    for draft in drafts:
        stage, params = draft.wiring.stage, draft.params
        if stage is not None and params is not None:
            asked, resources, mistake = place(draft.asked, stage, params, at_hand)
            found[draft.wiring.id] = asked, resources
            if mistake:
                report.add(draft.wiring.place, draft.wiring.path, mistake)
    return found


def _before(stage: str, inputs: Mapping[str, Inputs]) -> list[str]:
    """Every stage that a stage's inputs were made with, in whatever number of steps."""
    found: dict[str, None] = {}
    waiting = [stage]
    while waiting:
        for ids in inputs.get(waiting.pop(), {}).values():
            waiting += [id_ for id_ in ids if id_ not in found]
            found |= dict.fromkeys(ids)
    return list(found)


def _hint(drafts: Sequence[Draft]) -> str | None:
    """Where to look up parameters, if those of a stage have mistakes."""
    wrong = dict.fromkeys(d.wiring.stage.name for d in drafts if d.wiring.stage is not None and d.params is None)
    stage = next(iter(wrong), None)
    return None if stage is None else f"`layerwise schema --stage {stage}` lists the parameters of '{stage}'"


def _node(draft: Draft, inputs: Inputs, asked: Asked, resources: Resources) -> Node:
    wiring = draft.wiring
    assert wiring.stage is not None, "every mistake has been raised"
    assert draft.params is not None, "every mistake has been raised"
    return Node(wiring.id, wiring.stage, draft.params, inputs, resources, asked, wiring.place, draft.description)
