"""Tells, before any stage is made, that a GPU is missing which one of them will need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from layerwise.errors import LayerwiseError
from layerwise.pipeline.executors import RawExecutor
from layerwise.pipeline.runs.plan import StagePlan


def check_devices(plans: Iterable[StagePlan], opened: Callable[[], RawExecutor]) -> None:
    """Have a task of every size that is to compute on a GPU look for it, where it would be worked on.

    Raises:
        UsageError: there is none, or torch cannot use it; names the stage.
    """
    looked = set()
    for node in (plan.node for plan in plans if plan.artifact is None):
        if node.resources.device == "cpu" or node.resources in looked:
            continue
        looked.add(node.resources)
        try:
            for _ in opened().sized(node.resources).stream(_look, [None], ["the device"]):
                pass
        except LayerwiseError as error:
            error.message = f"stage {node.id}: {error.message}"
            raise


def left_on_cpu(plans: Sequence[StagePlan]) -> Iterator[str]:
    """What computes on the CPU although the workflow asks for GPUs, told before it runs."""
    if any(plan.node.asked.device == "cuda" or plan.node.asked.resources.gpus for plan in plans):
        for plan in plans:
            if plan.artifact is None and plan.node.resources.device == "cpu" and plan.node.asked.device == "auto":
                yield f"{plan.node.id}: computes on the CPU, '{plan.node.stage.name}' cannot use a GPU"


def _look(_: None) -> None:
    from layerwise.kernels.device import require_gpu

    require_gpu()
