"""Stages that count and add up, fast enough to run the real engine a hundred times.

Every call of an item and every run of a stage leaves a trace beside the model folder, so that a test can say what was
worked out and how often, across processes. What shall go wrong is said there too, in files under `switches/`, because a
parameter would be part of the key. Started as a program, this file is the command line with these stages added.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from layerwise.errors import InfeasibleBudget
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.workflow import load_workflow
from layerwise.stages.contract import Context, Params, Port, Stage, always


class CountParams(Params):
    """How far to count, and in which steps."""

    items: int = Field(4, ge=1)
    scale: int = 1
    data: str = "calibration"


class ModuloParams(Params):
    """The base."""

    base: int = 2


class TotalParams(Params):
    """Nothing."""


def count(context: Context, params: CountParams) -> None:
    _trace(context.model.path.parent, "count")
    call = partial(_item, folder=context.model.path.parent, items=context.items, scale=params.scale)
    numbers = range(params.items)
    answers = context.executor.map(call, list(numbers), keys=[f"n-{n}" for n in numbers], note="numbers")
    (context.out / "numbers.json").write_text(json.dumps(answers))
    context.record(
        "units", [{"unit": f"n-{n}", "n_weights": answer} for n, answer in zip(numbers, answers, strict=True)]
    )


def modulo(context: Context, params: ModuloParams) -> None:
    _trace(context.model.path.parent, "modulo")
    numbers = json.loads((context.input("numbers") / "numbers.json").read_text())
    (context.out / "numbers.json").write_text(json.dumps([number % params.base for number in numbers]))


def total(context: Context, params: TotalParams) -> None:
    _trace(context.model.path.parent, "total")
    numbers = [n for folder in context.inputs["numbers"] for n in json.loads((folder / "numbers.json").read_text())]
    (context.out / "total.json").write_text(json.dumps(sum(numbers)))


def _item(number: int, *, folder: Path, items: Path, scale: int) -> int:
    _trace(folder, f"n-{number}")
    switch = folder / "switches" / f"n-{number}"
    if switch.is_file():
        ACTIONS[switch.read_text()](switch, items)
    return number * scale


def _trace(folder: Path, name: str) -> None:
    (folder / "traces" / f"{name}:{os.getpid()}-{time.monotonic_ns()}").touch()


def _refuse(switch: Path, items: Path) -> None:
    raise InfeasibleBudget("bits", 1.0, 2.0)


def _break(switch: Path, items: Path) -> None:
    raise ValueError("a mistake of ours")


def _fill_the_disk(switch: Path, items: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write_a_megabyte(switch: Path, items: Path) -> None:
    (items / "megabyte").write_bytes(bytes(2**20))


def _interrupt(switch: Path, items: Path) -> None:
    raise KeyboardInterrupt


def _wait(switch: Path, items: Path) -> None:
    while switch.exists():
        time.sleep(0.01)


def _die(switch: Path, items: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ACTIONS: dict[str, Callable[[Path, Path], None]] = {
    "refuse": _refuse,
    "break": _break,
    "fill the disk": _fill_the_disk,
    "write a megabyte": _write_a_megabyte,
    "interrupt": _interrupt,
    "wait": _wait,
    "die": _die,
}

COUNT = Stage("count", CountParams, count, "numbers", data=("data",))
MODULO = Stage("modulo", ModuloParams, modulo, "numbers", {"numbers": Port("numbers")})
TOTAL = Stage("total", TotalParams, total, "total", {"numbers": Port("numbers", many=True)}, on_gpu=always)
STAGES = {stage.name: stage for stage in (COUNT, MODULO, TOTAL)}

FLOW = """\
version: 1
model: model
data: {calibration: {text: calibration.txt}}
stages:
  numbers: {uses: count}
  parity: {uses: modulo, needs: [numbers]}
  sum: {uses: total, needs: [parity]}
  aside: {uses: count, with: {items: 2, scale: 10}}
"""


class RecordingDisplay:
    """Keeps what a run reports, as tuples that start with the name of the method."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.events.append((name, *arguments))

    def of(self, name: str) -> list[Any]:
        """What one method was told; a single argument stands for itself."""
        return [event[1] if len(event) == 2 else event[1:] for event in self.events if event[0] == name]

    @property
    def started(self) -> dict[str, str]:
        """The stages that were run, with the reason."""
        return {stage: reason for stage, _, reason in self.of("start")}


class Workshop:
    """A folder with a model, a text, a workflow of fake stages and a results folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results, self.flow = folder, folder / "results", folder / "flow.yaml"
        for name in ("model", "traces", "switches"):
            (folder / name).mkdir(parents=True)
        (folder / "model" / "config.json").write_text("{}")
        (folder / "calibration.txt").write_text("once upon a time")
        self.flow.write_text(FLOW)

    def prepare(self, *sets: str, results: Path | None = None) -> tuple[Run, RecordingDisplay]:
        """A run that has not been executed."""
        display = RecordingDisplay()
        workflow = load_workflow(self.flow, find_stage=STAGES, sets=sets)
        return Run(workflow, results or self.results, display), display

    def run(self, *sets: str, results: Path | None = None, argv: Sequence[str] = ()) -> tuple[Run, RecordingDisplay]:
        """A run that went through."""
        run, display = self.prepare(*sets, results=results)
        run.execute("inline", argv)
        return run, display

    def switch(self, item: str, action: str | None) -> None:
        """From now on an item does this, or nothing special again."""
        path = self.folder / "switches" / item
        if action is None:
            path.unlink()
        else:
            path.write_text(action)

    def traces(self) -> dict[str, int]:
        """How often each item and each stage was worked on since the last time this was asked."""
        counts: dict[str, int] = {}
        for path in list((self.folder / "traces").iterdir()):
            name = path.name.partition(":")[0]
            counts[name] = counts.get(name, 0) + 1
            path.unlink()
        return counts

    def output(self, run: Run, stage: str) -> Any:
        """The JSON document that a stage left."""
        (path,) = (run.folder / "stages" / stage).glob("[!m]*.json")
        return json.loads(path.read_bytes())


if __name__ == "__main__":
    from layerwise import stages
    from layerwise.pipeline.cli import main

    stages.STAGES.update({name: f"fake_stages:{name.upper()}" for name in STAGES})
    main()
