"""What a stage will leave out or fall back to is said before it runs, and only if it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import pytest

from layerwise import stages
from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import ModelSource, Stage


@dataclass(frozen=True)
class TalkingStage(Stage):
    """A stage with the hook."""

    notes: Callable[[Any, ModelSource], Iterable[str]] | None = None


@pytest.fixture
def talk(fake_stages: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Let the counting stages say something."""

    def change(notes: Callable[[Any, ModelSource], Iterable[str]]) -> None:
        plain = {field.name: getattr(fake_stages.COUNT, field.name) for field in fields(Stage)}
        talking = TalkingStage(**{**plain, "notes": notes})
        monkeypatch.setitem(fake_stages.STAGES, "count", talking)
        for name, stage in fake_stages.STAGES.items():
            monkeypatch.setitem(stages.STAGES, name, stage)

    return change


def leaves_out(params: Any, model: ModelSource) -> Iterable[str]:
    yield f"counts to {params.items} only"
    yield f"leaves out what {model.path.name} does not hold in {model.dtype}"


def test_a_run_tells_the_notes_of_the_stages_that_it_makes_before_it_makes_any(talk: Any, workshop: Any) -> None:
    talk(leaves_out)
    _, display = workshop.run()
    second = "leaves out what model does not hold in float32"
    told = [
        f"{stage}: {text}" for stage, n in (("numbers", 4), ("aside", 2)) for text in (f"counts to {n} only", second)
    ]
    assert display.of("note") == told
    kinds = [event[0] for event in display.events]
    assert max(i for i, kind in enumerate(kinds) if kind == "note") < kinds.index("start")

    _, display = workshop.run("stages.aside.with.items=3")
    assert display.of("note") == ["aside: counts to 3 only", f"aside: {second}"]
    _, display = workshop.run()
    assert not display.of("note"), "what is cached leaves out nothing any more"


def test_a_dry_run_prints_them_below_their_stages(talk: Any, workshop: Any, in_process: Any) -> None:
    talk(lambda params, model: [f"counts to {params.items} only"])
    command = ["run", workshop.flow, "--results", workshop.results, "--dry-run"]
    assert in_process(*command).out.splitlines() == [
        "numbers: would run (not there yet)",
        "  note: counts to 4 only",
        "parity: would run (waits for numbers)",
        "sum: would run (waits for parity)",
        "aside: would run (not there yet)",
        "  note: counts to 2 only",
    ]
    workshop.run()
    assert "note" not in in_process(*command).out


def test_what_shows_while_notes_are_made_stops_the_run_and_names_the_stage(talk: Any, workshop: Any) -> None:
    def refuse(params: Any, model: ModelSource) -> Iterable[str]:
        raise UnsupportedModel("no unit of it is known", hint="try another one")

    talk(refuse)
    with pytest.raises(UnsupportedModel, match="stage numbers: no unit of it is known"):
        workshop.run()
    assert not workshop.traces()
