"""The suite of compressors finds out a method that breaks any one of its promises."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
import torch

from layerwise.errors import UsageError
from layerwise.stages.compress import COMPRESSORS, MenuEntry, Task, rtn
from layerwise.stages.compress.grid import GridParams, check_finite
from layerwise.stages.levels.level import Level
from layerwise.stages.levels.parent import parent_level
from layerwise.testing import compressor_promises
from layerwise.testing.compressors import EVERY, PARENTS, WEIGHTS

NAME = "menus are checked without loading torch"  # a name that stands in no file is known in this process only
counter = itertools.count(1)
Make = Callable[[Task, Any], Mapping[str, list[Level]]]


class Honest(GridParams):
    """Rounds to nearest, and looks at the Hessian, which it says."""

    method: Literal["odd"] = "odd"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})


class Unannounced(Honest):
    def nominal_bits(self) -> tuple[int, ...]:
        return tuple(bits + 1 for bits in self.bits)


class Unnameable(Honest):
    def level_names(self) -> list[str]:
        return [f"{bits}/8" for bits in self.bits]


class NeedyFallback(Honest):
    def fallback(self) -> MenuEntry:
        return self


class Forgetful(Honest):
    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]


class Wanting(Honest):
    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "channels"})


class Parents(MenuEntry):
    method: Literal["odd"] = "odd"

    def level_names(self) -> list[str]:
        return ["drop"]

    def parents(self) -> list[str]:
        return ["mlp"]


def run(task: Task, params: Any) -> Mapping[str, list[Level]]:
    """The honest method; a broken one changes its task or its levels."""
    check_finite("Hessian", task.statistic(task.unit, "hessian"))
    made = rtn.rtn(task, rtn.Params(bits=params.bits, group_size=params.group_size))[task.unit]
    named = zip(made, params.level_names(), strict=True)
    return {task.unit: [replace(level, name=name, recipe={**level.recipe, "method": "odd"}) for level, name in named]}


def edited(edit: Callable[[Level], Level]) -> Make:
    return lambda task, params: {unit: list(map(edit, levels)) for unit, levels in run(task, params).items()}


def scaled(factor: Callable[[Task, Level], Any]) -> Make:
    """Scales that something decides which must not."""

    def make(task: Task, params: Any) -> Mapping[str, list[Level]]:
        def changed(level: Level) -> Level:
            scale = level.tensors["scale"] * factor(task, level)
            return replace(level, tensors={**level.tensors, "scale": scale.half()})

        return {unit: list(map(changed, levels)) for unit, levels in run(task, params).items()}

    return make


def with_weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Make:
    return lambda task, params: run(
        replace(task, weights={name: change(weight) for name, weight in task.weights.items()}), params
    )


def spoils_its_statistic(task: Task, params: Any) -> Mapping[str, list[Level]]:
    task.statistic(task.unit, "hessian").add_(1)
    return run(task, params)


def ignores_the_hessian(task: Task, params: Any) -> Mapping[str, list[Level]]:
    H = task.statistic(task.unit, "hessian")
    factor = 1 if H.isfinite().all() else float("nan")
    return scaled(lambda *_: factor)(replace(task, statistic=lambda *_: torch.ones(1)), params)


def inverts(task: Task, params: Any) -> Mapping[str, list[Level]]:
    H = task.statistic(task.unit, "hessian")
    factor = 1 if torch.linalg.cholesky_ex(H).info == 0 else float("nan")
    return scaled(lambda *_: factor)(task, params)


def guesses(task: Task, params: Any) -> Mapping[str, list[Level]]:
    try:
        return run(task, params)
    except UsageError:
        return run(replace(task, statistic=lambda *_: torch.ones(1)), params)


def fills_in(task: Task, params: Any) -> Mapping[str, list[Level]]:
    filled = {name: weight + ~task.keep[name] if task.keep else weight for name, weight in task.weights.items()}
    return run(replace(task, weights=filled, keep={}), params)


BROKEN: dict[str, tuple[type[MenuEntry], Make, str]] = {
    "other names": (Honest, edited(lambda level: replace(level, name=f"{level.name}!")), "announced names"),
    "a name that is a path": (Unnameable, run, "announced names"),
    "another order": (
        Honest,
        lambda task, params: {name: levels[::-1] for name, levels in run(task, params).items()},
        "announced names",
    ),
    "levels of another unit": (Honest, lambda task, params: {"other": run(task, params)[task.unit]}, "announced names"),
    "other bits": (Unannounced, run, "bits that are announced"),
    "never the same": (Honest, scaled(lambda *_: 1 + next(counter) / 64), "same task gives the same"),
    "a needy fallback": (NeedyFallback, run, "a fallback makes"),
    "parameters never equal": (Forgetful, run, "survive a workflow file"),
    "another method": (Honest, edited(lambda level: replace(level, recipe={**level.recipe, "method": "rtn"})), "shape"),
    "transposed": (Honest, edited(lambda level: replace(level, shape=level.shape[::-1])), "shape"),
    "needs too much": (Wanting, run, "that `needs` names"),
    "asks for too much": (
        Honest,
        lambda task, params: [run(task, params), task.statistic(task.unit, "fisher")][0],
        "announced names",
    ),
    "works in place": (Honest, with_weights(lambda weight: weight.mul_(2)), "are changed"),
    "spoils its statistic": (Honest, spoils_its_statistic, "are changed"),
    "by dtype": (Honest, scaled(lambda task, _: task.weights[task.unit].element_size()), "bfloat16"),
    "by layout": (Honest, scaled(lambda task, _: task.weights[task.unit].stride(0)), "layout of memory"),
    "swallows NaN": (Honest, with_weights(lambda weight: weight.nan_to_num(0, 0, 0)), "a weight that is not finite"),
    "spreads NaN": (Honest, ignores_the_hessian, "a statistic that is not finite"),
    "divides by zero": (
        Honest,
        scaled(lambda task, _: 1 if task.weights[task.unit].abs().sum(1).all() else float("nan")),
        "rows of zeros",
    ),
    "divides by the spread": (
        Honest,
        scaled(lambda task, _: 1 if len(task.weights[task.unit].unique()) > 1 else float("nan")),
        "all the same",
    ),
    "inverts what has no inverse": (Honest, inverts, "depend on each other"),
    "wants even widths": (Honest, with_weights(lambda weight: weight.view(-1, 2).view(weight.shape)), "any shape"),
    "guesses what is missing": (Honest, guesses, "not gathered"),
    "fills in what was pruned": (Honest, fills_in, "earlier pruning"),
    "claims a sparsity": (
        Honest,
        edited(lambda level: replace(level, recipe={**level.recipe, "sparsity": 0.5})),
        "as many zeros",
    ),
    "claims a pattern": (
        Honest,
        edited(lambda level: replace(level, recipe={**level.recipe, "sparsity": 0.5, "pattern": "2:4"})),
        "as many zeros",
    ),
    "claims blocks": (
        Honest,
        edited(lambda level: replace(level, recipe={**level.recipe, "sparsity": 0.5, "block": [2, 4]})),
        "as many zeros",
    ),
    "better with fewer bits": (Honest, scaled(lambda _, level: 1 + level.bits), "error falls"),
    "a parent with a shape": (
        Parents,
        lambda task, params: {name: [replace(parent_level("drop"), shape=(1, 1))] for name in task.units},
        "levels of parents",
    ),
}


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[MenuEntry], Make], None]:
    """Puts a method into the table, in a module of its own, as a file would."""

    def offer(params: type[MenuEntry], make: Make) -> None:
        module = ModuleType("odd_method")
        monkeypatch.setitem(sys.modules, module.__name__, module)

        def odd(task: Task, params: Any) -> Mapping[str, list[Level]]:
            return make(task, params)

        for name, thing in {"odd": odd, "Params": params}.items():
            setattr(module, name, thing)
        odd.__module__, odd.__qualname__ = module.__name__, "odd"
        monkeypatch.setitem(COMPRESSORS, "odd", odd)  # type: ignore[misc]

    return offer


def menu(params: type[MenuEntry]) -> dict[str, Any]:
    return {} if params is Parents else {"bits": [2, 4, 8], "group_size": 8}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_found(broken: Any, offered: Callable[..., None], name: str) -> None:
    params, make, promise = BROKEN[name]
    offered(params, make)
    found = broken(compressor_promises("odd", [menu(params)]))
    assert any(promise in text for text in found - {NAME}), found


def test_an_honest_method_keeps_all(broken: Any, offered: Callable[..., None]) -> None:
    offered(Honest, run)
    assert broken(compressor_promises("odd", [menu(Honest)])) == {NAME}
    offered(Parents, lambda task, params: {name: [parent_level("drop")] for name in task.units})
    assert broken(compressor_promises("odd", [{}])) == {NAME}


def test_every_promise_is_broken_here() -> None:
    for text in {**EVERY, **PARENTS, **WEIGHTS}:
        assert any(promise in text for _, _, promise in BROKEN.values()), text
