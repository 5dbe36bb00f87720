"""What each stage of a workflow finds in the cache, and why it must be made if it finds nothing.

A stage's key is the hash of everything that decides its bytes (`key_material`). An input that is not there yet has no
digest, so a stage behind it has no key, and whether it must be made shows only then: it may get the same bytes again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from layerwise.errors import CorruptArtifact, LayerwiseError
from layerwise.pipeline.artifacts import Artifact, ArtifactStore, canonical, digest_of
from layerwise.pipeline.doctor.versions import installed_version
from layerwise.pipeline.fetch import Fetched
from layerwise.pipeline.source import source_digest
from layerwise.pipeline.workflow import Node
from layerwise.results.store import Store
from layerwise.stages.contract import Params

KEY_FORMAT = 2
"""Raised when the material of a key changes its meaning."""

VERSIONS = ("torch", "transformers")
"""Packages whose version is part of every key: another one may compute other bytes."""


@dataclass
class StagePlan:
    """What is known of a stage before it runs.

    Args:
        node: the stage.
        key: None while an input is not there yet.
        material: what the key was made from.
        artifact: None if it must be made.
        reason: why it must be made.
        notes: what it will leave out or fall back to, if it must be made and says so.
    """

    node: Node
    key: str | None = None
    material: dict[str, Any] = field(default_factory=dict)
    artifact: Artifact | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()


class Planner:
    """Looks stages up in the cache of a results folder.

    Args:
        store: the tables, which know the keys of earlier runs.
        artifacts: the cache.
        sources: the model and the texts, with their digests.
    """

    def __init__(self, store: Store, artifacts: ArtifactStore, sources: Fetched) -> None:
        self.store, self.artifacts, self.sources = store, artifacts, sources

    def plan(self, nodes: Iterable[Node]) -> list[StagePlan]:
        """What each stage finds, producers first."""
        plans: dict[str, StagePlan] = {}
        for node in nodes:
            plan = plans[node.id] = self.plan_stage(node, plans)
            if plan.artifact is None:
                plan.notes = self._notes(node)
        return list(plans.values())

    def plan_stage(self, node: Node, plans: Mapping[str, StagePlan]) -> StagePlan:
        """What a stage finds, given the plans of those that feed it."""
        plan = StagePlan(node)
        waiting = [id_ for ids in node.inputs.values() for id_ in ids if plans[id_].artifact is None]
        if waiting:
            plan.reason = f"waits for {', '.join(waiting)}"
            return plan
        inputs = {port: [_digest(plans[id_]) for id_ in ids] for port, ids in node.inputs.items() if ids}
        plan.material = key_material(node, inputs, self.sources)
        plan.key = digest_of(plan.material)
        try:
            found = self.artifacts.find(plan.key)
            if found is not None and not self.store.holds(found.key, found.rows):
                plan.reason = "its rows are missing"
            else:
                plan.artifact = found
                plan.reason = "" if found else self._explain(node.id, plan.key, plan.material)
        except CorruptArtifact:
            plan.reason = "damaged"  # and moved away by whoever makes it again
        return plan

    def _notes(self, node: Node) -> tuple[str, ...]:
        """What a stage with `notes(params, model) -> lines` has to say before it is made."""
        notes = getattr(node.stage, "notes", None)
        try:
            return () if notes is None else tuple(notes(node.params, self.sources.model))
        except LayerwiseError as error:
            error.message = f"stage {node.id}: {error.message}"
            raise

    def _explain(self, stage: str, key: str, material: Mapping[str, Any]) -> str:
        """Why a stage must run: what differs from the last artifact of the stage of this name, in whichever run."""
        if self.artifacts.work(key).is_dir():
            return "interrupted before"
        rows = [row for row in self.store.rows("stages") if row["stage"] == stage]
        if any(row["stage_key"] == key and row["status"] == "ok" for row in rows):
            return "no longer there"
        rows.sort(key=lambda row: row["written_at"], reverse=True)
        for earlier in dict.fromkeys(row["stage_key"] for row in rows):
            with suppress(CorruptArtifact):
                previous = self.artifacts.find(earlier) if earlier else None
                if previous is not None:
                    return "changed: " + ", ".join(_differences(previous.material, _as_json(material)))
        return "not there yet"


def key_material(node: Node, inputs: Mapping[str, list[str]], sources: Fetched) -> dict[str, Any]:
    """Everything that decides what a stage makes, as JSON.

    Args:
        node: the stage with its parameters.
        inputs: the digests of its input artifacts by port.
        sources: the model and the texts.
    """
    stage, params = node.stage, node.params
    return {
        "format": KEY_FORMAT,
        "uses": stage.name,
        "impl": stage.impl,
        "source": source_digest(stage.run, *_named_sources(params)),
        "versions": {name: installed_version(name) for name in VERSIONS},
        "with": params.material(),
        "inputs": dict(inputs),
        "model": sources.model_digest,
        "data": {
            name: sources.data_digests[text] for name in stage.data if (text := getattr(params, name)) is not None
        },
        "device": node.resources.device,
        "threads": node.resources.threads,
        **({"machine": dict(stage.measures(params))} if stage.measures else {}),
    }


def _named_sources(params: Params) -> tuple[str, ...]:
    """The modules that a stage looks up by a name in its parameters, if these have a method `sources` that says so."""
    sources = getattr(params, "sources", None)
    return tuple(sources()) if callable(sources) else ()


def _digest(plan: StagePlan) -> str:
    assert plan.artifact is not None
    return plan.artifact.digest


def _as_json(document: Any) -> Any:
    """As it is read again after it was written: a tuple has become a list."""
    return json.loads(canonical(document))


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The paths at which two documents differ, with their values where they are short."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            difference
            for key in sorted({*old, *new})
            for difference in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    if old == new:
        return []
    before, after = str(old), str(new)
    return [f"{path} ({before} -> {after})" if len(before) + len(after) < 60 else path]
