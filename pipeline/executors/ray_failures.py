"""What comes back from a call on Ray: its answer, what it raised, or the news that its process died."""

from __future__ import annotations

from typing import Any

from layerwise.errors import LayerwiseError, StageFailed


def fetch(ray: Any, ref: Any) -> Any:
    """The answer of a finished call.

    Raises:
        Exception: what the call raised, as the type it was; Ray's own report with the worker's traceback is its cause.
        ray.exceptions.RayError: the call did not end by itself, its process died.
        StageFailed: the call raised something that cannot be sent between processes.
    """
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ray.exceptions.RayError):
            raise StageFailed(str(error.cause)) from error
        raise error.cause from error


def lost(ray: Any, doing: str, error: Exception) -> LayerwiseError:
    """The error to raise when Ray, or we, gave up on what processes die of.

    Args:
        doing: what they did, as in "working on shard-1".
    """
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return StageFailed(
            f"out of memory while {doing}: {_first_line(error)}",
            hint="give each item more cpus or state its memory, so that fewer run at a time; finished items are kept",
        )
    return StageFailed(
        f"the process {doing} died again and again: {_first_line(error)}",
        hint="`--executor inline` shows where it dies; finished items are kept",
    )


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
