"""Times on a GPU: CUDA graphs of many calls, and the same calls launched from Python.

One graph holds every call of a candidate, each on its own copy of the weight, so a replay finds no weight in the cache
and has no gaps of Python between its kernels. Its time is taken by events on the stream, not by the host's clock.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerwise.kernels.device import require_gpu
from layerwise.kernels.timing import Call

WARM_UP = 3
"""Rounds of calls before a graph is captured: compilation, handles of libraries, workspaces."""


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
        before.record()
        replay()
        after.record()
        torch.cuda.synchronize()
        return float(before.elapsed_time(after))


class GraphRecorder(LaunchRecorder):
    """The calls as one CUDA graph; each call's result stays alive, so that no two share memory."""

    def record(self, calls: Sequence[Call]) -> Call:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(side)
        graph, results = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            for call in calls:
                results.append(call())

        def replay(kept: object = results) -> None:
            graph.replay()

        return replay
