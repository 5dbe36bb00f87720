"""Races: who takes part, on how many copies, and what rows come of scripted times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from layerwise.errors import UsageError
from layerwise.kernels.backends import Work, able, prepare
from layerwise.kernels.dense import Dense
from layerwise.kernels.device import this_device
from layerwise.kernels.dispatch import Dispatcher
from layerwise.kernels.latency_table import Row
from layerwise.kernels.measure import (
    races,
    rotation,
    run_race,
    run_together,
    table_of,
)
from layerwise.kernels.packed import Packed
from layerwise.kernels.quantized import Quantized
from layerwise.kernels.timing import Call, Sampling, Timing
from layerwise.kernels.unstructured import Unstructured

SMALL = Sampling(window_ms=0.1, samples=3, rotate_bytes=0, max_spread=1000)
ALWAYS = ("linear", "matmul", "mkl", "onednn")


def quantized(n: int, k: int, bits: int, group_size: int = -1) -> Quantized:
    groups = 1 if group_size == -1 else -(-k // group_size)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    return Quantized.pack(codes, torch.rand(n, groups, generator=generator).half(), bits=bits, group_size=group_size)


class ScriptedTimer:
    """Gives each candidate the milliseconds of its backend, and keeps what it was asked."""

    def __init__(self, milliseconds: Mapping[str, float]) -> None:
        self.milliseconds, self.asked = milliseconds, list[dict[str, int]]()

    def __call__(self, candidates: Mapping[str, Sequence[Call]], sampling: Sampling) -> dict[str, Timing]:
        self.asked.append({name: len(calls) for name, calls in candidates.items()})
        for calls in candidates.values():
            for call in calls:
                call()
        return {name: self._timing(name.rpartition(" ")[2]) for name in candidates}

    def _timing(self, backend: str) -> Timing:
        ms = self.milliseconds[backend]
        return Timing(ms, ms, ms, 0.0, ms, 3, 1.0)


TIMES = {"linear": 6.0, "matmul": 7.0, "mkl": 5.0, "onednn": 8.0, "int4pack": 1.25, "int8_dynamic": 2.0}


def find(rows: Sequence[Row], label: str) -> dict[str, tuple[float, str]]:
    return {row.backend: (row.median_ms, row.status) for row in rows if row.label == label}


def test_one_race_has_every_product_of_a_shape() -> None:
    timer = ScriptedTimer(TIMES)
    weights: list[Packed] = [quantized(32, 64, 4, 32), quantized(32, 64, 8), quantized(32, 64, 2)]
    (race,) = races(weights, [1], torch.float32, torch.device("cpu"))
    rows = run_race(race, SMALL, timer)
    kernels = {"int4-g32-sym by int4pack": 1, "int8-channel-sym by int8_dynamic": 1}
    assert timer.asked == [{f"dense by {name}": 1 for name in ALWAYS} | kernels]
    assert find(rows, "dense") == {name: (TIMES[name], "measured") for name in ALWAYS}
    assert find(rows, "int4-g32-sym") == {"int4pack": (1.25, "measured")}
    assert find(rows, "int8-channel-sym") == {"int8_dynamic": (2.0, "measured")}
    assert find(rows, "int2-channel-sym") == {"mkl": (5.0, "no_kernel")}


def test_a_mask_has_a_kernel_on_a_processor_only_for_float32() -> None:
    masked = Unstructured.from_mask(torch.eye(32, 64).bool(), torch.ones(32))
    for dtype, found in ((torch.float32, ("csr", "measured")), (torch.bfloat16, ("linear", "no_kernel"))):
        (race,) = races([masked], [1], dtype, torch.device("cpu"))
        rows = run_race(race, SMALL, ScriptedTimer(dict.fromkeys(ALWAYS, 5.0) | {"csr": 1.0}))
        assert [(row.backend, row.status) for row in rows if row.label == masked.label] == [found]


def test_sizes_are_those_of_what_is_read() -> None:
    packed = quantized(32, 64, 4, 32)
    (race,) = races([packed], [1], torch.float32, torch.device("cpu"))
    sizes = {(row.label, row.size_bytes) for row in run_race(race, SMALL, ScriptedTimer(TIMES))}
    assert sizes == {("dense", 32 * 64 * 4), ("int4-g32-sym", packed.size_bytes)}


def test_each_shape_and_number_of_rows_is_a_race_and_each_label_runs_once() -> None:
    weights: list[Packed] = [quantized(32, 64, 4, 32), quantized(32, 64, 4, 32), quantized(16, 64, 4, 32)]
    planned = races(weights, [1, 16, 1], torch.float32, torch.device("cpu"))
    assert [(race.note, len(race.weights)) for race in planned] == [
        ("32 x 64, 1 rows", 1),
        ("32 x 64, 16 rows", 1),
        ("16 x 64, 1 rows", 1),
        ("16 x 64, 16 rows", 1),
    ]


def test_races_of_several_shapes_can_take_turns_with_one_another() -> None:
    timer = ScriptedTimer(TIMES)
    planned = races([quantized(32, 64, 4, 32), quantized(16, 64, 4, 32)], [1], torch.float32, torch.device("cpu"))
    large, little = run_together(planned, SMALL, timer)
    assert len(timer.asked) == 1
    assert len(timer.asked[0]) == len(large) + len(little) == 10
    assert ({row.n for row in large}, {row.n for row in little}) == ({32}, {16})


def test_what_fails_or_is_not_admitted_is_left_out_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, packed: Packed, work: Work) -> Callable[[torch.Tensor], torch.Tensor]:
        if name == "int4pack":
            raise RuntimeError("not compiled")
        return prepare(name, packed, work)

    monkeypatch.setattr("layerwise.kernels.measure.prepare", broken)
    weights: list[Packed] = [quantized(32, 64, 4, 32), quantized(32, 64, 8), quantized(32, 64, 2)]
    (race,) = races(weights, [1], torch.float32, torch.device("cpu"))
    told = list[tuple[str, str]]()
    rows = run_race(
        race,
        SMALL,
        ScriptedTimer(TIMES),
        admit=lambda label, backend: backend.name != "mkl",
        lost=lambda name, error: told.append((name, str(error))),
    )
    assert told == [("int4-g32-sym by int4pack", "not compiled")]
    assert set(find(rows, "dense")) == {*ALWAYS} - {"mkl"}
    assert find(rows, "int4-g32-sym") == {}, "it has a kernel, only not here"
    assert find(rows, "int8-channel-sym") == {"int8_dynamic": (2.0, "measured")}
    assert find(rows, "int2-channel-sym") == {"linear": (6.0, "no_kernel")}
    with pytest.raises(RuntimeError, match="not compiled"):
        run_race(race, SMALL, ScriptedTimer(TIMES))


def test_nothing_to_measure_is_refused() -> None:
    for weights, ms in (([], [1]), ([quantized(16, 32, 4)], []), ([quantized(16, 32, 4)], [0])):
        with pytest.raises(UsageError, match="nothing to measure"):
            races(weights, ms, torch.float32, torch.device("cpu"))


def test_every_copy_has_memory_of_its_own() -> None:
    weight = Dense((32, 64), torch.randn(32, 64))
    work = Work(1, torch.float32, torch.device("cpu"))
    for name in ALWAYS:
        calls = rotation(weight, able(weight, work)[name], work, Sampling(rotate_bytes=4 * 32 * 64 * 3))
        assert len(calls) == 3
        before = [call() for call in calls]
        assert len({tuple(y.flatten().tolist()) for y in before if isinstance(y, torch.Tensor)}) == 3  # own activations
        weight.weight.zero_()
        for y, call in zip(before, calls, strict=True):
            torch.testing.assert_close(call(), y)
        weight.weight.normal_()


def test_a_table_of_real_times_belongs_to_this_machine_and_chooses() -> None:
    planned = races([quantized(32, 64, 4, 32)], [1, 2], torch.float32, torch.device("cpu"))
    table = table_of(this_device("cpu"), [row for race in planned for row in run_race(race, SMALL)], SMALL)
    assert table.device == this_device("cpu")
    assert table.protocol["clock"] == "process CPU time, one thread"
    assert {row.backend for row in table.rows} == {*ALWAYS, "int4pack"}
    assert all(0 < row.min_ms <= row.median_ms for row in table.rows)
    choice = Dispatcher(table, this_device("cpu")).choose("int4-g32-sym", 32, 64, 1, "float32")
    assert choice.row.median_ms <= choice.dense.median_ms


@pytest.mark.gpu
def test_a_gpu_is_measured_by_graphs() -> None:
    (race,) = races([quantized(256, 256, 4, 128)], [1], torch.float16, torch.device("cuda"))
    sampling = Sampling(max_spread=10)
    table = table_of(this_device("cuda"), run_race(race, sampling), sampling)
    assert {"cublas", "triton_quantized"} <= {row.backend for row in table.rows}
    assert table.protocol["clock"] == "CUDA graphs"
