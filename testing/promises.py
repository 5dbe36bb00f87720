"""What the suites are made of: promises, each with a sentence and a check that says whether it is kept.

A suite is a list of promises of one thing. `check_...` goes through it; where every promise shall be a test of its own,
the list is what to parametrise over:

    @pytest.mark.parametrize("promise", encoding_promises("ternary", levels), ids=str)
    def test_ternary(promise):
        promise()

No test framework is needed, and plain `assert` is not used, so that a suite checks the same under `python -O`.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

Refusal = TypeVar("Refusal", bound=BaseException)


@dataclass(frozen=True)
class Promise:
    """One thing that is promised. Call it to see whether it is kept.

    Args:
        of: who promises it: `gptq 2`, a method and the number of its menu.
        text: what, as the rest of a sentence that begins with "it is promised that".
        check: raises if it is not so.
    """

    of: str
    text: str
    check: Callable[[], None]

    def __call__(self) -> None:
        """Check it.

        Raises:
            AssertionError: it is broken; says which promise and how. Whatever else was raised is its cause.
        """
        try:
            self.check()
        except Exception as error:
            found = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            raise AssertionError(f"{self.of} breaks the promise that {self.text}: {found}") from error

    def __str__(self) -> str:
        return f"{self.of}: {self.text}"


def keep_all(promises: Iterable[Promise]) -> None:
    """Check one promise after the other; the first that is broken ends it."""
    for promise in promises:
        promise()


def demand(kept: object, sentence: str) -> None:
    """Raise AssertionError with the sentence, unless something is true."""
    if not kept:
        raise AssertionError(sentence)


def close(found: float | None, expected: float | None, *, rel: float = 1e-6, absolute: float = 1e-12) -> bool:
    """Whether two numbers agree; None agrees with None only."""
    if found is None or expected is None:
        return found is expected
    return math.isclose(found, expected, rel_tol=rel, abs_tol=absolute)


def refusal(kind: type[Refusal], what: str, call: Callable[[], object]) -> Refusal:
    """The error of that kind that a call raises; another one passes through.

    Args:
        kind: what must be raised.
        what: is refused, for the message.
        call: does it.
    """
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{what} is not refused with {kind.__name__}")


def answer_of_fresh_interpreter(program: str) -> str:
    """What a program prints in a new process that finds our packages: what a worker, or `layerwise validate`, sees."""
    ours = f"import sys\nsys.path += [path for path in {sys.path!r} if path not in sys.path]\n"
    done = subprocess.run(
        [sys.executable, "-c", ours + program],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,  # against hanging only
    )
    demand(done.returncode == 0, f"in a new process it failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.strip()
