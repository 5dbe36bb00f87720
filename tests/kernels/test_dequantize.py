"""The PTX that unpacks a field, evaluated on whole numbers and by NumPy's halves, against the layout's definition.

The interpreter knows no PTX, so it runs the branch beside it; a GPU compares the two.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from layerwise.kernels import planar
from layerwise.kernels.dequantize import difference, difference_asm, offset, unit

RunPtx = Callable[..., dict[str, int]]
FMA = re.compile(r"fma\.rn\.(f16x2|bf16x2) \$0, (\w+), (\w+), (\S+);")


def from_half(bits: int, bf16: bool) -> float:
    """The number that 16 bits stand for, subnormals included."""
    return float(
        struct.unpack("<f", struct.pack("<I", bits << 16))[0]
        if bf16
        else struct.unpack("<e", struct.pack("<H", bits))[0]
    )


def to_half(value: float, bf16: bool) -> int:
    """The 16 bits of a number that must be exact in them."""
    bits = (
        struct.unpack("<I", struct.pack("<f", value))[0] >> 16
        if bf16
        else struct.unpack("<H", struct.pack("<e", value))[0]
    )
    assert from_half(bits, bf16) == value
    return int(bits)


def evaluate(asm: str, operands: list[int], bf16: bool, run_ptx: RunPtx) -> list[float]:
    """Both halves of $0: what comes before the multiply-add by `run_ptx`, that by exact arithmetic."""
    fma = FMA.search(asm)
    assert fma is not None
    assert (fma[1] == "bf16x2") == bf16
    assert asm[fma.end() :].strip() == "}"
    registers = run_ptx(asm[: fma.start()] + "}", {f"${i}": value for i, value in enumerate(operands, start=1)})
    v, c, z = (registers[fma[group]] for group in (2, 3, 4))
    found = []
    for shift in (0, 16):
        a, b, d = (from_half(register >> shift & 0xFFFF, bf16) for register in (v, c, z))
        assert from_half(to_half(a * b + d, bf16), bf16) == a * b + d  # nothing is rounded
        found.append(a * b + d)
    return found


@pytest.mark.parametrize("bits", planar.BITS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float16", "bfloat16"])
def test_the_ptx_of_every_field_gives_code_minus_zero(bits: int, sym: bool, bf16: bool, run_ptx: RunPtx) -> None:
    generator = random.Random(bits)
    for field in range(16 if bits == 3 else 16 // bits):
        for _ in range(40):
            words, upper = generator.getrandbits(32), generator.getrandbits(32)
            zero = 1 << (bits - 1) if sym else generator.randrange(1 << bits)
            operands = [words, upper] if bits == 3 else [words]
            if not sym:
                operands.append(to_half(-zero * unit(bf16), bf16) * 0x10001)
            found = evaluate(difference_asm(field, bits, sym, bf16), operands, bf16, run_ptx)
            for half, value in zip((0, 16), found, strict=True):
                if bits == 3:
                    code = words >> half >> (2 * (field % 8)) & 3
                    code += 4 * (upper >> half >> planar.UPPER_BITS[field] & 1)
                else:
                    code = words >> half >> (bits * field) & (1 << bits) - 1
                assert value == (code - zero) * unit(bf16)


@triton.jit
def every_field(
    words_ptr: tl.tensor,
    upper_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    out_ptr: tl.tensor,
    FIELDS: tl.constexpr,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    DTYPE: tl.constexpr,
    USE_ASM: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    at = tl.arange(0, SIZE)
    words, upper = tl.load(words_ptr + at), tl.load(upper_ptr + at)
    zero = offset(tl.load(zero_ptr + at), DTYPE, USE_ASM)
    for field in tl.static_range(FIELDS):
        found = difference(words, upper, zero, field, BITS, SYM, DTYPE, USE_ASM)
        tl.store(out_ptr + field * SIZE + at, found)


def unpacked(bits: int, sym: bool, dtype: torch.dtype, device: torch.device, use_asm: bool) -> tuple[Tensor, Tensor]:
    """What the kernel's pieces make of random words, and what the definition does."""
    size, fields = 256, 16 if bits == 3 else 16 // bits
    generator = torch.Generator().manual_seed(bits)
    words, upper = torch.randint(-(2**15), 2**15, (2, size), generator=generator, dtype=torch.int16)
    zero = torch.randint(0, 2**bits, (size,), generator=generator, dtype=torch.uint8)
    out = torch.full((fields, size), float("nan"), dtype=dtype, device=device)
    half = tl.float16 if dtype == torch.float16 else tl.bfloat16
    every_field[(1,)](*(part.to(device) for part in (words, upper, zero)), out, fields, bits, sym, half, use_asm, size)
    shifts = torch.arange(fields)[:, None]
    if bits == 3:
        codes = (words.int() >> (2 * (shifts % 8))) & 3
        codes += ((upper.int() >> torch.tensor(planar.UPPER_BITS)[:, None]) & 1) << 2
    else:
        codes = (words.int() >> (bits * shifts)) & (2**bits - 1)
    return out.double().cpu(), (codes - (2 ** (bits - 1) if sym else zero.int())) * unit(dtype == torch.bfloat16)


@pytest.mark.parametrize("bits", planar.BITS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_the_portable_branch_gives_code_minus_zero(bits: int, sym: bool, device: torch.device) -> None:
    found, exact = unpacked(bits, sym, torch.float16, device, use_asm=False)
    assert torch.equal(found, exact.double())


@pytest.mark.gpu
@pytest.mark.parametrize("use_asm", [True, False], ids=["ptx", "portable"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", planar.BITS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_both_branches_are_exact_on_a_gpu(
    bits: int, sym: bool, dtype: torch.dtype, use_asm: bool, device: torch.device
) -> None:
    found, exact = unpacked(bits, sym, dtype, device, use_asm)
    assert torch.equal(found, exact.double())
