"""What every executor is: the resources of one item, the raw protocol, and how a call is made where the work happens.

A raw executor knows how to answer items and nothing of stages. Its `stream` gives each answer as it arrives, in
whatever order they finish; `journal` makes it durable at once, and of it all what stages see
(`layerwise.stages.contract.Executor`).

Both executors make every call through `measured`, because the number of torch threads decides how sums are split, and
with it the last bits of a result: the same number everywhere gives the same bytes everywhere.

Left out: deadlines and duplicates of slow items. Work on units and candidates is bounded by its size.
"""

from __future__ import annotations

import itertools
import os
import resource
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from layerwise.errors import UsageError
from layerwise.stages.contract import Answer, Item

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # torch reads both, and lets the second win


@dataclass(frozen=True)
class Resources:
    """What one item, or one replica, occupies while it runs.

    Args:
        cpus: cores, and with them torch threads; a share below 1 still gets one thread.
        gpus: devices; a share (0.5) lets several items use one device, each minding its own memory.
        memory_bytes: how much is set aside; None for no claim. It decides where work fits and limits nothing.
        device: `cpu` or `cuda`: what the work is computed on, which decides its last bits.
    Raises:
        UsageError: a number that no machine can offer.
    """

    cpus: float = 1
    gpus: float = 0
    memory_bytes: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not (self.cpus > 0 and self.gpus >= 0 and (self.memory_bytes is None or self.memory_bytes > 0)):
            raise UsageError(f"impossible resources: {self}", hint="cpus and memory must be above 0, gpus 0 or more")

    @property
    def threads(self) -> int:
        """Torch threads of one item."""
        return max(1, int(self.cpus))

    def __str__(self) -> str:
        return describe(self.cpus, self.gpus, self.memory_bytes)


Item_contra = TypeVar("Item_contra", contravariant=True)
Answer_co = TypeVar("Answer_co", covariant=True)


class RawReplicas(Protocol[Item_contra, Answer_co]):
    """Replicas without memory."""

    def stream(
        self, items: Sequence[Item_contra], names: Sequence[str] | None = None
    ) -> Generator[tuple[int, Answer_co], None, None]:
        """As `RawExecutor.stream`, with what the factory made in place of `fn`."""
        ...


class RawExecutor(Protocol):
    """An executor without memory."""

    @property
    def workers(self) -> int:
        """How many items run at a time."""
        ...

    @property
    def resources(self) -> Resources:
        """What one item occupies."""
        ...

    @property
    def peak_rss_bytes(self) -> int:
        """The most memory that any process had resident after a call; 0 before the first."""
        ...

    def stream(
        self, fn: Callable[[Item], Answer], items: Sequence[Item], names: Sequence[str] | None = None
    ) -> Generator[tuple[int, Answer], None, None]:
        """Answer every item, each as soon as it is there.

        Args:
            fn: a function of a module, so that a worker can import it.
            items: picklable, and small.
            names: what to call an item in an error; its position otherwise.
        Yields:
            position of the item, and its answer.
        Raises:
            Exception: whatever `fn` raised, with a note that names the item. Nothing of this call runs any more.
            StageFailed: the process that worked on an item died, again and again.
        """
        ...

    def replicas(
        self, factory: Callable[[], Callable[[Item], Answer]]
    ) -> AbstractContextManager[RawReplicas[Item, Answer]]:
        """As in `contract.Executor`; until its end the cores belong to the replicas, and `stream` is refused.

        What `factory` raises counts as raised by the item for which it was called: replicas load at their first item. A
        replica that raised is not used again.
        """
        ...

    def sized(self, resources: Resources) -> RawExecutor:
        """The same executor for items of another size; what was started is shared, and closed together."""
        ...

    def close(self) -> None:
        """Stop what was started. A closed executor starts anew at the next use."""
        ...


def describe(cpus: float, gpus: float, memory_bytes: float | None) -> str:
    """Resources as a person reads them: "2 cpus, 1 gpus, 40 GiB of memory"."""
    memory = "" if memory_bytes is None else f", {memory_bytes / 2**30:.3g} GiB of memory"
    return f"{cpus:g} cpus, {gpus:g} gpus{memory}"


def gathered(parts: Sequence[Any], keys: Sequence[str], calls: int) -> tuple[list[Any], list[str]]:
    """Parts as items: in at most so many runs of neighbours, whose sizes differ by one at most; none is empty.

    Returns:
        the items, tuples of parts, and what to call each in an error.
    """
    bounds = [len(parts) * call // calls for call in range(calls + 1)]
    runs = [(start, end) for start, end in itertools.pairwise(bounds) if start < end]
    items = [tuple(parts[start:end]) for start, end in runs]
    return items, [keys[start] + (f" and {end - start - 1} more" if end - start > 1 else "") for start, end in runs]


def item_names(items: Sequence[object], names: Sequence[str] | None) -> Sequence[str]:
    """The given names, or "item 3 of 8"."""
    return names if names is not None else [f"item {index + 1} of {len(items)}" for index in range(len(items))]


@contextmanager
def naming(item: str) -> Iterator[None]:
    """Add the item's name to whatever exception passes."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while working on {item}")
        raise


def measured(fn: Callable[[Item], Answer], item: Item, threads: int) -> tuple[Answer, int]:
    """Call `fn(item)` with so many torch threads.

    Returns:
        the answer, and the peak resident memory in bytes of this process so far.
    """
    with _torch_threads(threads):
        answer = fn(item)
    return answer, process_peak_rss_bytes()


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Bound torch's threads: directly if it is loaded, by the environment for a call that is the first to load it.

    More threads than the machine has cores are of no use, and thousands of them take it down.
    """
    threads = min(threads, os.cpu_count() or 1)
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    environment = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    if torch:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(before)
        for name, value in environment.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def process_peak_rss_bytes() -> int:
    """The most memory that this process had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
