"""What runs, given times: tables written by hand, so that who should win is plain."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import DeviceChanged, UsageError
from layerwise.kernels.backends import Work
from layerwise.kernels.dense import Dense
from layerwise.kernels.device import Device
from layerwise.kernels.dispatch import Dispatcher, overlap
from layerwise.kernels.latency_table import LatencyTable, Row
from layerwise.kernels.timing import Timing

HERE = Device("cpu", "Some Processor", 8, ("avx2",), 64, 32 << 20, 1, "2.13.0")
DENSE_BACKENDS = ("linear", "mkl")
EXACT = (*DENSE_BACKENDS, "csr", "triton_quantized")


def row(backend: str, label: str, ms: float, *, mad: float = 0.0, m: int = 1, n: int = 64, k: int = 32) -> Row:
    dense = label == "dense"
    return Row.of(
        Timing(ms, ms, ms, mad, ms, 9, 1.0),
        **{"backend": backend, "label": label, "n": n, "k": k, "m": m, "dtype": "float32"},
        **{"size_bytes": n * k * (4 if dense else 1), "exact": backend in EXACT, "dense": dense},
    )


def without_kernel(label: str, backend: str, ms: float, *, m: int = 1) -> Row:
    return replace(row(backend, label, ms, m=m), status="no_kernel")


def dispatcher(*rows: Row, exact: bool = False) -> Dispatcher:
    return Dispatcher(LatencyTable(HERE, rows, {}), HERE, exact=exact)


def packed(label: str, n: int = 64, k: int = 32) -> Dense:
    """A weight of which only label and shape matter."""
    named = type("Named", (Dense,), {"label": property(lambda self: label)})
    weight: Dense = named((n, k), torch.zeros(n, k))
    return weight


def work(m: int) -> Work:
    return Work(m, torch.float32, torch.device("cpu"))


DENSE = (row("linear", "dense", 6.0), row("mkl", "dense", 5.0))


def test_the_fastest_backend_runs_a_weight() -> None:
    chosen = dispatcher(*DENSE, row("int4pack", "int4", 1.25)).choose("int4", 64, 32, 1, "float32")
    assert (chosen.backend, chosen.row.label, chosen.row.status) == ("int4pack", "int4", "measured")
    assert chosen.ratio == pytest.approx(4.0)  # dense over ours


def test_a_backend_slower_than_the_best_dense_product_does_not_run() -> None:
    chosen = dispatcher(*DENSE, row("int4pack", "int4", 5.5)).choose("int4", 64, 32, 1, "float32")
    assert (chosen.backend, chosen.row.median_ms) == ("mkl", 5.0)


def test_a_tie_goes_to_the_dense_product() -> None:
    chosen = dispatcher(*DENSE, row("int4pack", "int4", 4.9, mad=0.06)).choose("int4", 64, 32, 1, "float32")
    assert (chosen.backend, chosen.row.median_ms) == ("mkl", 5.0)


def test_a_tie_between_kernels_goes_to_the_exact_one() -> None:
    rows = (*DENSE, row("int8_dynamic", "sparse", 2.0, mad=0.1), row("csr", "sparse", 2.1, mad=0.1))
    assert dispatcher(*rows).choose("sparse", 64, 32, 1, "float32").backend == "csr"


def test_only_exact_backends_race_where_that_is_asked() -> None:
    rows = (*DENSE, row("int8_dynamic", "sparse", 1.0), row("csr", "sparse", 2.0))
    assert dispatcher(*rows).choose("sparse", 64, 32, 1, "float32").backend == "int8_dynamic"
    assert dispatcher(*rows, exact=True).choose("sparse", 64, 32, 1, "float32").backend == "csr"


def test_a_format_without_a_kernel_says_so_and_takes_what_the_dense_product_takes() -> None:
    chosen = dispatcher(*DENSE, without_kernel("int2", "mkl", 5.0)).choose("int2", 64, 32, 1, "float32")
    assert (chosen.backend, chosen.row.status, chosen.row.median_ms) == ("mkl", "no_kernel", 5.0)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=6), st.floats(0, 0.5))
def test_nothing_runs_that_is_slower_than_the_best_dense_product(times: list[float], mad: float) -> None:
    first, *rest = times
    rows = [row(f"kernel{index}", "int4", ms, mad=mad) for index, ms in enumerate(rest)]
    chosen = dispatcher(row("linear", "dense", first, mad=mad), *rows).choose("int4", 64, 32, 1, "float32")
    assert chosen.row.median_ms <= first


def test_the_order_of_the_rows_changes_nothing() -> None:
    rows = [*DENSE, row("a", "int4", 1.0, mad=0.1), row("b", "int4", 1.1, mad=0.1), row("c", "int4", 1.0, mad=0.1)]
    chosen = [dispatcher(*rows[i:], *rows[:i]).choose("int4", 64, 32, 1, "float32") for i in range(len(rows))]
    assert len({choice.backend for choice in chosen}) == 1


def test_intervals_overlap_by_the_rule_of_two_deviations() -> None:
    a, b = row("a", "x", 1.0, mad=0.03), row("b", "x", 1.1, mad=0.04)
    assert not overlap(a, b)  # 2 · 0.05 = 0.10 is no more than the distance
    assert overlap(a, replace(b, mad_ms=0.041))
    assert overlap(a, replace(a, mad_ms=0.0))


# --- what was not measured ---


def test_rows_between_those_measured_are_read_off_and_say_so() -> None:
    table = [row("mkl", "dense", 5.0), row("mkl", "dense", 20.0, m=16), row("int4pack", "int4", 1.0)]
    chosen = dispatcher(*table, row("int4pack", "int4", 16.0, m=16)).choose("int4", 64, 32, 4, "float32")
    assert (chosen.backend, chosen.row.status, chosen.row.samples) == ("int4pack", "fitted", 0)
    assert chosen.row.median_ms == pytest.approx(4.0)
    assert chosen.dense.median_ms == pytest.approx(10.0)


def test_another_shape_is_read_off_the_line_over_bytes() -> None:
    sizes = [(64, 32), (128, 32), (256, 32)]
    table = [row("mkl", "dense", n * k / 256, n=n, k=k) for n, k in sizes]
    table += [row("int4pack", "int4", 0.5 + n * k / 2048, n=n, k=k) for n, k in sizes]
    chosen = dispatcher(*table).choose("int4", 512, 32, 1, "float32")
    assert (chosen.backend, chosen.row.status) == ("int4pack", "fitted")
    assert chosen.row.median_ms == pytest.approx(0.5 + 8)
    assert (chosen.row.n, chosen.row.k, chosen.row.size_bytes) == (512, 32, 512 * 32)
    assert dispatcher(*table).lines()["int4pack", "int4", 1, "float32"].t0_ms == pytest.approx(0.5)


@pytest.mark.parametrize("what", [("int3", 64, 32, 1), ("int4", 64, 32, 2), ("int4", 65, 32, 1), ("dense", 64, 32, 99)])
def test_what_nothing_is_known_of_is_refused_with_its_name(what: tuple[str, int, int, int]) -> None:
    label, n, k, m = what
    with pytest.raises(UsageError, match=f"no time is known of (dense|{label}) {n} x {k} at {m} rows in float32"):
        dispatcher(*DENSE, row("int4pack", "int4", 1.0)).choose(label, n, k, m, "float32")


def test_beyond_the_rows_measured_the_dense_product_of_the_nearest_runs() -> None:
    table = [row("linear", "dense", 5.0), row("mkl", "dense", 6.0), row("int4pack", "int4", 1.0)]
    table += [row("linear", "dense", 30.0, m=16), row("mkl", "dense", 20.0, m=16), row("int4pack", "int4", 9.0, m=16)]
    choose = dispatcher(*table)
    names = [choose(packed("int4"), work(m)) for m in (1, 4, 16, 17, 4096)]
    assert names == ["int4pack", "int4pack", "int4pack", "mkl", "mkl"]


def test_across_a_boundary_of_our_kernels_the_dense_product_runs() -> None:
    table = [row("linear", "dense", 5.0 * m, m=m) for m in (1, 16, 64)]
    table += [row("triton_quantized", "int4", 1.0 * m, m=m) for m in (1, 16, 64)]
    choose = dispatcher(*table)
    assert [choose(packed("int4"), work(m)) for m in (8, 16, 32, 64)] == [
        "triton_quantized",
        "triton_quantized",
        "linear",
        "triton_quantized",
    ]


@pytest.mark.parametrize("m", [1, 2, 99])
def test_a_format_that_was_never_measured_does_not_run_in_silence(m: int) -> None:
    choose = dispatcher(*DENSE, row("mkl", "dense", 20.0, m=16))
    with pytest.raises(UsageError, match="no time is known of int3"):
        choose(packed("int3"), work(m))


def test_a_format_without_a_kernel_runs_as_the_best_dense_product_at_any_rows() -> None:
    table = [*DENSE, row("linear", "dense", 9.0, m=16), row("mkl", "dense", 20.0, m=16)]
    table += [without_kernel("int2", "mkl", 5.0), without_kernel("int2", "linear", 9.0, m=16)]
    choose = dispatcher(*table)
    assert [choose(packed("int2"), work(m)) for m in (1, 16, 64)] == ["mkl", "linear", "linear"]
    assert math.isclose(choose.choose("int2", 64, 32, 4, "float32").row.median_ms, math.sqrt(6.0 * 9.0))


def test_a_table_of_another_device_runs_nothing() -> None:
    with pytest.raises(DeviceChanged, match="cores: 8 and 4"):
        Dispatcher(LatencyTable(HERE, DENSE, {}), replace(HERE, cores=4))


def test_what_is_chosen_computes_the_product() -> None:
    weight = Dense((64, 32), torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    matmul = dispatcher(row("linear", "dense", 5.0)).prepare(weight, work(1))
    torch.testing.assert_close(matmul(x).double(), x.double() @ weight.weight.double().T, rtol=1e-5, atol=1e-5)
