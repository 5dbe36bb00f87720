"""The command line in forks of one process that has everything loaded, and the results of a run nobody disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from layerwise.results.frontier import frontier_table
from layerwise.results.store import Store

FORK_SERVER = """
import json, os, sys
import torch, transformers, pandas, pyarrow.dataset, pyarrow.parquet, safetensors.torch
from transformers.models.llama import modeling_llama
import layerwise.solvers, layerwise.stages.evaluate.evaluator
import layerwise.pipeline.runs.run, layerwise.pipeline.executors.inline
from layerwise.pipeline.cli import main
print("ready", flush=True)
for line in iter(sys.stdin.readline, ""):
    argv, log = json.loads(line)
    pid = os.fork()
    if not pid:
        sys.argv = argv
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        try:
            main()
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            code = 70
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    sys.stdin.readline()  # until then the ended process keeps its id, so that no other can be killed in its place
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class ForkServer:
    """Runs the command line in forks of a process that has everything loaded."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == "ready"

    def start(self, arguments: Sequence[str], log: Path) -> int:
        """Start a command; gives its process id."""
        self._say(json.dumps([["layerwise", *arguments], str(log)]))
        return int(self._answer())

    def run(self, workflow: Path, results: Path, log: Path, *sets: str) -> int:
        """Start a run of a workflow, in one process; gives its process id."""
        parts = [part for each in sets for part in ("-s", each)]
        return self.start(["run", str(workflow), "--results", str(results), "--executor", "inline", *parts], log)

    def status(self) -> int:
        """How the command ended: its exit code, or minus the signal that killed it."""
        self._say("")
        return os.waitstatus_to_exitcode(int(self._answer()))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def undisturbed(forks: ForkServer, tiny_workflow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    forks.run(tiny_workflow, folder / "results", folder / "log")
    assert forks.status() == 0, (folder / "log").read_text()
    return folder / "results"


@pytest.fixture(scope="session")
def same_outcome(undisturbed: Path) -> Callable[[Path], None]:
    """`same_outcome(results)` fails unless they are what an uninterrupted run leaves."""

    def check(results: Path) -> None:
        """Bit for bit what an uninterrupted run leaves, every row once."""
        ours, theirs = Store.open(results), Store.open(undisturbed)
        csv = [frontier_table(store, dominated=True).to_csv(index=False) for store in (ours, theirs)]
        assert csv[0] == csv[1]
        assert csv[0].count("\n") == 7  # three budgets, two solvers, and the head
        for table in ("units", "levels", "profile", "candidates", "allocations", "metrics"):
            left, right = (
                store.read(table).drop(columns=["attempt", "written_at", "seconds"], errors="ignore")
                for store in (ours, theirs)
            )
            assert len(right)
            assert left.equals(right), table
        manifests = [
            {path.parent.name: path.read_bytes() for path in folder.glob("artifacts/*/*/manifest.json")}
            for folder in (results, undisturbed)
        ]
        assert manifests[0] == manifests[1]

    return check
