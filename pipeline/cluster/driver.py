"""What a submitted job runs on the cluster: the driver of one attempt at a run.

`start.sh` (see `shipping.py`) starts it in the job's folder as `python -m layerwise.pipeline.cluster.driver RESULTS RUN
ATTEMPT NONCE`. Before anything is computed it makes sure that this Python can run layerwise, that the results folder is
the one that `submit` wrote into, and that every file which was not shipped is visible; what is missing is named, and
the exit code is 2. Then it is a run like any other, on the cluster that it finds itself in.

The module imports nothing of ours at its top, and keeps to words that an older Python reads, so that a Python which is
too old is told so.
"""

from __future__ import annotations

import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

OLDEST_PYTHON = (3, 11)
_NEEDED = ("numpy", "pyarrow", "pydantic", "ray", "safetensors", "scipy", "torch", "transformers", "yaml")
_STOPPED = 3


def main() -> None:
    """Make the attempt that the command line names; ends with the run's exit code."""
    _check_python()
    from layerwise.errors import LayerwiseError

    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) is not signal.SIG_IGN:
            signal.signal(name, _interrupt)
    try:
        results, run, number, nonce = sys.argv[1:]
        drive(Path(results), run, int(number), nonce)
    except LayerwiseError as error:
        notes = "".join("\n" + note for note in getattr(error, "__notes__", ()))
        print("error: " + str(error) + notes, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; what is finished is kept", file=sys.stderr, flush=True)
        sys.exit(_STOPPED)


def drive(results: Path, run: str, number: int, nonce: str) -> None:
    """Run the workflow of the present folder as one attempt at a run.

    Args:
        results: the results folder, absolute.
        run: the id that the workflow must give.
        number: of the attempt.
        nonce: of its submission.
    Raises:
        UsageError: a folder or file is not visible from here, or is another one.
        LayerwiseError: the run failed.
    """
    from layerwise.errors import UsageError
    from layerwise.pipeline.cluster.submission import read_submission
    from layerwise.pipeline.display import LineDisplay
    from layerwise.pipeline.runs.kept_workflow import WORKFLOW, damage_of, read_kept
    from layerwise.pipeline.runs.run import Run
    from layerwise.pipeline.workflow import load_workflow

    folder, here = results / "runs" / run, "on " + socket.gethostname() + ", where the job runs"
    submission = read_submission(folder, number)
    if submission is None or submission.nonce != nonce:
        raise UsageError(
            f"the results folder {results} is not visible {here}"
            if submission is None
            else f"the results folder {results} {here}, is another one than where it was submitted",
            hint="name one with --results that every machine of the cluster has under the same path",
        )
    missing = [path for path in submission.elsewhere if not Path(path).exists()]
    if missing:
        raise UsageError(
            f"not visible {here}: {', '.join(missing)}",
            hint="put it where every machine of the cluster sees it under the same path, or let it be shipped",
        )
    written = read_kept(folder / WORKFLOW)
    if written is None:
        raise UsageError(
            f"{folder / WORKFLOW} {damage_of(folder / WORKFLOW)}, seen {here}", hint="submit the workflow file again"
        )
    attempt = Run(load_workflow("workflow.yaml"), results, LineDisplay(), written)
    if attempt.id != run:
        raise UsageError(
            f"the model or a text {here}, is not the one that was submitted: this would be {attempt.id}",
            hint="put the same files there, or let them be shipped",
        )
    attempt.execute("ray", submission.argv, wait=False, address="auto", submitted=number)


def _check_python() -> None:
    found = sys.version.split()[0] + " (" + sys.executable + ")"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        _refuse("layerwise needs Python " + oldest + " or later; the cluster's Ray runs on " + found)
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        _refuse("the Python of the cluster's Ray, " + found + ", lacks " + ", ".join(missing))


def _refuse(text: str) -> NoReturn:
    print("error: " + text, file=sys.stderr)
    print("hint: install layerwise, or what it requires, on every machine of the cluster", file=sys.stderr, flush=True)
    sys.exit(2)


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
