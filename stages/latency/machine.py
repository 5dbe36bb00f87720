"""What the stages that time things share: their parameters, the machine they stand for, and one item at a time.

Times are true for one machine. Its fingerprint is part of the stage's key (`Stage.measures`), it is compared again
wherever an item is worked on, and it stands in the artifact. Items go through the executor one after another, each with
a key: an interrupted stage repeats none of them, and no two of them compete for a core, a cache or a memory bus.

Two measurements never agree to the last bit, so whatever is made from times is made again when they are taken again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from layerwise.errors import DeviceChanged
from layerwise.stages.contract import Context, Params

if TYPE_CHECKING:
    from layerwise.kernels.timing import Sampling

Answer = TypeVar("Answer")

TABLE = "table.json"
"""File of a `latency` artifact: every backend's time, as `layerwise.kernels.latency_table` keeps them."""

WHOLE = 10
"""How many times longer the windows of whole models are: one of 20 ms holds a forward pass or two of a small model."""


class MeasureParams(Params):
    """How much is measured, and on what."""

    device: Literal["cpu", "cuda"] = Field("cpu", description="cpu: process CPU time on one thread; cuda: CUDA graphs")
    window_ms: float = Field(
        60.0,
        gt=0,
        description="CPU time of one sample at least, ten times as much of a whole model; a GPU's is a graph",
    )
    samples: int = Field(9, ge=3, description="samples of each time; its median counts")
    spread: float = Field(
        0.10, gt=0, description="(median - minimum) / minimum above which times are too noisy to be used"
    )
    retries: int = Field(4, ge=0, description="how many times so many samples are taken again before giving up")

    def sampling(self, **more: Any) -> Sampling:
        """The same in the words of `layerwise.kernels.timing`."""
        from layerwise.kernels.timing import Sampling

        return Sampling(self.window_ms, self.samples, max_spread=self.spread, retries=self.retries, **more)

    def whole_sampling(self) -> Sampling:
        """For whole models, whose first pass after another model's turn finds its weights out of the cache."""
        return replace(self.sampling(), window_ms=WHOLE * self.window_ms)


def fingerprint(params: MeasureParams) -> dict[str, Any]:
    """The machine at hand, as JSON: what `Stage.measures` asks for.

    Raises:
        UsageError: it has no such device.
    """
    from layerwise.kernels.device import this_device

    return this_device(params.device).as_json()


def one_by_one(
    context: Context, work: Mapping[str, Callable[[], Answer]], machine: Mapping[str, Any], *, note: str = "times"
) -> Iterator[tuple[str, Answer]]:
    """Work on items one after another, on a machine with a given fingerprint.

    Args:
        context: the stage's.
        work: by key, what is to be done: a `partial` of a function of a module, whose answer is JSON.
        machine: from `fingerprint`.
        note: what the items are, for the progress display.
    Yields:
        key and answer.
    Raises:
        DeviceChanged: an item was sent to a machine with another fingerprint.
    """
    for done, (key, item) in enumerate(work.items()):
        context.progress(done, len(work), note)
        (answer,) = context.executor.map(partial(_on, machine), [item], keys=[key])
        yield key, answer
    context.progress(len(work), len(work), note)


def _on(machine: Mapping[str, Any], work: Callable[[], Answer]) -> Answer:
    from layerwise.kernels.device import Device, this_device

    planned = Device.from_json(machine)
    here = this_device(planned.kind)
    found = planned.differences(here)
    if found:
        raise DeviceChanged(
            f"times for one machine ({planned.digest}) cannot be taken on another ({here.digest}): {'; '.join(found)}",
            hint="run the workflow on the machine that is to be measured, without a cluster",
        )
    return work()
