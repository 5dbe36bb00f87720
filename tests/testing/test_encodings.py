"""The suite of encodings finds out an encoding that breaks any one of its promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from layerwise.stages.levels.grid import Grid, grid_level
from layerwise.stages.levels.level import ENCODINGS, Level
from layerwise.stages.levels.parent import Drop
from layerwise.testing import check_encoding, encoding_promises
from layerwise.testing.encodings import PARENT, WEIGHT

RECIPE = {"method": "made up", "bits": 4, "group_size": 7, "sym": True, "encoding": "odd"}
counter = itertools.count()


def level(**more: Any) -> Level:
    codes = torch.randint(0, 16, (5, 21), generator=torch.Generator().manual_seed(0))
    return grid_level("odd", {**RECIPE, **more}, codes, scale=torch.rand(5, 3) + 0.5, zero=torch.zeros(5, 3))


class Float64(Grid):
    @staticmethod
    def decode(level: Level) -> torch.Tensor:
        return Grid.decode(level).double()


class Restless(Grid):
    @staticmethod
    def decode(level: Level) -> torch.Tensor:
        return Grid.decode(level) + next(counter)


class Destructive(Grid):
    @staticmethod
    def pack(level: Level) -> Any:
        level.tensors["scale"].mul_(2)
        return None


class Boastful(Grid):
    """Says that it stores less than its codes have."""

    @staticmethod
    def stored_bits(level: Level) -> int:
        return 3 * level.n_weights


class Modest(Grid):
    """Says that it stores more than its tensors have."""

    @staticmethod
    def stored_bits(level: Level) -> int:
        return 8 * level.size_bytes + 1


class Crowded(Grid):
    @staticmethod
    def parameters(level: Level) -> int:
        return level.n_weights + 1


class Attached(Grid):
    """Decodes only what it made itself: something beside tensors and recipe decides."""

    @staticmethod
    def decode(level: Level) -> torch.Tensor:
        return Grid.decode(level) * (2 if isinstance(level.recipe, Remembered) else 1)


class Remembered(dict[str, Any]):
    """A recipe that no file gives back."""


class Rounded(Grid):
    """What it packs is nearly the weight."""

    @staticmethod
    def pack(level: Level) -> Any:
        scale = level.tensors["scale"] * 1.001
        return Grid.pack(Level(level.name, level.recipe, level.shape, {**level.tensors, "scale": scale}))


class Unordered(Grid):
    @staticmethod
    def label(recipe: Any) -> str:
        return "-".join(map(str, recipe.values()))


class Heavy(Drop):
    @staticmethod
    def decode(level: Level) -> Any:
        return torch.zeros(0, 0)


BROKEN: list[tuple[type, Callable[[], Level], str]] = [
    (Grid, lambda: level(encoding="grid"), "a recipe is JSON"),
    (Grid, lambda: level(pair=(1, 2)), "a recipe is JSON"),
    (Float64, level, "decodes to the same"),
    (Restless, level, "decodes to the same"),
    (Destructive, level, "change nothing"),
    (Boastful, level, "costs are exact"),
    (Modest, level, "costs are exact"),
    (Crowded, level, "costs are exact"),
    (Attached, lambda: Level("odd", Remembered(RECIPE), (5, 21), level().tensors), "survives its file"),
    (Rounded, level, "packed weight is the decoded one"),
    (Unordered, level, "depends on nothing but the recipe"),
    (Heavy, lambda: Level("odd", RECIPE, (0, 0), {}), "stands for no weight"),
]


@pytest.mark.parametrize(("encoding", "make", "promise"), BROKEN, ids=[case[0].__name__ for case in BROKEN])
def test_a_broken_promise_is_found(
    broken: Any, monkeypatch: pytest.MonkeyPatch, encoding: type, make: Callable[[], Level], promise: str
) -> None:
    monkeypatch.setitem(ENCODINGS, "odd", encoding)  # type: ignore[misc]
    made = make()
    assert any(promise in text for text in broken(encoding_promises("odd", [made])))
    with pytest.raises(AssertionError, match="encoding odd, level odd breaks the promise that"):
        check_encoding("odd", [make()])


def test_every_promise_is_broken_here() -> None:
    for text in {**PARENT, **WEIGHT}:
        assert any(promise in text for _, _, promise in BROKEN), text


def test_what_is_broken_here_keeps_all_promises_when_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODINGS, "odd", Grid)  # type: ignore[arg-type]
    check_encoding("odd", [level()])
