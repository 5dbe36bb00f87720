"""The suite of stages finds out a stage that breaks any one of its promises."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest

from layerwise.stages import STAGES
from layerwise.stages.contract import Context, ModelSource, Params, Port, Stage
from layerwise.testing import Bench, Promise, stage_promises
from layerwise.testing.executor import Journal, RecordingExecutor
from layerwise.testing.stages import EVERY, REPEATABLE

NAME = "it is found and its parameters are checked without loading torch or Ray"  # this one is in no other process


class OddParams(Params):
    """How far to count."""

    count: int = 5


class Forgetful(OddParams):
    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]


def square(number: int, *, folder: Path) -> int:
    (folder / f"{number}.txt").write_text(str(number**2))
    return number**2


def honest(context: Context, params: Any, **keys: Any) -> None:
    numbers = list(range(params.count))
    named = {"keys": [f"n-{number}" for number in numbers], **keys}
    answers = context.executor.map(partial(square, folder=context.items), numbers, **named)
    (context.out / "squares.txt").write_text(" ".join(map(str, answers)))
    for number in numbers:
        (context.out / f"{number}.txt").hardlink_to(context.items / f"{number}.txt")
    context.record("units", [{"unit": "n", "n_weights": sum(answers)}])
    context.progress(1, 1, "done")


def then(more: Callable[[Context], object]) -> Callable[[Context, Any], None]:
    def run(context: Context, params: Any) -> None:
        honest(context, params)
        more(context)

    return run


def swallows(context: Context, params: Any) -> None:
    with suppress(BaseException):
        honest(context, params)
    (context.out / "end").touch()


def starts_anew(context: Context, params: Any) -> None:
    """Gives the rest of the items other keys where some files are there already."""
    there = len(list(context.items.glob("*.txt")))
    honest(context, params, keys=[f"{there}-{number}" for number in range(params.count)])


def lets_the_interruption_show(context: Context, params: Any) -> None:
    (context.out / "before").write_text(str(any(context.items.iterdir())))
    honest(context, params)


Run = Callable[[Context, Any], None]

BROKEN: dict[str, tuple[Run, str]] = {
    "the folder's name": (then(lambda c: (c.out / "where").write_text(str(c.out))), "same bytes"),
    "a row without a column": (then(lambda c: c.record("units", [{"colour": 1}])), "results store takes"),
    "a table that is none": (then(lambda c: c.record("colours", [{"unit": "n"}])), "results store takes"),
    "NaN": (then(lambda c: c.record("metrics", [{"value": float("nan")}])), "results store takes"),
    "more than all": (then(lambda c: c.progress(2, 1, "")), "reports its progress"),
    "writes into its input": (then(lambda c: (c.input("given") / "more").touch()), "only into its own folders"),
    "writes into the model": (then(lambda c: (c.model.path / "more").touch()), "only into its own folders"),
    "writes where it stands": (then(lambda c: Path("more").touch()), "only into its own folders"),
    "writes beside": (then(lambda c: (c.out.parent / "more").touch()), "only into its own folders"),
    "a link": (then(lambda c: (c.out / "link").symlink_to(c.items)), "only into its own folders"),
    "nothing": (lambda context, params: None, "only into its own folders"),
    "swallows the interruption": (swallows, "after an interruption"),
    "starts anew": (starts_anew, "after an interruption"),
    "shows the interruption": (lets_the_interruption_show, "after an interruption"),
    "two items of one key": (lambda c, p: honest(c, p, keys=["n"] * p.count), "same bytes"),
    "a closure": (then(lambda c: c.executor.map(lambda number: number, [1])), "same bytes"),
    "answers that are no JSON": (then(lambda c: c.executor.map(Path, ["a"], keys=["a"])), "same bytes"),
}


@pytest.fixture
def promised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Promise]]:
    """The promises of a stage of ours, on a model folder that holds nothing."""

    def get(run: Run, params: type[Params] = OddParams, **more: Any) -> list[Promise]:
        stage = Stage("odd", params, run, gives="squares", takes={"given": Port("squares")})
        monkeypatch.setitem(STAGES, "odd", replace(stage, **more))  # type: ignore[misc]
        for name in ("model", "given"):
            (tmp_path / name).mkdir()
        return stage_promises(Bench(tmp_path, ModelSource(tmp_path / "model"), {}), "odd", given=tmp_path / "given")

    return get


def test_an_honest_stage_keeps_all(broken: Any, promised: Any) -> None:
    assert broken(promised(honest)) == {NAME}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_found(
    broken: Any, promised: Any, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run, promise = BROKEN[name]
    before = tmp_path_factory.mktemp("here")  # the checkout is no place for what a broken stage leaves
    monkeypatch.chdir(before)
    assert any(promise in text for text in broken(promised(run)))
    assert Path.cwd() == before


@pytest.mark.parametrize(
    ("params", "more"), [(Forgetful, {}), (OddParams, {"data": ("text",)}), (OddParams, {"gives": ""})]
)
def test_a_stage_that_describes_itself_wrongly_is_found(
    broken: Any, promised: Any, params: type[Params], more: dict[str, Any]
) -> None:
    assert any("describes itself" in text for text in broken(promised(honest, params, **more)))


def test_what_a_stage_measures_need_not_be_the_same_twice(broken: Any, promised: Any) -> None:
    times = then(lambda context: (context.out / "times").write_bytes(os.urandom(8)))
    assert broken(promised(times, measures=lambda params: {"machine": "this"})) == {NAME}


class _Loaded:
    """What a replica loads; `alive` knows which are still in memory."""

    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.alive.add(self)

    def __call__(self, item: int) -> int:
        return item


def test_replicas_let_go_of_what_they_loaded_without_a_collector() -> None:
    gc.disable()
    try:
        with RecordingExecutor(Journal()).replicas(_Loaded) as replicas:
            assert replicas.map([1, 2], keys=["one", "two"]) == [1, 2]
            assert len(_Loaded.alive) == 1
        assert len(_Loaded.alive) == 0
    finally:
        gc.enable()


def test_every_promise_is_broken_here() -> None:
    for text in {**EVERY, **REPEATABLE}:
        assert "describes itself" in text or any(promise in text for _, promise in BROKEN.values()), text
