"""Shows a run while it runs: a live table on a terminal, plain lines everywhere else.

Everything goes to stderr; stdout belongs to the answer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 10.0
"""How often a long stage says how far it is when there is no terminal."""


class Display(Protocol):
    """What a run reports."""

    def begin(self, run: str, stages: Sequence[str]) -> None:
        """The run starts; these are its stages in order."""

    def cached(self, stage: str) -> None:
        """A stage was found in the cache."""

    def start(self, stage: str, uses: str, reason: str) -> None:
        """A stage starts, and why it must."""

    def progress(self, stage: str, done: int, total: int, note: str) -> None:
        """How far the current step of a stage is; a new note begins a new step."""

    def finish(self, stage: str, seconds: float, cached: int, total: int) -> None:
        """A stage is done; so many of its items came from an interrupted attempt."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def warn(self, text: str) -> None:
        """Something that went wrong and was mended."""

    def end(self) -> None:
        """The run is over, one way or another."""


def open_display() -> Display:
    """Live on a terminal, lines otherwise."""
    return LiveDisplay() if sys.stderr.isatty() else LineDisplay()


class Pace:
    """Remaining time of one step, from the items finished since it began."""

    def __init__(self) -> None:
        self._step: tuple[str, int] | None = None
        self._since = (0.0, 0)

    def remaining(self, done: int, total: int, note: str) -> float | None:
        """Seconds, None while nothing can be said."""
        step = (note.split(",", maxsplit=1)[0], total)
        if step != self._step:
            self._step, self._since = step, (time.monotonic(), done)
        started, first = self._since
        if done <= first:
            return None
        return (time.monotonic() - started) / (done - first) * (total - done)


def clock(seconds: float) -> str:
    """`45 s`, `3:20`, `2:05:00`; tenths below ten seconds."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def left(remaining: float | None) -> str:
    """The end of a line about progress: the remaining time, if anything can be said of it."""
    return "" if remaining is None else f", about {clock(remaining)} left"


def _summary(seconds: float, cached: int, total: int) -> str:
    return clock(seconds) + (f", {cached} of {total} items were already done" if cached else "")


class SilentDisplay:
    """Shows nothing; a base for displays that care for a few events only."""

    def begin(self, run: str, stages: Sequence[str]) -> None:
        return

    def cached(self, stage: str) -> None:
        return

    def start(self, stage: str, uses: str, reason: str) -> None:
        return

    def progress(self, stage: str, done: int, total: int, note: str) -> None:
        return

    def finish(self, stage: str, seconds: float, cached: int, total: int) -> None:
        return

    def note(self, text: str) -> None:
        return

    def warn(self, text: str) -> None:
        return

    def end(self) -> None:
        return


class LineDisplay:
    """One line per event."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._last = 0.0

    def begin(self, run: str, stages: Sequence[str]) -> None:
        self.tell(f"run {run}: {len(stages)} stages")

    def cached(self, stage: str) -> None:
        self.tell("cached", stage)

    def start(self, stage: str, uses: str, reason: str) -> None:
        self._last = time.monotonic()
        self.tell(f"{uses} ({reason})", stage)

    def progress(self, stage: str, done: int, total: int, note: str) -> None:
        remaining = self._pace.remaining(done, total, note)
        if time.monotonic() - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = time.monotonic()
        self.tell(f"{done} of {total} {note}{left(remaining)}", stage)

    def finish(self, stage: str, seconds: float, cached: int, total: int) -> None:
        self.tell(f"done in {_summary(seconds, cached, total)}", stage)

    def note(self, text: str) -> None:
        self.tell(text)

    def warn(self, text: str) -> None:
        self.tell(f"warning: {text}")

    def end(self) -> None:
        return

    def tell(self, text: str, stage: str | None = None) -> None:
        """One line, about a stage or about the run as a whole."""
        print(text if stage is None else f"{stage}: {text}", file=sys.stderr, flush=True)


class Displays:
    """Tells several displays the same.

    Args:
        displays: in the order in which they are told.
    """

    def __init__(self, *displays: Display) -> None:
        self._displays = displays

    def begin(self, run: str, stages: Sequence[str]) -> None:
        for display in self._displays:
            display.begin(run, stages)

    def cached(self, stage: str) -> None:
        for display in self._displays:
            display.cached(stage)

    def start(self, stage: str, uses: str, reason: str) -> None:
        for display in self._displays:
            display.start(stage, uses, reason)

    def progress(self, stage: str, done: int, total: int, note: str) -> None:
        for display in self._displays:
            display.progress(stage, done, total, note)

    def finish(self, stage: str, seconds: float, cached: int, total: int) -> None:
        for display in self._displays:
            display.finish(stage, seconds, cached, total)

    def note(self, text: str) -> None:
        for display in self._displays:
            display.note(text)

    def warn(self, text: str) -> None:
        for display in self._displays:
            display.warn(text)

    def end(self) -> None:
        for display in self._displays:
            display.end()


class LiveDisplay:
    """A line per stage that fills up while it runs."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.markup import escape

        self._console = Console(stderr=True, highlight=False)
        self._plain = escape  # paths and values may hold what rich takes for its markup: [/x]
        self._pace = Pace()
        self._bars: Progress | None = None
        self._rows: dict[str, TaskID] = {}

    def begin(self, run: str, stages: Sequence[str]) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._console.print(f"run [bold]{self._plain(run)}[/bold]")
        self._bars = Progress(
            TextColumn("{task.fields[mark]}"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            console=self._console,
        )
        for stage in stages:
            self._rows[stage] = self._bars.add_task(stage, total=None, start=False, mark="[dim]·[/dim]", state="")
        self._bars.start()

    def cached(self, stage: str) -> None:
        self._update(stage, mark="[green]✓[/green]", state="[dim]cached[/dim]", done=1, total=1)

    def start(self, stage: str, uses: str, reason: str) -> None:
        self._update(stage, mark="[cyan]▶[/cyan]", state=f"[dim]{self._plain(reason)}[/dim]")

    def progress(self, stage: str, done: int, total: int, note: str) -> None:
        remaining = self._pace.remaining(done, total, note)
        state = f"{done}/{total} {self._plain(note)}{left(remaining)}"
        self._update(stage, mark="[cyan]▶[/cyan]", state=state, done=done, total=total)

    def finish(self, stage: str, seconds: float, cached: int, total: int) -> None:
        state = f"[dim]{_summary(seconds, cached, total)}[/dim]"
        self._update(stage, mark="[green]✓[/green]", state=state, done=1, total=1)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self._console.print(f"[yellow]warning:[/yellow] {self._plain(text)}")

    def end(self) -> None:
        if self._bars is not None:
            self._bars.stop()

    def _update(self, stage: str, *, mark: str, state: str, done: int = 0, total: int | None = None) -> None:
        if self._bars is not None:
            self._bars.start_task(self._rows[stage])
            self._bars.update(self._rows[stage], mark=mark, state=state, completed=done, total=total)
