"""Times of calls, measured side by side so that their ratios mean something.

On a processor: the CPU time of this process on one thread, because wall time on a shared machine measures the
neighbours. Each sample is a window of many calls; the candidates take turns, window by window, so that a change of
clock or of load meets all of them. Every call uses the next of several copies of its weight, more of them than the
cache holds, as the layers of a model do; one copy would measure the cache.

On a GPU: one CUDA graph holds one call per copy, and the graphs are replayed in turns, so a sample has the gaps between
kernels that a captured model has, and none of Python's. `time_eager` measures what Python adds.

Samples that scatter too much are measured again, up to a stated number of rounds, always all candidates together; then
they are refused, because a solver would take the noise for a difference.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol, TypeVar

import torch

from layerwise.errors import NoisyMeasurement, UsageError
from layerwise.kernels.device import cache_bytes

Call = Callable[[], object]
"""One call of a candidate, on one copy of its weight."""

Key = TypeVar("Key", bound=Hashable)

LEAST_ROTATION = 100_000_000
"""Bytes of weights that a rotation goes through at least; see `Sampling.rotate_bytes`."""


@dataclass(frozen=True)
class Sampling:
    """How much is measured.

    Args:
        window_ms: CPU time of one sample at least. A GPU's sample is one replay of a graph.
        samples: per candidate, at least 3.
        rotate_bytes: bytes of weights that the calls of a candidate go through before one comes again, at least;
            0 keeps one copy, so that it is measured in the cache. None: twice the last level of cache on a processor,
            three times on a GPU, and 100 MB at least.
        max_copies: of a weight, however small it is.
        max_spread: (median - minimum) / minimum above which samples are refused.
        retries: how many times `samples` further rounds may be measured until the latest are quiet enough.
    """

    window_ms: float = 60.0
    samples: int = 9
    rotate_bytes: int | None = None
    max_copies: int = 256
    max_spread: float = 0.10
    retries: int = 4

    def __post_init__(self) -> None:
        if self.samples < 3 or self.window_ms <= 0 or self.max_copies < 1 or self.max_spread <= 0 or self.retries < 0:
            raise UsageError(f"sampling that cannot be measured: {self}", hint="at least 3 samples, nothing negative")


GRAPH_SAMPLES = 30
"""Replays of each graph on a GPU: a replay is short, and the median of 30 is steady."""

GRAPH_CALLS = 16
"""Calls in a graph at least, so that starting it is a small part of its time."""


@dataclass(frozen=True)
class Timing:
    """What was measured of one candidate, per call.

    Args:
        median_ms: half of the samples took longer.
        p10_ms: the tenth percentile.
        p90_ms: the ninetieth.
        mad_ms: median distance from the median.
        min_ms: the least.
        samples: how many.
        quality: CPU time over wall time of the samples, 1 on a machine of one's own; None on a GPU.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    mad_ms: float
    min_ms: float
    samples: int
    quality: float | None = None

    @property
    def spread(self) -> float:
        """(median - minimum) / minimum."""
        return self.median_ms / self.min_ms - 1

    @classmethod
    def of(cls, samples: Sequence[float], quality: float | None = None) -> Timing:
        """Summarise samples, in ms per call."""
        median = statistics.median(samples)
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(
            median_ms=median,
            p10_ms=tenths[0],
            p90_ms=tenths[-1],
            mad_ms=statistics.median(abs(sample - median) for sample in samples),
            min_ms=min(samples),
            samples=len(samples),
            quality=quality,
        )


class Clock(Protocol):
    """Where the seconds come from."""

    def cpu(self) -> float:
        """CPU seconds of this process."""

    def wall(self) -> float:
        """Seconds."""


class ProcessClock:
    """The clocks of the operating system."""

    def cpu(self) -> float:
        return time.process_time()

    def wall(self) -> float:
        return time.perf_counter()


class Recorder(Protocol):
    """Makes graphs on a GPU and times their replays."""

    def record(self, calls: Sequence[Call]) -> Call:
        """One graph of all the calls; the answer replays it."""

    def milliseconds(self, replay: Call) -> float:
        """GPU time of one replay."""


