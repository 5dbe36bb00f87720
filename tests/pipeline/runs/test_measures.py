"""A stage that measures the machine belongs to it: on another one it is made again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest


@pytest.fixture
def on_machine(workshop: Any, fake_stages: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Run the fake workflow on a machine of that name, where one of its stages measures."""

    def run(name: str) -> Any:
        measuring = replace(fake_stages.COUNT, measures=lambda params: {"name": name, "scale": params.scale})
        monkeypatch.setitem(fake_stages.STAGES, "count", measuring)
        return workshop.run()

    return run


def test_a_measuring_stage_is_found_on_its_own_machine_and_made_again_on_another(
    on_machine: Callable[[str], Any], workshop: Any
) -> None:
    on_machine("old")
    workshop.traces()
    _, display = on_machine("old")
    assert display.of("cached") == ["numbers", "parity", "sum", "aside"]
    _, display = on_machine("new")
    assert display.started["numbers"] == "changed: machine.name (old -> new)"
    assert display.of("cached") == ["parity", "sum"], "what only used the same numbers is found"
    _, display = on_machine("old")
    assert not display.started


def test_a_stage_that_measures_nothing_has_no_machine_in_its_key(workshop: Any) -> None:
    run, _ = workshop.run()
    assert all("machine" not in plan.material for plan in run.plan())
