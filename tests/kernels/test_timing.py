"""The arithmetic of timing, with a clock that moves only when a call says so."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from layerwise.errors import NoisyMeasurement, UsageError
from layerwise.kernels import timing
from layerwise.kernels.timing import Call, Sampling, Timing, copies_needed, one_thread, time_cpu, time_cuda


class FakeClock:
    """Seconds that pass by `spend` alone; wall time runs `slowdown` times as fast."""

    def __init__(self, slowdown: float = 1.0) -> None:
        self.seconds, self.slowdown = 0.0, slowdown

    def cpu(self) -> float:
        return self.seconds

    def wall(self) -> float:
        return self.seconds * self.slowdown

    def spend(self, milliseconds: float) -> None:
        self.seconds += milliseconds / 1e3


class FakeRecorder:
    """Graphs whose replays take scripted milliseconds."""

    def __init__(self, milliseconds: Callable[[Sequence[Call]], Iterator[float]]) -> None:
        self._milliseconds = milliseconds
        self._scripts: dict[Call, Iterator[float]] = {}

    def record(self, calls: Sequence[Call]) -> Call:
        def replay() -> None:
            for call in calls:
                call()

        self._scripts[replay] = self._milliseconds(calls)
        return replay

    def milliseconds(self, replay: Call) -> float:
        replay()
        return next(self._scripts[replay])


def steady(clock: FakeClock, milliseconds: float) -> Call:
    return lambda: clock.spend(milliseconds)


def test_a_steady_call_takes_what_it_takes() -> None:
    clock = FakeClock(slowdown=4.0)
    timings = time_cpu({"a": [steady(clock, 2.0)], "b": [steady(clock, 5.0)]}, Sampling(60, 9), clock)
    assert timings["a"].median_ms == pytest.approx(2.0)
    assert timings["b"].median_ms == pytest.approx(5.0)
    assert timings["a"].mad_ms == pytest.approx(0, abs=1e-9)
    assert timings["a"].spread == pytest.approx(0, abs=1e-9)
    assert timings["a"].samples == 9
    assert timings["a"].quality == pytest.approx(1 / 4)


def test_a_window_is_as_many_calls_as_fill_it() -> None:
    clock, calls = FakeClock(), itertools.count()

    def call() -> None:
        next(calls)
        clock.spend(7.0)

    time_cpu({"a": [call]}, Sampling(window_ms=60, samples=8), clock)
    assert next(calls) == 1 + 9 + 8 * 9  # every copy once, then 9 calls of 7 ms are 63, as in each window


def test_copies_take_turns_through_all_windows() -> None:
    clock, seen = FakeClock(), list[int]()

    def call(copy: int) -> Call:
        def run() -> None:
            seen.append(copy)
            clock.spend(10.0)

        return run

    time_cpu({"a": [call(0), call(1), call(2)]}, Sampling(window_ms=20, samples=3), clock)
    assert seen == [index % 3 for index in range(len(seen))]


def test_candidates_take_turns_window_by_window() -> None:
    clock, order = FakeClock(), list[str]()

    def call(name: str) -> Call:
        def run() -> None:
            order.append(name)
            clock.spend(60.0)

        return run

    time_cpu({name: [call(name)] for name in "abc"}, Sampling(window_ms=60, samples=4), clock)
    warm_up = "aabbcc"
    assert "".join(order) == warm_up + "abc" * 4


def test_a_change_of_clock_in_the_middle_meets_all_candidates_alike() -> None:
    clock = FakeClock()
    speed = [1.0]
    windows = itertools.count()

    def call(milliseconds: float) -> Call:
        def run() -> None:
            if next(windows) == 12:
                speed[0] = 1.05
            clock.spend(milliseconds * speed[0])

        return run

    timings = time_cpu({"a": [call(50.0)], "b": [call(100.0)]}, Sampling(window_ms=50, samples=9), clock)
    assert timings["b"].median_ms / timings["a"].median_ms == pytest.approx(2.0, rel=1e-6)


def test_times_that_scatter_are_measured_again_and_only_the_latest_count() -> None:
    clock = FakeClock()
    noise = itertools.chain([10, 10], [10.0, 20, 20, 10, 20, 20, 20, 20, 20], itertools.repeat(15.0))
    timings = time_cpu({"a": [lambda: clock.spend(next(noise))]}, Sampling(10, samples=4, retries=3), clock)
    assert timings["a"] == Timing(*[pytest.approx(v) for v in (20, 20, 20, 0, 20)], samples=4, quality=pytest.approx(1))


def test_times_that_go_on_scattering_are_refused_after_the_last_retry() -> None:
    clock, calls = FakeClock(), itertools.count()
    noise = itertools.cycle([10.0, 13.0, 13.0])

    def noisy() -> None:
        next(calls)
        clock.spend(next(noise))

    with pytest.raises(NoisyMeasurement, match=r"after 2 retries.*above the minimum \(noisy 30%\)") as error:
        time_cpu({"noisy": [noisy], "quiet": [steady(clock, 10)]}, Sampling(10, samples=6, retries=2), clock)
    assert next(calls) == 2 + 6 * 3
    assert "quieter machine" in str(error.value)


def test_the_summary_is_numpys() -> None:
    samples = np.random.default_rng(0).lognormal(size=31)
    timing = Timing.of(samples.tolist())
    assert timing.median_ms == pytest.approx(np.median(samples))
    assert timing.p10_ms == pytest.approx(np.percentile(samples, 10))
    assert timing.p90_ms == pytest.approx(np.percentile(samples, 90))
    assert timing.mad_ms == pytest.approx(np.median(np.abs(samples - np.median(samples))))
    assert timing.spread == pytest.approx((statistics.median(samples) - min(samples)) / min(samples))


@pytest.mark.parametrize(("size", "copies"), [(1, 100), (10**6, 100), (3 * 10**7, 4), (10**8, 1), (10**9, 1)])
def test_copies_fill_the_rotation_within_their_bound(size: int, copies: int) -> None:
    assert copies_needed(size, Sampling(rotate_bytes=10**8, max_copies=100)) == copies


def test_a_rotation_is_larger_than_the_cache_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda: 300_000_000)
    assert copies_needed(10**7, Sampling()) == 60
    monkeypatch.setattr(timing, "cache_bytes", lambda: 0)
    assert copies_needed(10**7, Sampling()) == 10
    assert copies_needed(10**7, Sampling(rotate_bytes=0)) == 1


@pytest.mark.parametrize("wrong", [{"samples": 2}, {"window_ms": 0.0}, {"max_spread": 0.0}, {"retries": -1}])
def test_sampling_that_measures_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="sampling that cannot be measured"):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_torch_computes_on_one_thread_meanwhile_and_has_its_own_again_after_an_error() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), one_thread():
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_graph_of_many_calls_counts_per_call() -> None:
    recorder = FakeRecorder(lambda calls: itertools.repeat(0.5 * len(calls)))
    seen = list[str]()
    calls = {"a": [lambda: seen.append("a")] * 18, "b": [lambda: seen.append("b"), lambda: seen.append("B")]}
    timings = time_cuda(calls, Sampling(samples=5), recorder)
    assert "".join(seen[:34]) == "a" * 18 + "bB" * 8  # copies in their order, often enough to fill a graph
    assert {name: timing.median_ms for name, timing in timings.items()} == {"a": 0.5, "b": 0.5}
    assert timings["a"].samples == timing.GRAPH_SAMPLES
    assert timings["a"].quality is None


def test_graphs_are_replayed_in_turns() -> None:
    order = list[str]()
    recorder = FakeRecorder(lambda calls: itertools.repeat(1.0))
    time_cuda({name: [lambda name=name: order.append(name)] for name in "ab"}, Sampling(), recorder)
    graph = "a" * timing.GRAPH_CALLS + "b" * timing.GRAPH_CALLS
    assert "".join(order) == graph * (1 + timing.GRAPH_SAMPLES)


def test_the_first_replay_of_a_graph_does_not_count() -> None:
    recorder = FakeRecorder(lambda calls: itertools.chain([1000.0], itertools.repeat(1.0 * len(calls))))
    assert time_cuda({"a": [lambda: None]}, Sampling(), recorder)["a"].p90_ms == 1.0


def test_a_candidate_that_cannot_be_recorded_is_left_out_alone_if_somebody_is_told() -> None:
    def broken() -> None:
        raise RuntimeError("not compiled")

    calls, told = {"a": [broken], "b": [lambda: None]}, list[tuple[str, str]]()
    recorder = FakeRecorder(lambda calls: itertools.repeat(1.0 * len(calls)))
    timings = time_cuda(calls, Sampling(), recorder, lost=lambda name, error: told.append((name, str(error))))
    assert {name: timing.median_ms for name, timing in timings.items()} == {"b": 1.0}
    assert told == [("a", "not compiled")]
    with pytest.raises(RuntimeError, match="not compiled"):
        time_cuda(calls, Sampling(), recorder)


def test_a_gpus_times_that_scatter_are_refused_too() -> None:
    noise = itertools.cycle([1.0, 2.0, 2.0])
    recorder = FakeRecorder(lambda calls: noise)
    with pytest.raises(NoisyMeasurement, match="after 1 retries"):
        time_cuda({"a": [lambda: None]}, Sampling(retries=1), recorder)


def test_real_calls_have_finite_times() -> None:
    W, x = torch.randn(64, 64), torch.randn(1, 64)
    timings = time_cpu({"a": [lambda: x @ W]}, Sampling(window_ms=0.2, samples=3, max_spread=100))
    assert 0 < timings["a"].min_ms <= timings["a"].median_ms < math.inf


@pytest.mark.gpu
def test_a_graph_computes_what_its_calls_do() -> None:
    from layerwise.kernels.graphs import GraphRecorder

    W, x = torch.randn(256, 256, device="cuda"), torch.randn(1, 256, device="cuda")
    y = torch.zeros(1, 256, device="cuda")
    recorder = GraphRecorder()
    replay = recorder.record([lambda: torch.matmul(x, W, out=y)])
    x.fill_(1.0)
    assert recorder.milliseconds(replay) > 0
    torch.testing.assert_close(y, x @ W)


@pytest.mark.gpu
def test_a_graph_that_computes_something_else_is_refused() -> None:
    from layerwise.errors import LayerwiseError
    from layerwise.kernels.graphs import GraphRecorder

    x = torch.ones(256, device="cuda")
    with pytest.raises(LayerwiseError, match="gives another result than its calls"):
        GraphRecorder().record([lambda: x.add_(1).clone()])


@pytest.mark.gpu
def test_graphs_of_one_recorder_agree_with_their_calls_whatever_ran_before() -> None:
    from layerwise.kernels.graphs import GraphRecorder
    from layerwise.kernels.quantized import Quantized
    from layerwise.kernels.quantized_matmul import quantized_matmul

    codes = torch.randint(0, 16, (256, 4096), dtype=torch.uint8)
    packed = Quantized.pack(codes, torch.full((256, 32), 0.01).half(), bits=4, group_size=128).to("cuda")
    x = torch.randn(1, 4096, device="cuda").half()
    expected, recorder, found = quantized_matmul(x, packed), GraphRecorder(), list[torch.Tensor]()
    y = torch.empty_like(expected)
    replays = [recorder.record([lambda: y.copy_(quantized_matmul(x, packed))] * 3) for _ in range(2)]
    for replay in (replays[1], replays[0], replays[1]):  # the later one first: nothing waits for the other's nodes
        y.zero_()
        replay()
        found.append(y.clone())
    assert all(torch.equal(result, expected) for result in found)
