"""Devices of a run: keys, what is said before it begins, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from layerwise.errors import UsageError
from layerwise.kernels import device
from layerwise.pipeline.runs.plan import key_material

ON_GPU = "stages.sum.device=cuda"


def refuse() -> None:
    raise UsageError("device cuda: torch finds no GPU", hint="run it where there is one, or use the device cpu")


def test_a_gpu_that_is_not_there_is_told_before_any_stage_is_made(
    workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "require_gpu", refuse)
    with pytest.raises(UsageError, match="stage sum: device cuda: torch finds no GPU"):
        workshop.run(ON_GPU)
    assert not workshop.traces()


def test_what_is_in_the_cache_needs_no_gpu(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "require_gpu", lambda: None)
    workshop.run(ON_GPU)
    monkeypatch.setattr(device, "require_gpu", refuse)
    _, display = workshop.run(ON_GPU)
    assert not display.started


def test_a_stage_is_made_anew_on_another_device_and_those_before_it_are_not(
    workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "require_gpu", lambda: None)
    workshop.run("device=cpu")
    _, display = workshop.run(ON_GPU)
    assert display.started == {"sum": "changed: device (cpu -> cuda)"}
    run, display = workshop.run("device=cuda")
    assert not display.started
    run, _ = workshop.prepare("device=cpu")
    assert key_material(run.workflow.nodes[-1], {}, run.sources)["device"] == "cpu"


@pytest.mark.parametrize("asked", ["device=cuda", "resources.gpus=1"])
def test_stages_that_cannot_use_the_gpus_of_a_workflow_say_so(
    workshop: Any, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setattr(device, "require_gpu", lambda: None)
    _, display = workshop.run(asked)
    assert sorted(display.of("note")) == [
        "aside: computes on the CPU, 'count' cannot use a GPU",
        "numbers: computes on the CPU, 'count' cannot use a GPU",
        "parity: computes on the CPU, 'modulo' cannot use a GPU",
    ]
