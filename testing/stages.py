"""What every stage promises; see `layerwise.stages.contract`.

    bench = Bench(tmp_path)
    statistics = bench.run("calibrate")
    levels = bench.run("compress", {"menu": [{"method": "rtn", "bits": [2, 4]}]}, statistics=statistics)
    check_stage(bench, "sizes", database=levels)

Stages run on a tiny model (`models.py`), each in a folder of its own, with an executor that can be interrupted
(`executor.py`). What a stage that times things writes is not compared from run to run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from layerwise.results.schema import TABLES, columns_of
from layerwise.stages import find_stage
from layerwise.stages.contract import Context, ModelSource, Params, Row, Stage, TextSource
from layerwise.testing.executor import Interrupted, Journal, RecordingExecutor
from layerwise.testing.promises import Promise, answer_of_fresh_interpreter, demand, keep_all

Inputs = Mapping[str, "Path | Sequence[Path]"]
"""Artifact folders by port."""


class Bench:
    """A place to run stages at.

    Args:
        folder: empty; everything stands below it.
        model: a tiny one, if none is given.
        data: texts `calibration` and `heldout`, if none are given.
    """

    def __init__(
        self, folder: Path, model: ModelSource | None = None, data: Mapping[str, TextSource] | None = None
    ) -> None:
        self.folder = folder
        self._model, self._data = model, data
        self._runs = 0

    @cached_property
    def model(self) -> ModelSource:
        """The model that stages work on."""
        from layerwise.testing.models import tiny_model

        return tiny_model(self.folder / "model") if self._model is None else self._model

    @cached_property
    def data(self) -> Mapping[str, TextSource]:
        """The texts, by name."""
        from layerwise.testing.models import tiny_texts

        return tiny_texts(self.folder) if self._data is None else self._data

    def run(self, stage: str, params: Mapping[str, Any] | None = None, **inputs: Path | Sequence[Path]) -> Path:
        """Run a stage; gives the folder of its artifact.

        Args:
            stage: its name.
            params: its `with:`.
            inputs: artifact folders by port.
        """
        found = find_stage(stage)
        return self.attempt(found, found.params.model_validate(params or {}), inputs).run()

    def attempt(self, stage: Stage, params: Params, inputs: Inputs) -> Attempt:
        """A place for one run of a stage, which has not begun."""
        self._runs += 1
        place = self.folder / f"{self._runs:03}-{stage.name}"
        place.mkdir()
        given = {port: _folders(inputs.get(port, ())) for port in stage.takes}
        unknown = set(inputs) - set(given)
        demand(not unknown, f"stage {stage.name} has no port {', '.join(sorted(unknown))}")
        return Attempt(self, stage, params, given, place)


def _folders(given: Path | Sequence[Path]) -> tuple[Path, ...]:
    return (given,) if isinstance(given, Path) else tuple(given)


@dataclass
class Attempt:
    """One run of a stage, or several where the first is interrupted.

    Args:
        bench: where.
        stage: of which stage.
        params: its parameters.
        inputs: artifact folders by port.
        place: the folder that holds its own.
        journal: its keyed answers so far.
        rows: by table, what it recorded, the last time.
        reports: what it told of its progress, the last time.
    """

    bench: Bench
    stage: Stage
    params: Params
    inputs: Mapping[str, tuple[Path, ...]]
    place: Path
    journal: Journal = field(default_factory=Journal)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    reports: list[tuple[int, int, str]] = field(default_factory=list)
    times: int = 0

    def run(self, until: int | None = None) -> Path:
        """Run it, or go on; gives the folder of the artifact.

        Args:
            until: interrupt it after so many new keyed answers.
        """
        self.times += 1
        self.rows.clear()
        self.reports.clear()
        out, items = self.place / f"out-{self.times}", self.place / "items"
        out.mkdir()
        items.mkdir(exist_ok=True)
        context = Context(
            out=out,
            items=items,
            model=self.bench.model,
            data=self.bench.data,
            inputs=self.inputs,
            executor=RecordingExecutor(self.journal, until),
            record=lambda table, rows: self.rows.setdefault(table, []).extend(rows),
            progress=lambda done, total, note: self.reports.append((done, total, note)),
        )
        self.stage.run(context, self.params)
        return out


def check_stage(
    bench: Bench, stage: str, params: Mapping[str, Any] | None = None, **inputs: Path | Sequence[Path]
) -> None:
    """Check every promise of a stage.

    Args:
        bench: where it runs.
        stage: its name.
        params: its `with:`.
        inputs: artifact folders by port, made with `Bench.run`.
    Raises:
        AssertionError: a promise is broken; says which.
    """
    keep_all(stage_promises(bench, stage, params, **inputs))


def stage_promises(
    bench: Bench, stage: str, params: Mapping[str, Any] | None = None, **inputs: Path | Sequence[Path]
) -> list[Promise]:
    """The promises of `check_stage`, one by one."""
    found = find_stage(stage)
    case = _Case(bench, found, found.params.model_validate(params or {}), inputs)
    kept = {text: partial(check, case) for text, check in EVERY.items()}
    if found.measures is None:
        kept |= {text: partial(check, case) for text, check in REPEATABLE.items()}
    kept["it is found and its parameters are checked without loading torch or Ray"] = partial(_no_torch, case, stage)
    return [Promise(f"stage {stage}", text, check) for text, check in kept.items()]


@dataclass
class _Case:
    """A stage with parameters and inputs."""

    bench: Bench
    stage: Stage
    params: Params
    inputs: Inputs

    def attempt(self) -> Attempt:
        return self.bench.attempt(self.stage, self.params, self.inputs)

    @cached_property
    def done(self) -> tuple[Attempt, dict[str, str]]:
        """A run that nothing interrupted, and the digests of its artifact."""
        attempt = self.attempt()
        return attempt, digests(attempt.run())


def digests(folder: Path) -> dict[str, str]:
    """The digest of every file, and a mark for every folder, by path."""
    return {
        path.relative_to(folder).as_posix(): "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


# --- promises ---------------------------------------------------------------------------------------------------------


def _describes_itself(case: _Case) -> None:
    stage = case.stage
    demand(stage.gives, "it gives no type of artifact")
    for name in stage.data:
        demand(name in stage.params.model_fields, f"its `data` names a parameter {name} that it does not have")
    json.dumps(case.params.material(), allow_nan=False)
    written = case.params.model_dump(mode="json")
    demand(type(case.params).model_validate(written) == case.params, f"{written} are other parameters")


def _writes(case: _Case) -> None:
    inputs = [folder for folders in case.inputs.values() for folder in _folders(folders)]
    with _untouched([case.bench.model.path, *inputs]), _empty_workplace(case.bench.folder):
        attempt = case.attempt()
        out = attempt.run()
    beside = sorted(path.name for path in attempt.place.iterdir())
    demand(beside == ["items", out.name], f"beside its folders it leaves {beside}")
    demand(any(out.iterdir()), "it leaves no artifact")
    demand(not any(path.is_symlink() for path in out.rglob("*")), "its artifact leans on other folders by links")


@contextmanager
def _untouched(folders: Sequence[Path]) -> Iterator[None]:
    before = [digests(folder) for folder in folders]
    yield
    for folder, expected in zip(folders, before, strict=True):
        found = digests(folder)
        changed = sorted({path for path, _ in found.items() ^ expected.items()})
        demand(not changed, f"in {folder.name}, which it only reads, it changes {', '.join(changed)}")


@contextmanager
def _empty_workplace(folder: Path) -> Iterator[None]:
    """The working directory is an empty folder, and stays so."""
    workplace = folder / "workplace"
    workplace.mkdir(exist_ok=True)
    with chdir(workplace):
        yield
    left = sorted(path.name for path in workplace.iterdir())
    demand(not left, f"in the working directory it leaves {', '.join(left)}")


def _records(case: _Case) -> None:
    attempt, _ = case.done
    for table, rows in attempt.rows.items():
        demand(table in TABLES, f"there is no table {table}")
        known = columns_of(table)
        for row in rows:
            unknown = sorted(set(row) - set(known))
            demand(not unknown, f"table {table} has no column {', '.join(unknown)}")
            bad = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
            demand(
                not bad, f"{', '.join(bad)} of a row of {table} is not finite: leave it out, and say why in `status`"
            )


def _reports(case: _Case) -> None:
    for done, total, note in case.done[0].reports:
        demand(0 <= done <= total and isinstance(note, str), f"it reports {done} of {total} {note}")


def _same(case: _Case) -> None:
    _, expected = case.done
    _demand_same(digests(case.attempt().run()), expected, "the second time")


def _resumes(case: _Case) -> None:
    whole, expected = case.done
    total = len(whole.journal.worked)
    for until in sorted({1, total // 2, total - 1} & set(range(1, total))):
        attempt = case.attempt()
        try:
            attempt.run(until)
        except Interrupted:
            pass
        else:
            raise AssertionError(f"after {until} of {total} items the interruption is swallowed")
        out = attempt.run()
        twice = [key for (_, key), times in attempt.journal.worked.items() if times > 1]
        demand(not twice, f"interrupted after {until} of {total} items, it works again on {', '.join(twice)}")
        others = sorted(key for _, key in attempt.journal.worked.keys() ^ whole.journal.worked.keys())
        demand(not others, f"interrupted after {until} of {total} items, it has others: {', '.join(others)}")
        _demand_same(digests(out), expected, f"interrupted after {until} of {total} items,")


def _demand_same(found: Mapping[str, str], expected: Mapping[str, str], when: str) -> None:
    differ = sorted({path for path, _ in found.items() ^ expected.items()})
    demand(not differ, f"{when} other bytes are in {', '.join(differ)}")


def _no_torch(case: _Case, stage: str) -> None:
    written = json.dumps(case.params.model_dump(mode="json"))
    heavy = ["torch", "ray", "transformers"]
    program = (
        f"import json, sys\nfrom layerwise.stages import find_stage\nstage = find_stage({stage!r})\n"
        f"params = stage.params.model_validate(json.loads({written!r}))\nparams.material()\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    demand((found := answer_of_fresh_interpreter(program)) == "[]", f"it loads {found}")


EVERY: dict[str, Callable[[_Case], None]] = {
    "it describes itself, and its parameters survive the key and a workflow file": _describes_itself,
    "it writes only into its own folders": _writes,
    "it records rows that the results store takes": _records,
    "it reports its progress": _reports,
}

REPEATABLE: dict[str, Callable[[_Case], None]] = {
    "the same inputs give the same bytes": _same,
    "after an interruption it goes on, and repeats no finished item": _resumes,
}
"""Of those that time nothing."""
