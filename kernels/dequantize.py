"""Inside a kernel: one field of a tile of planar words to `code - zero`, in half precision and exact.

A field that is masked out of a 16-bit word *is* a half-precision number: with no exponent set it is a subnormal,
code · 2^(p - 24) in float16 and code · 2^(p - 133) in bfloat16 for a field at bit p. Its lowest 11 (bfloat16: 8) bits
have that one scale, so fields need not stand at bit 0. One fused multiply-add by a power of two then makes it an
ordinary number and takes the zero point away:

    v · 2^(15 - p)  - zero · 2^-9   =  (code - zero) · 2^-9      float16
    v · 2^(127 - p) - zero · 2^-6   =  (code - zero) · 2^-6      bfloat16

Both are exact, and kernels multiply their sums by 2^9 or 2^6 once (`UNIT`). That is one `and` and one `fma` for two
weights, and one shift for the words of eight. The customary form ors an exponent in, 1024 + code, and takes 1024 + zero
away either here, by as many instructions and one constant for each p, or from the finished dot product as
(1024 + zero) · Σx. The second saves the `fma`, but needs a kernel of its own for Σx, a launch that a small layer feels,
and loses digits where activations have a large mean; the first pays more for zero points.

The instructions are PTX, because Triton computes 16-bit integers one at a time. `USE_ASM=False` says the same in
Triton's own words, for its interpreter and for devices that are not NVIDIA's.

Source: the idea of reading masked bits as a float: Kim et al., arXiv:2211.10017; subnormals: PTX ISA, `fma.f16x2`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from layerwise.kernels.planar import UPPER_BITS

_MANTISSA = {False: 11, True: 8}
"""Lowest bits of float16 and bfloat16 that have one scale: the subnormals' and those of the first exponent."""

_FMA = {False: "fma.rn.f16x2", True: "fma.rn.bf16x2"}
_UNIT_EXPONENT = {False: -9, True: -6}


@triton.constexpr_function
def difference_asm(field: int, bits: int, sym: bool, bf16: bool) -> str:
    """PTX that unpacks one field of two words: $0 is the two differences, $1 the words.

    At 3 bits $2 is the words of the upper plane, and `field` counts its 16. Unless symmetric, the last operand is
    -zero · UNIT, twice.
    """
    lower = 2 if bits == 3 else bits
    offset = (field % 8 if bits == 3 else field) * lower
    shift = offset // 8 * 8
    while offset - shift + bits > _MANTISSA[bf16]:
        shift += lower
    place = offset - shift
    lines = [*_shifted("v", "$1", shift), f"and.b32 v, v, {_twice(((1 << lower) - 1) << place)};"]
    if bits == 3:
        lines += _shifted("u", "$2", UPPER_BITS[field] - place - 2)
        lines += [f"lop3.b32 v, u, {_twice(4 << place)}, v, 0xEA;"]  # (u and mask) or v
    lines += [f"mov.b32 c, {_twice(_power(_greatest(bf16) - place, bf16))};"]
    last = "$3" if bits == 3 else "$2"
    if sym:
        last = "z"
        # 2^(bits - 1) is a power of two as well; the sign is the upper bit.
        lines += [f"mov.b32 z, {_twice(0x8000 | _power(bits - 1 + _UNIT_EXPONENT[bf16], bf16))};"]
    return "{.reg .b32 v, u, c, z; " + " ".join([*lines, f"{_FMA[bf16]} $0, v, c, {last};"]) + "}"


@triton.constexpr_function
def _shifted(target: str, source: str, shift: int) -> list[str]:
    """Shift both halves of a register as one number; what crosses from one to the other is masked out later."""
    if shift == 0:
        return [f"mov.b32 {target}, {source};"]
    return [f"{'shr' if shift > 0 else 'shl'}.b32 {target}, {source}, {abs(shift)};"]


@triton.constexpr_function
def _greatest(bf16: bool) -> int:
    """Exponent of the greatest power of two."""
    return 127 if bf16 else 15


@triton.constexpr_function
def _power(exponent: int, bf16: bool) -> int:
    """The bits of 2^exponent."""
    return (exponent + 127) << 7 if bf16 else (exponent + 15) << 10


@triton.constexpr_function
def _twice(half: int) -> str:
    return f"0x{half:04X}{half:04X}"


@triton.constexpr_function
def unit(bf16: bool) -> float:
    """UNIT: what stands for 1 in the differences."""
    return float(2.0 ** _UNIT_EXPONENT[bf16])


@triton.constexpr_function
def _is_bf16(dtype: tl.dtype) -> bool:
    return bool(dtype == tl.bfloat16)


@triton.jit
def offset(zero: tl.tensor, DTYPE: tl.constexpr, USE_ASM: tl.constexpr) -> tl.tensor:
    """-zero · UNIT, as `difference` takes it, of zero points (uint8, any shape).

    The instruction that moves nothing is a wall: Triton would follow the operand of a dot product back to the loads of
    bytes, and lay all of it out for bytes, which costs a move for every weight.
    """
    found = (zero.to(tl.float32) * -unit(_is_bf16(DTYPE))).to(DTYPE)
    if USE_ASM:
        found = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [found.to(tl.int16, bitcast=True)], dtype=tl.int16, is_pure=False, pack=2
        ).to(DTYPE, bitcast=True)
    return found


@triton.jit
def difference(
    words: tl.tensor,
    upper: tl.tensor,
    zero: tl.tensor,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    DTYPE: tl.constexpr,
    USE_ASM: tl.constexpr,
) -> tl.tensor:
    """(code - zero) · UNIT of one field of planar words.

    Args:
        words: int16, any shape; at 3 bits the plane of the lower two.
        upper: int16 of that shape, the upper plane; looked at only at 3 bits.
        zero: -zero · UNIT in DTYPE (`offset`), of that shape; looked at only unless SYM.
        FIELD: which; at 3 bits 0..15, of the upper plane, and 0..7 of the lower one again.
        DTYPE: float16 or bfloat16.
        USE_ASM: by PTX; else by Triton.
    """
    if USE_ASM:
        asm: tl.constexpr = difference_asm(FIELD, BITS, SYM, _is_bf16(DTYPE))
        if BITS == 3:
            if SYM:
                found = tl.inline_asm_elementwise(asm, "=r,r,r", [words, upper], dtype=tl.int16, is_pure=True, pack=2)
            else:
                found = tl.inline_asm_elementwise(
                    asm, "=r,r,r,r", [words, upper, zero], dtype=tl.int16, is_pure=True, pack=2
                )
        elif SYM:
            found = tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)
        else:
            found = tl.inline_asm_elementwise(asm, "=r,r,r", [words, zero], dtype=tl.int16, is_pure=True, pack=2)
        found = found.to(DTYPE, bitcast=True)
    else:
        code = _code(words, upper, FIELD, BITS)
        if SYM:
            found = ((code - (1 << (BITS - 1))).to(tl.float32) * unit(_is_bf16(DTYPE))).to(DTYPE)
        else:
            found = (code.to(tl.float32) * unit(_is_bf16(DTYPE)) + zero.to(tl.float32)).to(DTYPE)
    return found


@triton.jit
def _code(words: tl.tensor, upper: tl.tensor, FIELD: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    if BITS == 3:
        return ((words >> (FIELD % 8 * 2)) & 3) | (((upper >> _upper_bit(FIELD)) & 1) << 2)
    else:
        return (words >> (FIELD * BITS)) & ((1 << BITS) - 1)


@triton.constexpr_function
def _upper_bit(field: int) -> int:
    return UPPER_BITS[field]
