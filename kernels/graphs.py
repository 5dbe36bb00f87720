"""Times on a GPU: CUDA graphs of many calls, and the same calls launched from Python.

One graph holds every call of a candidate, each on its own copy of the weight, so a replay finds no weight in the cache
and has no gaps of Python between its kernels. Its time is taken by events on the stream, not by the host's clock.

Calls are warmed up and captured on one stream: what a kernel keeps for each stream (counters, workspaces) exists before
the capture, and is no part of the graph. All graphs of a recorder share it, so they are replayed one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.kernels.device import require_gpu
from layerwise.kernels.timing import Call

WARM_UP = 3
"""Rounds of calls before a graph is captured: compilation, handles of libraries, workspaces."""

HEAD_START = 1_000_000
"""Cycles of a GPU, half a millisecond: longer than the host takes to launch a graph."""

AGREEMENT = 1e-2
"""Relative difference allowed between a replay and the same call before: a library may add up in another order."""


class LaunchRecorder:
    """The calls one after another, as Python launches them.

    Raises:
        UsageError: there is no GPU.
    """

    def __init__(self) -> None:
        require_gpu()

    def record(self, calls: Sequence[Call]) -> Call:
        def replay() -> None:
            for call in calls:
                call()

        replay()
        return replay

    def milliseconds(self, replay: Call) -> float:
        """Time between two events around one replay."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._head_start()
        before.record()
        replay()
        after.record()
        torch.cuda.synchronize()
        return float(before.elapsed_time(after))

    def _head_start(self) -> None:
        """None: what the host takes to launch is part of the time."""


class GraphRecorder(LaunchRecorder):
    """The calls as one CUDA graph; each call's result stays alive, so that no two share memory.

    Raises:
        LayerwiseError: in `record`, a replay of the graph gives another result than the calls did.
    """

    def __init__(self) -> None:
        super().__init__()
        self._side = torch.cuda.Stream()

    def record(self, calls: Sequence[Call]) -> Call:
        self._side.wait_stream(torch.cuda.current_stream())
        expected: object = None
        with torch.cuda.stream(self._side):
            for _ in range(WARM_UP):
                for call in calls:
                    expected = call()
        torch.cuda.current_stream().wait_stream(self._side)
        graph, results = torch.cuda.CUDAGraph(), list[object]()
        with torch.cuda.graph(graph, stream=self._side):
            for call in calls:
                results.append(call())

        def replay(kept: object = results) -> None:
            graph.replay()

        replay()
        _require_same(results[-1] if results else None, expected)
        return replay

    def _head_start(self) -> None:
        """Keep the stream busy while the host launches the graph, or the launch is part of the time between events."""
        torch.cuda._sleep(HEAD_START)


def _require_same(replayed: object, expected: object) -> None:
    """Compare two results, if they are tensors and not one and the same memory."""
    if not (isinstance(replayed, Tensor) and isinstance(expected, Tensor)):
        return
    if replayed.data_ptr() == expected.data_ptr():
        return
    difference = float((replayed.float() - expected.float()).norm())
    if not difference <= AGREEMENT * float(expected.float().norm()):  # also if it is not a number
        raise LayerwiseError(
            f"a replayed graph gives another result than its calls (difference {difference:.2g} in norm)",
            hint="a kernel keeps something between calls that its graph does not; leave that backend out",
        )
