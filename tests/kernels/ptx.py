"""The few integer instructions of PTX that kernels inline, evaluated on Python's whole numbers.

Triton's interpreter knows no inline assembly, so without a GPU this is what shows that the PTX does what the portable
branch beside it does.

Source: PTX ISA 8.5, integer and logic instructions.
"""

from __future__ import annotations

from collections.abc import Mapping

MASK = 0xFFFFFFFF


def run_ptx(text: str, registers: Mapping[str, int]) -> dict[str, int]:
    """Run straight-line PTX over 32-bit registers.

    Args:
        text: statements that end in `;`, in braces or not; `.reg` declares and does nothing.
        registers: by name, the operands.
    Returns:
        all registers afterwards.
    Raises:
        KeyError: a register that was not set, or another instruction.
    """
    values = dict(registers)

    def read(operand: str) -> int:
        return int(operand, 0) if operand[0].isdigit() else values[operand]

    for statement in text.strip().strip("{}").split(";"):
        name, _, rest = statement.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *operands = (operand.strip() for operand in rest.split(","))
        values[target] = _RUN[name](*map(read, operands)) & MASK
    return values


def _lop3(a: int, b: int, c: int, table: int) -> int:
    """Bit by bit, the entry of the table that the three bits point to."""
    return sum((table >> ((a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)) & 1) << bit for bit in range(32))


_RUN = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.u32": lambda a, b: a >> b,
    "shr.b32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "mul.lo.u32": lambda a, b: a * b,
    "lop3.b32": _lop3,
}
