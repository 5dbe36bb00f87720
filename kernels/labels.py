"""What a packed weight is called in a table of times: all that decides its time beside its shape.

Two weights of one shape and label take the same time, so one of them is measured. Labels are made here alone, from
plain values and without torch, so that a weight (`Packed.label`) and whoever has only read its recipe in an index give
one thing one name, and nothing is loaded in order to compare.
"""

from __future__ import annotations

DENSE = "dense"
"""The weight as it is."""

VALUES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
"""How labels call the dtypes of kept weights."""


def quantized(bits: int, group_size: int, sym: bool, ordered: bool = False) -> str:
    """`int4-g128-sym`, `int3-g64-asym`, `int8-channel-sym`, `int4-g128-sym-ordered`.

    Args:
        bits: of a code.
        group_size: columns that share a scale, -1 for the whole row. A group that reaches over the whole row is packed
            as -1.
        sym: there are no zero points.
        ordered: columns were sorted by group; with one group they never are.
    """
    group = "channel" if group_size == -1 else f"g{group_size}"
    return f"int{bits}-{group}-{'sym' if sym else 'asym'}{'-ordered' if ordered else ''}"


def block_sparse(blocks: str, zeros_percent: int) -> str:
    """`int4-g128-sym-blocks50%`: the label of the kept blocks, and of all blocks how many are zero."""
    return f"{blocks}-blocks{zeros_percent}%"


def n_m_sparse(n_kept: int, m_group: int, values: str) -> str:
    """`2:4-fp16`; `values` is the dtype of the kept weights: `float16`."""
    return f"{n_kept}:{m_group}-{VALUES[values]}"


def unstructured(zeros_percent: int, values: str) -> str:
    """`unstructured-fp16-50%`: the dtype of the kept weights (`float16`), and of all weights how many are not kept."""
    return f"unstructured-{VALUES[values]}-{zeros_percent}%"


def low_rank(rank: int, base: str | None) -> str:
    """`int4-g128-sym+r64`: the label of the base and the rank; `r64` without a base."""
    return f"r{rank}" if base is None else f"{base}+r{rank}"


def percent(part: int, whole: int) -> int:
    """How many of a hundred, rounded as labels say it; 0 of nothing."""
    return round(100 * part / max(1, whole))
