"""What a run shows: lines for a log, bars for a person, and nothing on stdout."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from layerwise.pipeline import display as display_module
from layerwise.pipeline.display import Display, LineDisplay, LiveDisplay, Pace, clock, open_display


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until a test moves it."""
    time = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(display_module, "time", SimpleNamespace(monotonic=lambda: time.seconds))
    return time


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (10, "10 s"), (59.4, "59 s"), (200, "3:20"), (3600, "1:00:00"), (7500, "2:05:00")],
)
def test_times_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_the_remaining_time_comes_from_the_items_of_this_step_alone(now: SimpleNamespace) -> None:
    pace = Pace()
    assert pace.remaining(40, 100, "units") is None  # 40 were found, which says nothing of how long one takes
    now.seconds += 10
    assert pace.remaining(50, 100, "units") == 50
    assert pace.remaining(50, 100, "units, best kl 0.1") == 50  # what follows a comma is news, not another step
    assert pace.remaining(0, 100, "shards") is None
    now.seconds += 1
    assert pace.remaining(1, 100, "shards") == 99


def tell_everything(display: Display) -> None:
    display.begin("flow-12345678", ["stats", "levels"])
    display.note("waiting: process 7 runs flow-12345678")
    display.cached("stats")
    display.start("levels", "compress", "changed: with.bits (3 -> 4)")
    display.progress("levels", 1, 4, "units")
    display.progress("levels", 2, 4, "units")
    display.warn("a file was damaged")
    display.finish("levels", 75.0, 1, 4)
    display.end()


def test_without_a_terminal_there_is_one_line_per_event(
    now: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    display = open_display()
    assert isinstance(display, LineDisplay)
    tell_everything(display)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "run flow-12345678: 2 stages",
        "waiting: process 7 runs flow-12345678",
        "stats: cached",
        "levels: compress (changed: with.bits (3 -> 4))",
        "warning: a file was damaged",
        "levels: done in 1:15, 1 of 4 items were already done",
    ]


def test_a_long_stage_says_now_and_then_how_far_it_is(now: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    display = LineDisplay()
    display.start("levels", "compress", "not there yet")
    for done in range(31):
        display.progress("levels", done, 100, "units")
        now.seconds += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == [
        "levels: 10 of 100 units, about 1:30 left",
        "levels: 20 of 100 units, about 1:20 left",
        "levels: 30 of 100 units, about 1:10 left",
    ]


def test_on_a_terminal_every_event_finds_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    display = open_display()
    assert isinstance(display, LiveDisplay)
    tell_everything(display)
    out, err = capsys.readouterr()
    assert out == ""
    for text in ("flow-12345678", "waiting: process 7", "a file was damaged", "1:15, 1 of 4 items"):
        assert text in err


def test_what_is_shown_is_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    display = LiveDisplay()
    display.begin("flow", ["levels"])
    display.start("levels", "compress", "changed: with.bits ([3] -> [/3])")
    display.note("bits [3, 4] and [/nothing]")
    display.warn("/a/path[0]/with[/brackets]")
    display.progress("levels", 1, 2, "units [/x]")
    display.end()
    err = capsys.readouterr().err
    assert "bits [3, 4] and [/nothing]" in err
    assert "/a/path[0]/with[/brackets]" in err
