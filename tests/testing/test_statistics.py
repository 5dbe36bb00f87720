"""The suite of statistics finds out a statistic that breaks any one of its promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.stages.calibrate import STATISTICS, Statistic, find_statistic
from layerwise.testing import statistic_promises

HESSIAN = find_statistic("hessian")
BY_NAME = "its name means the same in another process, which need not load torch"  # it is in no other process


def in_place(a: Tensor, b: Tensor) -> Tensor:
    return a.add_(b)


BROKEN: dict[str, tuple[Statistic, str]] = {
    "half": (replace(HESSIAN, measure=lambda X: X.T @ X), "float32"),
    "by layout": (replace(HESSIAN, measure=lambda X: HESSIAN.measure(X) * X.stride(0)), "float32"),
    "centred in place": (replace(HESSIAN, measure=lambda X: HESSIAN.measure(X.sub_(1))), "change nothing"),
    "merged in place": (replace(HESSIAN, merge=in_place), "change nothing"),
    "the mean": (replace(HESSIAN, measure=lambda X: HESSIAN.measure(X) / max(1, len(X))), "same as the whole"),
    "nothing of nothing": (
        replace(HESSIAN, measure=lambda X: HESSIAN.measure(X) / len(X), merge=lambda a, b: (a + b) / 2),
        "same as the whole",
    ),
    "the last one counts more": (replace(HESSIAN, merge=lambda a, b: a / 2 + b), "any order"),
    "flat": (replace(HESSIAN, neutral=lambda unit, n: torch.zeros(unit.shape[1])), "has the same shape"),
    "not finite": (replace(HESSIAN, neutral=lambda unit, n: torch.eye(unit.shape[1]) / n), "has the same shape"),
    "small": (replace(HESSIAN, size_bytes=lambda unit: unit.shape[1]), "its size"),
    "hidden": (replace(find_statistic("block_inputs"), size_bytes=lambda unit: 1), "counted where they are kept"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_found(broken: Callable[..., set[str]], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    statistic, promise = BROKEN[name]
    monkeypatch.setitem(STATISTICS, "odd", statistic)  # type: ignore[misc]
    found: Any = broken(statistic_promises("odd"))
    assert BY_NAME in found
    assert any(promise in text for text in found)


def test_every_promise_is_broken_here() -> None:
    for name in ("hessian", "block_inputs"):
        for promise in statistic_promises(name):
            assert promise.text == BY_NAME or any(text in promise.text for _, text in BROKEN.values())
