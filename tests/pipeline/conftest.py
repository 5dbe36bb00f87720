"""A small world of stages that do nothing, and a way to write workflow files for them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
from pydantic import AliasChoices, BeforeValidator, Field, field_validator

from layerwise.pipeline.workflow import Workflow, load_workflow
from layerwise.stages.contract import Params, Port, Stage


class GptqEntry(Params):
    """Quantize column by column."""

    method: Literal["gptq"]
    bits: Annotated[list[int], BeforeValidator(lambda value: [value] if isinstance(value, int) else value)]
    damp_percent: float = Field(0.01, gt=0, lt=1, validation_alias=AliasChoices("damp_percent", "percdamp"))


class SparseEntry(Params):
    """Keep N of every M weights."""

    method: Literal["sparsegpt", "wanda"]
    patterns: tuple[str, ...] = ()


class StatsParams(Params):
    """Which text to take statistics of."""

    data: str = "calibration"
    shards: int = Field(1, ge=1)


class MenuParams(Params):
    """The levels of every unit."""

    menu: list[Annotated[GptqEntry | SparseEntry, Field(discriminator="method")]] = Field(min_length=1)
    first: GptqEntry | SparseEntry | None = None


class SearchParams(Params):
    """The solver and its budgets."""

    solver: Literal["evolve", "ilp", "dp"] = Field("evolve", description="how to choose")
    budgets: dict[str, float | list[float]] = Field(default_factory=dict)
    population: int = Field(64, gt=0)
    seed: int = 0
    workers: int | Literal["auto"] = "auto"

    @field_validator("seed")
    @classmethod
    def _lucky(cls, seed: int) -> int:
        if seed == 13:
            raise ValueError("13 brings bad luck")
        return seed


class ScoreParams(Params):
    """What to report."""

    data: str = "heldout"
    also: list[str] = []


class PickParams(Params):
    """Which allocation."""

    pick: str = "knee"


class PairParams(Params):
    """Nothing."""


def _nothing(context: Any, params: Any) -> None: ...


STAGES = {
    stage.name: stage
    for stage in (
        Stage("calibrate", StatsParams, _nothing, "statistics", data=("data",)),
        Stage("compress", MenuParams, _nothing, "database", {"statistics": Port("statistics")}),
        Stage(
            "allocate",
            SearchParams,
            _nothing,
            "allocations",
            {"database": Port("database"), "statistics": Port("statistics", optional=True)},
        ),
        Stage("pick", PickParams, _nothing, "model", {"allocations": Port("allocations")}),
        Stage("merge", PairParams, _nothing, "model", {"left": Port("model"), "right": Port("model")}),
        Stage(
            "evaluate",
            ScoreParams,
            _nothing,
            "metrics",
            {"allocations": Port("allocations", many=True, optional=True), "models": Port("model", many=True)},
            data=("data", "also"),
            reports=True,
        ),
    )
}

HEAD = """\
version: 1
model: model
data:
  calibration: {text: calibration.txt, tokens: 2Ki, sequence_length: 128}
  heldout: {text: heldout.txt}
"""


class Desk:
    """A folder with a model and two texts, and workflow files that are written into it."""

    head, stages = HEAD, STAGES

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "model").mkdir()
        for name in ("calibration.txt", "heldout.txt"):
            (folder / name).write_text("once upon a time")

    def write(self, text: str, name: str = "flow.yaml") -> Path:
        """Write a file; its text may be indented like the test around it."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    def load(self, body: str, name: str = "flow.yaml", **options: Any) -> Workflow:
        """Load a workflow made of the head (5 lines) and the rest of the file."""
        return load_workflow(self.write(HEAD + textwrap.dedent(body), name), find_stage=STAGES, **options)

    def mistakes(self, body: str, *, head: str = HEAD, **options: Any) -> list[str]:
        """What is wrong with a workflow, as `line:column: text`, without the name of the file."""
        from layerwise.errors import WorkflowError

        path = self.write(head + textwrap.dedent(body))
        with pytest.raises(WorkflowError) as caught:
            load_workflow(path, find_stage=STAGES, **options)
        return [str(problem).removeprefix(f"{path}:") for problem in caught.value.problems]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def fakes() -> SimpleNamespace:
    """The classes above, for tests of single modules."""
    return SimpleNamespace(
        MenuParams=MenuParams, SearchParams=SearchParams, StatsParams=StatsParams, stages=STAGES
    )


