"""Runs a workflow: plans it against the cache, does what is missing, and keeps a durable account of everything.

A run is one workflow with one set of inputs; its id says which, so running the same thing again continues or finds the
same run, and two at once wait for each other. A stage's key is the hash of its code, its parameters and the digests of
what goes into it; a stage whose artifact is there is never run again, and an interrupted one finds the answers of its
finished items. Nothing depends on an orderly end: whatever was acknowledged is on the disk.

This process is the only writer of tables. It loads neither torch nor Ray unless something is missing.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise.errors import CorruptArtifact, LayerwiseError, StoreError
from layerwise.pipeline.artifacts import Artifact, ArtifactStore, canonical, digest_of, locked
from layerwise.pipeline.display import Display
from layerwise.pipeline.doctor.versions import installed_version
from layerwise.pipeline.executors import RawExecutor, open_executor
from layerwise.pipeline.executors.journal import JournaledExecutor
from layerwise.pipeline.executors.raw import process_peak_rss_bytes
from layerwise.pipeline.fetch import Fetched, fetch
from layerwise.pipeline.runs.account import Account
from layerwise.pipeline.runs.attempt import begin_attempt
from layerwise.pipeline.runs.log import recorded
from layerwise.pipeline.source import source_digest
from layerwise.pipeline.workflow import Node, Workflow
from layerwise.pipeline.workflow.yaml12 import dump
from layerwise.results.durable import disk_full_named, make_folder, replace_file
from layerwise.results.store import Store
from layerwise.stages.contract import Context, Row

KEY_FORMAT = 2
"""Raised when the material of a key changes its meaning."""

VERSIONS = ("torch", "transformers")
"""Packages whose version is part of every key: another one may compute other bytes."""

WORKFLOW = "workflow.yaml"
"""The file in a run's folder that holds its workflow, with nothing left to defaults or to other files."""


@dataclass
class StagePlan:
    """What is known of a stage before it runs.

    Args:
        node: the stage.
        key: None while an input is not there yet.
        material: what the key was made from.
        artifact: None if it must be made.
        reason: why it must be made.
    """

    node: Node
    key: str | None = None
    material: dict[str, Any] = field(default_factory=dict)
    artifact: Artifact | None = None
    reason: str = ""


