"""The quantized kernel against float64, in the interpreter or on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.kernels import split_k
from layerwise.kernels.backends import Work, find_backend
from layerwise.kernels.configs import BUCKETS, Config, config_for
from layerwise.kernels.dense import Dense
from layerwise.kernels.quantized import Quantized
from layerwise.kernels.quantized_matmul import capability, quantized_matmul

Error = Callable[[Tensor, Tensor], float]

BOUND = 4e-4
"""Of the relative Frobenius error: the result is rounded to 11 bits (2^-12 / √3 at its worst, 1.4e-4 to 2.8e-4), and
nothing else is but sums in float32."""

DECODE = Config(rows=16, columns=32, left=False, num_warps=4, num_stages=2, programs=4)
LEFT = Config(rows=16, columns=32, left=True, num_warps=4, num_stages=2, programs=1)
"""Small tiles, so that a small product has several."""


def weight(n: int, k: int, bits: int, group_size: int, sym: bool, ordered: bool = False) -> Quantized:
    generator = torch.Generator().manual_seed(n + k + bits)
    groups = 1 if group_size == -1 else -(-k // group_size)
    return Quantized.pack(
        torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8),
        (torch.rand(n, groups, generator=generator) / 16 + 0.01).half(),
        None if sym else torch.randint(0, 2**bits, (n, groups), generator=generator, dtype=torch.uint8),
        bits=bits,
        group_size=group_size,
        order=torch.randperm(k, generator=generator) if ordered else None,
    )


def activations(m: int, k: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


def product(x: Tensor, packed: Quantized) -> Tensor:
    return x.double().cpu() @ packed.dense().double().cpu().T


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 256), (3, 24, 300)], ids=["even", "odd"])
def test_it_multiplies(
    guard: Any,
    device: torch.device,
    relative_error: Error,
    bits: int,
    group_size: int,
    sym: bool,
    m: int,
    n: int,
    k: int,
) -> None:
    x, packed = activations(m, k).to(device), weight(n, k, bits, group_size, sym).to(device)
    with guard:
        y = quantized_matmul(guard.around(x), guard.around(packed), config=DECODE)
    assert y.dtype == x.dtype
    assert relative_error(y.cpu(), product(x, packed)) <= BOUND


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "sym"), [(32, False), (64, True), (128, False), (-1, False), (-1, True)], ids=str
)
def test_the_weights_may_be_the_left_operand(
    guard: Any, device: torch.device, relative_error: Error, bits: int, group_size: int, sym: bool
) -> None:
    x, packed = activations(17, 140).to(device), weight(40, 140, bits, group_size, sym).to(device)
    with guard:
        y = quantized_matmul(guard.around(x), guard.around(packed), config=LEFT)
    assert relative_error(y.cpu(), product(x, packed)) <= BOUND


@pytest.mark.parametrize(("bits", "group_size"), [(2, 512), (4, 256), (4, 384), (8, 256)])
def test_a_group_may_be_several_blocks(device: torch.device, relative_error: Error, bits: int, group_size: int) -> None:
    x, packed = activations(2, 800).to(device), weight(16, 800, bits, group_size, sym=False).to(device)
    config = Config(rows=16, columns=16, left=False, num_warps=4, num_stages=2, programs=3)
    assert relative_error(quantized_matmul(x, packed, config=config).cpu(), product(x, packed)) <= BOUND


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 3, 5), (2, 129, 33), (16, 8, 127), (17, 16, 129), (33, 5, 64)]
)
@pytest.mark.parametrize("bits", [3, 4])
def test_no_shape_is_too_odd(
    guard: Any, device: torch.device, relative_error: Error, bits: int, m: int, n: int, k: int
) -> None:
    x, packed = activations(m, k).to(device), weight(n, k, bits, 32, sym=False).to(device)
    with guard:
        y = quantized_matmul(guard.around(x), guard.around(packed))
    assert relative_error(y.cpu(), product(x, packed)) <= BOUND


@pytest.mark.parametrize("m", [16, 32, 64, 65])
def test_every_size_of_tile_of_the_table_multiplies(device: torch.device, relative_error: Error, m: int) -> None:
    x, packed = activations(m, 128).to(device), weight(130, 128, 4, 128, sym=True).to(device)
    assert relative_error(quantized_matmul(x, packed).cpu(), product(x, packed)) <= BOUND


@pytest.mark.parametrize("splits", [2, 3, 5])
def test_programs_that_share_a_tile_give_the_same_bits_twice_and_leave_the_counters_at_zero(
    guard: Any, device: torch.device, relative_error: Error, splits: int
) -> None:
    config = Config(rows=16, columns=32, left=False, num_warps=4, num_stages=2, programs=2 * splits)
    x, packed = activations(5, 640).to(device), weight(64, 640, 4, 128, sym=True).to(device)
    assert config.splits(5, 64, 5) == splits
    with guard:
        first = quantized_matmul(guard.around(x), guard.around(packed), config=config)
        again = quantized_matmul(guard.around(x), guard.around(packed), config=config)
    assert torch.equal(first, again)
    assert relative_error(first.cpu(), product(x, packed)) <= BOUND
    assert not split_k.counters(2, x.device).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_activations_far_from_zero_lose_no_digits(
    device: torch.device, relative_error: Error, bits: int, group_size: int, mean: float
) -> None:
    """Unpacked as 1024 + code, sums would be hundreds of times their difference from 1024 · Σx."""
    x, packed = (activations(2, 512) + mean).to(device), weight(16, 512, bits, group_size, sym=True).to(device)
    packed = replace(packed, scale=packed.scale / 64)  # the result is a half
    assert relative_error(quantized_matmul(x, packed, config=DECODE).cpu(), product(x, packed)) <= BOUND


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_neither_small_nor_great_activations_lose_digits(
    device: torch.device, relative_error: Error, scale: float
) -> None:
    packed = weight(32, 256, 4, 128, sym=True).to(device)
    x = (activations(2, 256).double() * scale).clamp(-6e4, 6e4).half().to(device)
    packed = packed if scale < 1 else replace(packed, scale=packed.scale / 256)
    exact = product(x, packed)
    # Results below 2^-14 are subnormal halves, which have fewer digits.
    assert relative_error(quantized_matmul(x, packed).cpu(), exact) <= max(BOUND, 2**-25 / float(exact.abs().mean()))


def test_columns_sorted_by_group_meet_their_activations(device: torch.device, relative_error: Error) -> None:
    x, packed = activations(3, 200).to(device), weight(24, 200, 4, 64, sym=False, ordered=True).to(device)
    assert relative_error(quantized_matmul(x, packed, config=DECODE).cpu(), product(x, packed)) <= BOUND


def test_activations_that_are_not_contiguous_or_not_aligned_are_copied(device: torch.device) -> None:
    x, packed = activations(4, 128).to(device), weight(16, 128, 4, 128, sym=True).to(device)
    y = quantized_matmul(x, packed, config=DECODE)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(4, 128)
    assert shifted.data_ptr() % 16
    assert torch.equal(quantized_matmul(shifted, packed, config=DECODE), y)
    assert torch.equal(quantized_matmul(x.T.contiguous().T, packed, config=DECODE), y)


def test_no_rows_give_no_rows(device: torch.device) -> None:
    packed = weight(16, 128, 4, 128, sym=True).to(device)
    assert quantized_matmul(activations(0, 128).to(device), packed).shape == (0, 16)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 48), (4, 16), (8, 96), (3, 24), (2, 384), (4, 5)])
def test_groups_that_do_not_fit_into_blocks_are_refused(device: torch.device, bits: int, group_size: int) -> None:
    packed = weight(8, 400, bits, group_size, sym=True).to(device)
    with pytest.raises(UsageError, match=f"groups of {group_size} columns do not fit into blocks of"):
        quantized_matmul(activations(1, 400).to(device), packed)


def test_what_does_not_fit_together_is_refused(device: torch.device) -> None:
    packed = weight(8, 128, 4, 128, sym=True).to(device)
    with pytest.raises(UsageError, match="must be m x 128, not 2 x 64"):
        quantized_matmul(activations(2, 64).to(device), packed)
    with pytest.raises(UsageError, match="float16 and bfloat16 activations, not float32"):
        quantized_matmul(activations(2, 128, torch.float32).to(device), packed)


def test_the_backend_says_what_it_cannot_take() -> None:
    backend = find_backend("triton_quantized")
    packed = weight(8, 128, 4, 128, sym=True)
    assert "not dense" in str(
        backend.refuses(Dense((1, 1), torch.zeros(1, 1)), Work(1, torch.float16, torch.device("cuda")))
    )
    assert "not cpu" in str(backend.refuses(packed, Work(1, torch.float16, torch.device("cpu"))))


def test_the_prepared_function_takes_other_numbers_of_rows(device: torch.device, relative_error: Error) -> None:
    packed = weight(24, 128, 4, 128, sym=True).to(device)
    multiply = find_backend("triton_quantized").prepare(packed, Work(1, torch.float16, device))
    for m in (1, 3, 1):
        x = activations(m, 128).to(device)
        assert relative_error(multiply(x).cpu(), product(x, packed)) <= BOUND


@pytest.mark.parametrize(("hip", "entries"), [(None, 94), ("6.4", 80)])
def test_the_numbers_of_amd_devices_are_no_capabilities(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, entries: int
) -> None:
    """A gfx942 calls itself 9.4, which is no Hopper: it gets the entries of sm_80, as `configs.py` says."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    capability.cache_clear()
    assert capability(torch.device("cuda:0")) == entries
    capability.cache_clear()


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 4096])
def test_decoding_fills_the_device_and_no_program_is_without_a_block(capability: int, bits: int, m: int) -> None:
    config = config_for(capability, bits, 128, m)
    for n, blocks in ((4096, 32), (512, 28), (57344, 64), (100, 1)):
        along_m, along_n = config.tiles(m, n)
        splits = config.splits(m, n, blocks)
        assert 1 <= splits <= blocks
        if m <= BUCKETS[2]:
            assert splits == blocks or along_m * along_n * splits >= config.programs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "sym"), [(32, False), (128, True), (128, False), (-1, False)], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 4096), (16, 1000, 1111), (33, 4096, 300), (200, 1024, 2048)], ids=str
)
def test_it_multiplies_on_a_gpu(
    device: torch.device,
    relative_error: Error,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    sym: bool,
    m: int,
    n: int,
    k: int,
) -> None:
    x, packed = activations(m, k, dtype).to(device), weight(n, k, bits, group_size, sym).to(device)
    y = quantized_matmul(x, packed)
    # bfloat16 is rounded to 8 bits, 8 times coarser.
    assert relative_error(y.cpu(), product(x, packed)) <= (BOUND if dtype == torch.float16 else 8 * BOUND)
    assert all(torch.equal(quantized_matmul(x, packed), y) for _ in range(20))
    assert not split_k.counters(1, x.device).any()


def _cases() -> list[dict[str, Any]]:
    """Groups of 128 columns and whole blocks: decoding at every width, and many rows at 4 bits."""
    spec = importlib.util.spec_from_file_location(
        "kernels_cases_quantized", Path(__file__).with_name("cases_quantized.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = []
    for case in module.CASES:
        given = case["arguments"]
        if given["GROUP"] == 128 and given["x_ptr"] == "*fp16" and given["EVEN_K"]:
            found += [case] * (given["m"] == 1 or (given["BITS"] == 4 and given["zero_ptr"] is None))
    return found


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in _cases()])
def test_the_compiled_loop_is_short_and_its_weights_never_go_back_to_shared_memory(
    case: dict[str, Any], compiled: Callable[[str], dict[str, Any]]
) -> None:
    """At most 2.4, 2.1 and 3.6 instructions for a weight of 4, 2 and 3 bits, in groups of 128, while decoding."""
    found = compiled(case["name"])
    assert not [opcode for opcode in found["loop"] if opcode.startswith(("STS.64", "STS.128"))]
    if case["arguments"]["m"] == 1:
        assert found["per_weight"] <= {2: 2.1, 3: 3.6, 4: 2.4, 8: 2.7}[case["arguments"]["BITS"]]
