"""Where the work inside a stage runs: in this process (`inline`) or on Ray (`ray`).

`open_executor` gives a raw executor, which answers items; `journal.JournaledExecutor` puts the memory around it that
`layerwise.stages.contract.Executor` promises to stages. Nothing heavy is imported before it is needed: opening the Ray
executor imports no Ray, and a run whose stages are all cached never starts one.
"""

from __future__ import annotations

import inspect

from layerwise.errors import UsageError
from layerwise.pipeline.executors.raw import RawExecutor, Resources
from layerwise.stages.registry import lookup, names

__all__ = ["EXECUTORS", "RawExecutor", "Resources", "executor_names", "open_executor"]

EXECUTORS = {
    "inline": "layerwise.pipeline.executors.inline:InlineExecutor",
    "ray": "layerwise.pipeline.executors.ray:RayExecutor",
}


def executor_names() -> list[str]:
    """Every executor on offer."""
    return names(EXECUTORS, "layerwise.executors")


def open_executor(
    name: str,
    resources: Resources = Resources(),  # noqa: B008 (frozen)
    address: str | None = None,
) -> RawExecutor:
    """The executor of that name; the caller closes it.

    Args:
        name: a key of `EXECUTORS`, or of another package's entry point group `layerwise.executors`.
        resources: what one item occupies; `RawExecutor.sized` gives the same executor for other items.
        address: of a running cluster, for executors that can join one.
    Raises:
        UsageError: nobody offers the name; names the nearest known one. Or the executor joins no clusters.
    """
    make = lookup(name, EXECUTORS, group="layerwise.executors", kind="executor")
    if address is None:
        plain: RawExecutor = make(resources)
        return plain
    if "address" not in inspect.signature(make).parameters:
        raise UsageError(f"executor {name} joins no cluster, and the address is {address}", hint="say --executor ray")
    joining: RawExecutor = make(resources, address=address)
    return joining