class Run:
    """One workflow with its inputs in one results folder.

    Args:
        workflow: what to run.
        root: the results folder, made if missing.
        display: is told what happens.
        written: the resolved workflow as it was written, where this machine has its files elsewhere; it is what is
            recorded, and it gives the same id, because that depends on contents alone.
    """

    def __init__(
        self, workflow: Workflow, root: Path, display: Display, written: Mapping[str, Any] | None = None
    ) -> None:
        self.workflow, self.display = workflow, display
        self.store = Store.open(root, create=True)
        self.artifacts = ArtifactStore(root)
        self.sources: Fetched = fetch(workflow, root, self.artifacts.digests)
        self.artifacts.digests.save()
        self.resolved = workflow.resolved() if written is None else dict(written)
        self.id = self._id()
        self.folder = root / "runs" / self.id

    def _id(self) -> str:
        """The workflow's name and eight digits of what it is: stages, parameters, the digests of model and texts."""
        material = {
            "stages": {node.id: self.resolved["stages"][node.id] | {"resources": None} for node in self.workflow.nodes},
            "model": self.sources.model_digest,
            "data": dict(self.sources.data_digests),
        }
        name = re.sub(r"[^A-Za-z0-9._-]", "-", self.workflow.name).strip(".-_") or "run"
        return f"{name}-{digest_of(material)[:8]}"

    # --- planning ---

    def plan(self) -> list[StagePlan]:
        """What each stage finds in the cache, producers first."""
        plans: dict[str, StagePlan] = {}
        for node in self.workflow.nodes:
            plans[node.id] = self._plan_stage(node, plans)
        return list(plans.values())

    def _plan_stage(self, node: Node, plans: Mapping[str, StagePlan]) -> StagePlan:
        plan = StagePlan(node)
        waiting = [id_ for ids in node.inputs.values() for id_ in ids if plans[id_].artifact is None]
        if waiting:
            plan.reason = f"waits for {', '.join(waiting)}"
            return plan
        plan.material = self._material(node, plans)
        plan.key = digest_of(plan.material)
        try:
            plan.artifact = self.artifacts.find(plan.key)
            plan.reason = "" if plan.artifact else self._explain(node, plan)
        except CorruptArtifact:
            plan.reason = "damaged"  # and moved away by whoever makes it again
        return plan

    def _material(self, node: Node, plans: Mapping[str, StagePlan]) -> dict[str, Any]:
        texts = {name: getattr(node.params, name) for name in node.stage.data}
        return {
            "format": KEY_FORMAT,
            "uses": node.stage.name,
            "impl": node.stage.impl,
            "source": source_digest(node.stage.run, *_named_sources(node)),
            "versions": {name: installed_version(name) for name in VERSIONS},
            "with": node.params.material(),
            "inputs": {port: [_digest(plans[id_]) for id_ in ids] for port, ids in node.inputs.items() if ids},
            "model": self.sources.model_digest,
            "data": {name: self.sources.data_digests[text] for name, text in texts.items()},
            "device": "cpu",
            "threads": node.resources.threads,
            **({"machine": dict(node.stage.measures(node.params))} if node.stage.measures else {}),
        }

    def _find(self, key: str) -> Artifact | None:
        try:
            return self.artifacts.find(key)
        except CorruptArtifact as error:
            place = self.artifacts.quarantine(key)
            self.display.warn(f"{error.message}; moved to {place} and made again")
            return None

    def _explain(self, node: Node, plan: StagePlan) -> str:
        """Why a stage must run: what differs from the last artifact of the stage of this name, in whichever run."""
        if plan.key is not None and self.artifacts.work(plan.key).is_dir():
            return "interrupted before"
        rows = [row for row in self.store.rows("stages") if row["stage"] == node.id]
        if any(row["stage_key"] == plan.key and row["status"] == "ok" for row in rows):
            return "no longer there"
        rows.sort(key=lambda row: row["written_at"], reverse=True)
        for key in dict.fromkeys(row["stage_key"] for row in rows):
            with suppress(CorruptArtifact):
                previous = self.artifacts.find(key) if key else None
                if previous is not None:
                    return "changed: " + ", ".join(_differences(previous.material, _as_json(plan.material)))
        return "not there yet"

    # --- running ---

    def execute(
        self,
        executor: str,
        argv: Sequence[str] = (),
        *,
        wait: bool = True,
        address: str | None = None,
        submitted: int | None = None,
    ) -> None:
        """Run every stage that is not in the cache.

        Args:
            executor: `ray` or `inline`; opened at the first stage that is missing.
            argv: the command, for the record.
            wait: for another process that runs the same; if not, it is an error.
            address: of a running cluster that the executor is to join.
            submitted: the number of the attempt, if it was submitted to that cluster.
        Raises:
            LayerwiseError: a stage stopped; what was finished is kept.
            StoreError: another process runs the same, and it is not to be waited for.
        """
        with locked(self.folder / "lock", self._wait if wait else self._refuse):
            self.keep_workflow()
            account = Account(
                self.store,
                run=self.id,
                name=self.workflow.name,
                resolved=self.resolved,
                executor=executor,
                argv=argv,
            )
            attempt = begin_attempt(self.folder, executor, argv, self.artifacts.tmp, submitted)
            with (
                account.open(attempt.number),
                self._recorded(account.attempt),
                self._displayed(),
                _lazily_opened(executor, address) as opened,
            ):
                self._execute_stages(account, opened)

    def _wait(self, pid: int | None) -> None:
        self.display.note(f"waiting: process {pid} runs {self.id}")

    def _refuse(self, pid: int | None) -> None:
        raise StoreError(
            f"run {self.id} is at work already{'' if pid is None else f', in process {pid}'}",
            hint="`layerwise logs -f` follows it, `layerwise stop` ends it",
        )

    def keep_workflow(self) -> None:
        """All that it takes to run this again, wherever the workflow file has gone."""
        path, text = self.folder / WORKFLOW, dump(self.resolved).encode()
        if not path.is_file() or path.read_bytes() != text:
            replace_file(path, text, self.artifacts.tmp)

    @contextmanager
    def _recorded(self, attempt: int) -> Iterator[None]:
        shown = self.display
        try:
            with recorded(shown, self.folder, attempt) as self.display:
                yield
        finally:
            self.display = shown

    @contextmanager
    def _displayed(self) -> Iterator[None]:
        self.display.begin(self.id, [node.id for node in self.workflow.nodes])
        try:
            yield
        finally:
            self.display.end()

    def _execute_stages(self, account: Account, opened: Callable[[], RawExecutor]) -> None:
        plans: dict[str, StagePlan] = {}
        for node in self.workflow.nodes:
            plan = plans[node.id] = self._plan_stage(node, plans)
            if plan.artifact is None:
                plan.artifact = self._make(plan, account, opened)
            else:
                self.artifacts.discard_work(plan.artifact.key)
                self._hit(plan, plan.artifact, account)
            self._link(node.id, plan.artifact)
        self.artifacts.digests.save()  # what was found is hashed once, and not again by every cached run

    def _hit(self, plan: StagePlan, artifact: Artifact, account: Account) -> None:
        self.display.cached(plan.node.id)
        account.hit(plan.node.id, plan.key, {"uses": plan.node.stage.name, "output_digest": artifact.digest})

    def _make(self, plan: StagePlan, account: Account, opened: Callable[[], RawExecutor]) -> Artifact:
        node, key = plan.node, plan.key
        assert key is not None, "every input is there by now"
        with self.artifacts.claim(key, lambda pid: self.display.note(f"waiting: process {pid} makes stage {node.id}")):
            found = self._find(key)
            if found is not None:
                self._hit(plan, found, account)
                return found
            self.display.start(node.id, node.stage.name, plan.reason)
            started = time.monotonic()
            row: dict[str, Any] = {"uses": node.stage.name, "reason": plan.reason}
            try:
                artifact, counts = self._work(plan, key, account, opened())
            except BaseException as error:
                if isinstance(error, LayerwiseError):
                    error.message = f"stage {node.id}: {error.message}"
                account.failure(node.id, key, {**row, "cache": "miss", "seconds": time.monotonic() - started}, error)
                raise
            row |= counts | {"seconds": time.monotonic() - started, "output_digest": artifact.digest}
            account.stage(node.id, key, {**row, "cache": "partial" if counts["items_cached"] else "miss"})
            self.display.finish(node.id, row["seconds"], counts["items_cached"], counts["items_total"])
            return artifact

    def _work(self, plan: StagePlan, key: str, account: Account, raw: RawExecutor) -> tuple[Artifact, dict[str, int]]:
        node = plan.node
        work = self.artifacts.work(key)
        out, items = work / "out", work / "items"
        if out.exists():
            shutil.rmtree(out)  # of an attempt that was killed; its finished items stand under `items`
        for folder in (out, items):
            make_folder(folder)
        executor = JournaledExecutor(
            raw.sized(node.resources),
            work / "journal",
            tmp=self.artifacts.tmp,
            progress=lambda done, total, note: self.display.progress(node.id, done, total, note),
        )
        seqs: dict[str, int] = {}

        def record(table: str, rows: Sequence[Row]) -> None:
            first = seqs.get(table, 0)
            seqs[table] = first + len(rows)
            self.store.append(
                table, rows, run_id=self.id, stage=node.id, stage_key=key, attempt=account.attempt, first_seq=first
            )

        context = Context(
            out=out,
            items=items,
            model=self.sources.model,
            data=self.sources.data,
            inputs={
                port: tuple(self._folder_of(id_) for id_ in node.inputs.get(port, ())) for port in node.stage.takes
            },
            executor=executor,
            record=record,
            progress=lambda done, total, note: self.display.progress(node.id, done, total, note),
        )
        with disk_full_named(work):
            node.stage.run(context, node.params)
            artifact = self.artifacts.publish(key, out, plan.material)
        self.artifacts.discard_work(key)
        peak = max(executor.peak_rss_bytes, process_peak_rss_bytes())
        return artifact, {
            "items_total": executor.items_total,
            "items_cached": executor.items_cached,
            "peak_rss_bytes": peak,
        }

    def _folder_of(self, stage: str) -> Path:
        return (self.folder / "stages" / stage).resolve()

    def _link(self, stage: str, artifact: Artifact) -> None:
        """`runs/<run>/stages/<stage>` leads to the artifact, so people need not know keys."""
        link = self.folder / "stages" / stage
        make_folder(link.parent)
        target = Path("../../..") / artifact.folder.relative_to(self.store.root)
        if not (link.is_symlink() and link.readlink() == target):
            link.unlink(missing_ok=True)
            link.symlink_to(target)


@contextmanager
def _lazily_opened(name: str, address: str | None) -> Iterator[Callable[[], RawExecutor]]:
    """A function that opens the executor at its first call; closed at the end if it was."""
    opened: list[RawExecutor] = []

    def get() -> RawExecutor:
        if not opened:
            opened.append(open_executor(name, address=address))
        return opened[0]

    try:
        yield get
    finally:
        for executor in opened:
            executor.close()


def _named_sources(node: Node) -> tuple[str, ...]:
    """The modules that a stage looks up by a name in its parameters, if these have a method `sources` that says so."""
    sources = getattr(node.params, "sources", None)
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