def copies_needed(size_bytes: int, sampling: Sampling, device: str = "cpu") -> int:
    """How many copies of a weight a rotation takes.

    Args:
        size_bytes: that one call reads.
        sampling: `rotate_bytes` and `max_copies`.
        device: `cpu` or `cuda`, for the size of its cache.
    """
    rotate = sampling.rotate_bytes
    if rotate is None:
        rotate = max(LEAST_ROTATION, 3 * _l2_bytes() if device == "cuda" else 2 * cache_bytes())
    return max(1, min(sampling.max_copies, -(-rotate // max(1, size_bytes))))


def _l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_cpu(
    candidates: Mapping[Key, Sequence[Call]], sampling: Sampling | None = None, clock: Clock | None = None
) -> dict[Key, Timing]:
    """Time calls by the CPU time of this process, on one thread of torch.

    Args:
        candidates: what is compared: of each its calls, one per copy of its weight.
        sampling: how much.
        clock: the operating system's if left out.
    Returns:
        CPU milliseconds per call.
    Raises:
        NoisyMeasurement: some still scatter too much after the last retry; names them.
    """
    sampling, clock = sampling or Sampling(), clock or ProcessClock()
    with one_thread(), torch.inference_mode():
        windows = {key: _Window(calls, sampling.window_ms, clock) for key, calls in candidates.items()}
        return _quiet({key: window.sample for key, window in windows.items()}, sampling)


def time_cuda(
    candidates: Mapping[Key, Sequence[Call]],
    sampling: Sampling | None = None,
    recorder: Recorder | None = None,
    lost: Callable[[Key, Exception], None] | None = None,
) -> dict[Key, Timing]:
    """Time calls on a GPU, each candidate's as one CUDA graph.

    Args:
        candidates: as in `time_cpu`.
        sampling: `samples` is raised to 30.
        recorder: CUDA graphs and events if left out.
        lost: told of a candidate that cannot be recorded or replayed, which is then left out; if there is no `lost`,
            its error is raised.
    Returns:
        GPU milliseconds per call, the gaps between calls included.
    Raises:
        UsageError: there is no GPU.
        NoisyMeasurement: as in `time_cpu`.
    """
    sampling = sampling or Sampling()
    if recorder is None:
        from layerwise.kernels.graphs import GraphRecorder

        recorder = GraphRecorder()
    with torch.inference_mode():
        rounds = {key: [*calls] * -(-GRAPH_CALLS // len(calls)) for key, calls in candidates.items()}
        samplers: dict[Key, Callable[[], _Sample]] = {}
        for key, calls in rounds.items():
            try:
                samplers[key] = _recorded(recorder, calls)
            except Exception as error:
                if lost is None:
                    raise
                lost(key, error)
        return _quiet(samplers, sampling, max(sampling.samples, GRAPH_SAMPLES))


def _recorded(recorder: Recorder, calls: Sequence[Call]) -> Callable[[], _Sample]:
    replay, measure, n_calls = recorder.record(calls), recorder.milliseconds, len(calls)
    measure(replay)  # the first replay uploads the graph
    return lambda: _Sample(measure(replay) / n_calls)


def time_eager(
    candidates: Mapping[Key, Sequence[Call]], sampling: Sampling | None = None, recorder: Recorder | None = None
) -> dict[Key, Timing]:
    """Time calls on a GPU as Python launches them, one after another; args and errors as in `time_cuda`."""
    sampling = sampling or Sampling()
    if recorder is None:
        from layerwise.kernels.graphs import LaunchRecorder

        recorder = LaunchRecorder()
    return time_cuda(candidates, sampling, recorder)


@dataclass(frozen=True)
class _Sample:
    """Milliseconds per call, and the CPU and wall seconds that it took to know."""

    milliseconds: float
    cpu: float = 0.0
    wall: float = 0.0


class _Window:
    """A candidate on a processor: every sample is the same number of calls, going on where the last one stopped."""

    def __init__(self, calls: Sequence[Call], window_ms: float, clock: Clock) -> None:
        self._clock, self._calls = clock, cycle(calls)
        for _ in calls:  # every copy once: pages, and what a library prepares at its first call
            next(self._calls)()
        started, self._n_calls = clock.cpu(), 0
        while self._n_calls == 0 or (clock.cpu() - started) * 1e3 < window_ms:
            next(self._calls)()
            self._n_calls += 1

    def sample(self) -> _Sample:
        cpu, wall = self._clock.cpu(), self._clock.wall()
        for _ in range(self._n_calls):
            next(self._calls)()
        cpu, wall = self._clock.cpu() - cpu, self._clock.wall() - wall
        return _Sample(cpu * 1e3 / self._n_calls, cpu, wall)


def _quiet(
    samplers: Mapping[Key, Callable[[], _Sample]], sampling: Sampling, n_samples: int | None = None
) -> dict[Key, Timing]:
    """Rounds of one sample each until the latest of every candidate lie close enough together."""
    wanted = n_samples or sampling.samples
    latest: dict[Key, deque[_Sample]] = {key: deque(maxlen=wanted) for key in samplers}
    timings: dict[Key, Timing] = {}
    for done in range(1, wanted * (1 + sampling.retries) + 1):
        for key, sampler in samplers.items():
            latest[key].append(sampler())
        if done >= wanted:
            timings = {key: _summary(samples) for key, samples in latest.items()}
            if all(timing.spread <= sampling.max_spread for timing in timings.values()):
                return timings
    noisy = [f"{key} {timing.spread:.0%}" for key, timing in timings.items() if timing.spread > sampling.max_spread]
    raise NoisyMeasurement(
        f"times scatter too much after {sampling.retries} retries: the median lies more than "
        f"{sampling.max_spread:.0%} above the minimum ({', '.join(noisy)})",
        hint="measure again on a quieter machine, pin the process to one core, or allow more retries",
    )


def _summary(samples: Sequence[_Sample]) -> Timing:
    wall = sum(sample.wall for sample in samples)
    quality = sum(sample.cpu for sample in samples) / wall if wall else None
    return Timing.of([sample.milliseconds for sample in samples], quality)
