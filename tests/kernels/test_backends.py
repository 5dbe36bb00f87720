"""The table of backends: each product of our modules stands in it once, and what it says of each."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch

from layerwise.errors import UsageError
from layerwise.kernels.backends import BACKENDS, Product, Work, able, dense_backends, find_backend
from layerwise.kernels.dense import Dense
from layerwise.kernels.packed import Packed
from layerwise.kernels.quantized import Quantized
from layerwise.kernels.unstructured import Unstructured

MODULES = ("cpu_backends", "cuda_backends", "triton_backends")


def test_every_product_stands_in_the_table_once_and_nothing_else_does() -> None:
    found = [
        f"layerwise.kernels.{module}:{name}"
        for module in MODULES
        for name, value in vars(import_module(f"layerwise.kernels.{module}")).items()
        if isinstance(value, Product)
    ]
    assert sorted(backend.place for backend in BACKENDS.values()) == sorted(found)
    assert all(name == backend.name for name, backend in BACKENDS.items())
    assert all(isinstance(backend.product, Product) for backend in BACKENDS.values())


def test_what_rounds_more_than_its_result_says_so() -> None:
    inexact = {name for name, backend in BACKENDS.items() if not backend.exact}
    assert inexact == {"int8_dynamic", "int4pack", "factors_on_base", "fp8", "tinygemm"}


@pytest.mark.parametrize(
    ("device", "dtype", "names"),
    [("cpu", torch.float32, ["linear", "matmul", "mkl", "onednn"]), ("cuda", torch.float16, ["cublas"])],
)
def test_the_dense_products_of_a_device_are_those_that_take_a_dense_weight(
    device: str, dtype: torch.dtype, names: list[str]
) -> None:
    assert dense_backends(device) == names
    assert list(able(Dense((32, 64), torch.zeros(32, 64)), Work(1, dtype, torch.device(device)))) == names


def test_other_names_and_devices_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown backend 'magma'"):
        find_backend("magma")
    with pytest.raises(UsageError, match="no backend runs on a device 'mps'"):
        dense_backends("mps")


def quantized() -> Quantized:
    return Quantized.pack(torch.zeros(32, 128, dtype=torch.uint8), torch.ones(32, 1).half(), bits=4, group_size=-1)


@pytest.mark.parametrize(
    ("name", "packed", "size"),
    [
        ("fp8", quantized(), 32 * 128 + 32 * 4),  # a byte each, and a float32 for each row
        ("csr", Unstructured.pack(torch.eye(32)), 32 * 8 * 8),  # a float32 and an index, runs filled up to eight
        ("linear", Dense((32, 64), torch.zeros(32, 64)), 32 * 64 * 4),
        ("triton_quantized", quantized(), 32 * 128 // 2 + 32 * 2),  # as it is packed: words and scales
    ],
)
def test_the_bytes_that_a_product_reads_are_those_of_its_own_layout(name: str, packed: Packed, size: int) -> None:
    assert find_backend(name).bytes_read(packed) == size


def test_a_processor_needs_none_of_the_modules_for_gpus() -> None:
    program = """
import sys, torch
from layerwise.kernels.backends import Work, able, find_backend
from layerwise.kernels.dense import Dense
able(Dense((8, 8), torch.zeros(8, 8)), Work(1, torch.float32, torch.device("cpu")))
print(sorted(name for name in sys.modules if "triton_backends" in name or "cuda_backends" in name))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr("layerwise.kernels.backends.import_module", missing)
    quantized = find_backend("triton_quantized")
    assert quantized.ours, "what is known of it needs no import"
    work = Work(1, torch.float16, torch.device("cuda"))
    with pytest.raises(UsageError, match="backend triton_quantized needs Triton, which is not installed"):
        quantized.refuses(Dense((8, 8), torch.zeros(8, 8)), work)
