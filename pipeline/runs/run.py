"""Runs a workflow: does what its plan (`plan.py`) finds missing, and keeps a durable account of everything.

A run is one workflow with one set of inputs; its id says which, so running the same thing again continues or finds the
same run, and two at once wait for each other. A stage's key is the hash of its code, its parameters and the digests of
what goes into it; a stage whose artifact is there is never run again, and an interrupted one finds the answers of its
finished items. Nothing depends on an orderly end: whatever was acknowledged is on the disk.

This process is the only writer of tables. It loads neither torch nor Ray unless something is missing.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from layerwise.errors import CorruptArtifact, LayerwiseError, StoreError
from layerwise.pipeline.artifacts import Artifact, ArtifactStore, digest_of, locked
from layerwise.pipeline.display import Display
from layerwise.pipeline.executors import RawExecutor, open_executor
from layerwise.pipeline.executors.journal import JournaledExecutor
from layerwise.pipeline.executors.raw import process_peak_rss_bytes
from layerwise.pipeline.fetch import Fetched, fetch
from layerwise.pipeline.runs.account import Account
from layerwise.pipeline.runs.attempt import begin_attempt
from layerwise.pipeline.runs.devices import check_devices, left_on_cpu
from layerwise.pipeline.runs.kept_workflow import keep_workflow
from layerwise.pipeline.runs.log import recorded
from layerwise.pipeline.runs.plan import Planner, StagePlan
from layerwise.pipeline.runs.separate import check_separate
from layerwise.pipeline.workflow import Node, Workflow
from layerwise.results.durable import disk_full_named, make_folder
from layerwise.results.links import refuse_links, refuse_links_below
from layerwise.results.store import Store
from layerwise.stages.contract import Context, Executor, Row


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
        self.planner = Planner(self.store, self.artifacts, self.sources)
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

    def plan(self) -> list[StagePlan]:
        """What each stage finds in the cache, producers first."""
        return self.planner.plan(self.workflow.nodes)

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
        with locked(self.folder / "lock", self._wait if wait else self._refuse, root=self.store.root):
            self.store.files.mend(self.id)
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
                self._look_ahead(opened)
                plans: dict[str, StagePlan] = {}
                for node in self.workflow.nodes:
                    plan = plans[node.id] = self.planner.plan_stage(node, plans)
                    if plan.artifact is None:
                        plan.artifact = self._make(plan, account, opened)
                    else:
                        self.artifacts.discard_work(plan.artifact.key)
                        self._hit(plan, plan.artifact, account)
                    self._link(node.id, plan.artifact)
                self.artifacts.digests.save()  # what was found is hashed once, and not again by every cached run

    def _wait(self, pid: int | None) -> None:
        self.display.note(f"waiting: process {pid} runs {self.id}")

    def _refuse(self, pid: int | None) -> None:
        raise StoreError(
            f"run {self.id} is at work already{'' if pid is None else f', in process {pid}'}",
            hint="`layerwise logs -f` follows it, `layerwise stop` ends it",
        )

    def keep_workflow(self) -> None:
        """All that it takes to run this again, wherever the workflow file has gone."""
        keep_workflow(self.folder, self.resolved, self.artifacts.tmp)

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

    def _look_ahead(self, opened: Callable[[], RawExecutor]) -> None:
        """Say what stages will leave out or fall back to, before any of them spends hours on the rest, and refuse to
        begin where a GPU is missing or a text is reported on that others have seen."""
        if self.sources.model.trust:
            where = self.sources.model.python or f"code of its own, in {self.sources.model.path}"
            self.display.note(f"the model may run {where} (`trust: true`)")
        on_gpu = any(node.resources.device != "cpu" for node in self.workflow.nodes)
        if on_gpu or any(node.stage.reports or getattr(node.stage, "notes", None) for node in self.workflow.nodes):
            plans = self.plan()
            for plan in plans:
                for text in plan.notes:
                    self.display.note(f"{plan.node.id}: {text}")
            for text in left_on_cpu(plans):
                self.display.note(text)
            check_separate(plans, self.sources.data)
            check_devices(plans, opened)

    def _find(self, key: str) -> Artifact | None:
        try:
            return self.artifacts.find(key)
        except CorruptArtifact as error:
            place = self.artifacts.quarantine(key)
            self.display.warn(f"{error.message}; moved to {place} and made again")
            return None

    def _hit(self, plan: StagePlan, artifact: Artifact, account: Account) -> None:
        self.display.cached(plan.node.id)
        account.hit(plan.node.id, plan.key, {"uses": plan.node.stage.name, "output_digest": artifact.digest})

    def _make(self, plan: StagePlan, account: Account, opened: Callable[[], RawExecutor]) -> Artifact:
        """The artifact of a stage that was not there: made here, or meanwhile by a process that was waited for."""
        node, key = plan.node, plan.key
        assert key is not None, "every input is there by now"
        with self.artifacts.claim(key, lambda pid: self.display.note(f"waiting: process {pid} makes stage {node.id}")):
            found = self._find(key)
            if found is not None and self.store.holds(key, found.rows):
                self._hit(plan, found, account)
                return found
            self.display.start(node.id, node.stage.name, plan.reason)
            with self._accounted(plan, account) as row:
                work = self.artifacts.work(key)
                executor = self._journaled(node, work, opened())
                written: dict[str, int] = {}  # rows by table
                context = self._context(node, key, work, executor, account, written)
                with disk_full_named(work):
                    node.stage.run(context, node.params)
                    artifact = self.artifacts.publish(key, context.out, plan.material, executor.files, written)
                self.artifacts.discard_work(key)
                row["output_digest"] = artifact.digest
                row["items_total"], row["items_cached"] = executor.items_total, executor.items_cached
                row["peak_rss_bytes"] = max(executor.peak_rss_bytes, process_peak_rss_bytes())
            return artifact

    @contextmanager
    def _accounted(self, plan: StagePlan, account: Account) -> Iterator[dict[str, Any]]:
        """Say in the tables and on the display how the making of a stage ended; what it was is filled in meanwhile."""
        stage, started = plan.node.id, time.monotonic()
        row: dict[str, Any] = {"uses": plan.node.stage.name, "reason": plan.reason}
        try:
            yield row
        except BaseException as error:
            if isinstance(error, LayerwiseError):
                error.message = f"stage {stage}: {error.message}"
            account.failure(stage, plan.key, {**row, "cache": "miss", "seconds": time.monotonic() - started}, error)
            raise
        row["seconds"] = time.monotonic() - started
        account.stage(stage, plan.key, {**row, "cache": "partial" if row["items_cached"] else "miss"})
        self.display.finish(stage, row["seconds"], row["items_cached"], row["items_total"])

    def _journaled(self, node: Node, work: Path, raw: RawExecutor) -> JournaledExecutor:
        return JournaledExecutor(
            raw.sized(node.resources),
            work / "journal",
            tmp=self.artifacts.tmp,
            items=work / "items",
            progress=partial(self._progress, node.id),
        )

    def _context(
        self, node: Node, key: str, work: Path, executor: Executor, account: Account, written: dict[str, int]
    ) -> Context:
        """All that a stage may touch; its folders are made."""
        out, items = work / "out", work / "items"
        refuse_links(self.store.root, work)
        refuse_links_below(work)
        for path in items.rglob("*.partial"):  # of writers that were killed
            path.unlink(missing_ok=True)
        if out.exists():
            shutil.rmtree(out)  # of an attempt that was killed; its finished items stand under `items`
        for folder in (out, items):
            make_folder(folder)

        def record(table: str, rows: Sequence[Row]) -> None:
            first = written.get(table, 0)
            written[table] = first + len(rows)
            self.store.append(
                table, rows, run_id=self.id, stage=node.id, stage_key=key, attempt=account.attempt, first_seq=first
            )

        return Context(
            out=out,
            items=items,
            model=replace(self.sources.model, device=node.resources.device),
            data=self.sources.data,
            inputs={
                port: tuple(self._folder_of(id_) for id_ in node.inputs.get(port, ())) for port in node.stage.takes
            },
            executor=executor,
            record=record,
            progress=partial(self._progress, node.id),
        )

    def _progress(self, stage: str, done: int, total: int, note: str) -> None:
        self.display.progress(stage, done, total, note)

    def _folder_of(self, stage: str) -> Path:
        return (self.folder / "stages" / stage).resolve()

    def _link(self, stage: str, artifact: Artifact) -> None:
        """`runs/<run>/stages/<stage>` leads to the artifact, so people need not know keys."""
        link = self.folder / "stages" / stage
        refuse_links(self.store.root, link.parent)
        make_folder(link.parent)
        target = Path("../../..") / artifact.folder.relative_to(self.store.root)
        if not (link.is_symlink() and link.readlink() == target):
            if link.is_dir() and not link.is_symlink():  # the folder was copied by something that follows links
                shutil.rmtree(link)
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
