"""The one family of errors that layerwise raises for what a user can mend.

A message says what is wrong, where, and what was found; `hint` says what to do. Anything else that escapes is our own
mistake and keeps its traceback. The command line turns these into one short message and an exit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class LayerwiseError(Exception):
    """Base of the family.

    Args:
        message: what is wrong, where, and what was found.
        hint: what to do about it, without a final full stop.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip from a worker process, where `Exception` alone would lose the hint."""
        return _rebuild, (type(self), self.__dict__.copy())


def _rebuild(cls: type[LayerwiseError], state: dict[str, object]) -> LayerwiseError:
    error = cls.__new__(cls)
    Exception.__init__(error, state.get("message"))
    error.__dict__.update(state)
    return error


@dataclass(frozen=True)
class Mistake:
    """One mistake in a workflow file: where it stands (1-based) and what it is."""

    file: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.text}"


class WorkflowError(LayerwiseError):
    """Every mistake found in a workflow file, sorted by position."""

    exit_code = 2

    def __init__(self, mistakes: Sequence[Mistake], hint: str | None = None) -> None:
        self.mistakes = sorted(mistakes, key=lambda mistake: (mistake.file, mistake.line, mistake.column))
        count = f"{len(mistakes)} error{'s' if len(mistakes) != 1 else ''}"
        super().__init__("\n".join([*map(str, self.mistakes), count]), hint)


class UsageError(LayerwiseError):
    """A command or call with arguments that do not fit."""

    exit_code = 2


def readable(amount: float) -> str:
    """An amount for people: 123,456,789 and not 1.23457e+08."""
    return f"{amount:.6g}" if abs(amount) < 1e6 else f"{amount:,.0f}"


class InfeasibleBudget(LayerwiseError):
    """No allocation keeps within the budget.

    Args:
        resource: the budget that is short.
        budget: what was asked for.
        reachable: the least reachable summed cost of that resource.
    """

    exit_code = 2

    def __init__(self, resource: str, budget: float, reachable: float, message: str | None = None) -> None:
        self.resource, self.budget, self.reachable = resource, budget, reachable
        wanted, hint = f"budget {readable(budget)} {resource}", "raise the budget or add a smaller level to the menu"
        if resource == "ms":
            hint = "raise the budget or add a faster level to the menu"
        if resource == "loss":
            wanted, hint = f"max_loss {readable(budget)}", "raise max_loss or add a better level to the menu"
        super().__init__(
            message
            or f"{wanted} is below the least reachable {readable(reachable)} (short by {readable(reachable - budget)})",
            hint,
        )


class InvalidProblem(LayerwiseError):
    """An allocation problem whose arrays do not fit together; names the unit and the level."""

    exit_code = 2


class ClusterError(LayerwiseError):
    """A Ray cluster that cannot be reached, or that does not let us in."""

    exit_code = 5


class UnsupportedModel(LayerwiseError):
    """A model, or a unit of one, that layerwise cannot take apart."""

    exit_code = 2


class DataError(LayerwiseError):
    """Text that is missing, too short, or used for two purposes that must stay apart."""

    exit_code = 2


class NotFinite(LayerwiseError):
    """NaN or Inf in weights, activations, statistics or losses; names the unit."""


class NoisyMeasurement(LayerwiseError):
    """Times that scatter too much to be compared; names what was timed and by how much."""


class DeviceChanged(LayerwiseError):
    """Times measured on one device and asked for on another; names what differs."""

    exit_code = 2


class CorruptArtifact(LayerwiseError):
    """A stored file whose size or checksum is not the recorded one."""


class StoreError(LayerwiseError):
    """A results folder that cannot be used as it is."""

    exit_code = 4


class DiskFull(LayerwiseError):
    """The file system took no more; everything committed before is safe."""


class StageFailed(LayerwiseError):
    """A stage stopped; names the stage and the item."""
