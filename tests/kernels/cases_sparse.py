"""What of the sparse kernels is compiled (the form: offline.py). Budgets: Triton 3.9.0, counted when written."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from layerwise.kernels.configs import config_for
from layerwise.kernels.unstructured_matvec import ALONG

HALF = {"fp16": tl.float16, "bf16": tl.bfloat16}


def n_m(name: str, arch: int, m: int, splits: int, budget: float, dtype: str = "fp16") -> dict[str, Any]:
    BM, BN = (16, 128) if m <= 16 else (32, 64)
    shared = splits > 1
    return {
        "name": f"n_m-{name}-sm{arch}",
        "kernel": "layerwise.kernels.n_m_matmul:n_m_kernel",
        "arch": arch,
        "arguments": {
            "x4": "*i64",
            "values": "*i16",
            "masks": "*i16",
            "y": f"*{dtype}",
            "parts": "*fp32" if shared else None,
            "counters": "*i32" if shared else None,
            "m": m,
            "n": 4096,
            "n_padded": 4096,
            "k_padded": 4096,
            "BM": BM,
            "BN": BN,
            "SPLITS": splits,
            "DTYPE": HALF[dtype],
            "USE_ASM": True,
        },
        "options": {"num_warps": 4, "num_stages": 3},
        "weights": BN * 256,
        "budget": budget,
        "opcodes": ["HMMA", "LDGSTS.E.BYPASS", "PRMT"],
    }


def unstructured(
    name: str, arch: int, m: int, budget: float, dtype: str = "fp16", values: str | None = None
) -> dict[str, Any]:
    return {
        "name": f"unstructured-{name}-sm{arch}",
        "kernel": "layerwise.kernels.unstructured_matvec:unstructured_kernel",
        "arch": arch,
        "arguments": {
            "x": f"*{dtype}",
            "values": f"*{values or dtype}",
            "offsets": "*u8",
            "firsts": "*i16",
            "starts": "*i32",
            "y": f"*{dtype}",
            "n": 4096,
            "k": 4096,
            "M": m,
            "RUN": 8,
            "ROWS": 4,
            "LENGTH": 512,
            "ALONG": ALONG,
        },
        "options": {"num_warps": 4},
        "weights": 4 * 512,  # nonzeros
        "budget": budget,
        "opcodes": ["LDG.E.128", "LDG.E.64", "FFMA"],
    }


RUN = {2: 32, 3: 16, 4: 32, 8: 64}
BLOCK = {2: 256, 3: 256, 4: 128, 8: 128}


def quantized_arguments(bits: int, sym: bool, dtype: str) -> dict[str, Any]:
    """What kernels on planar words take alike, at groups of 128."""
    return {
        "x_ptr": f"*{dtype}",
        "words_ptr": "*i16",
        "upper_ptr": "*i16" if bits == 3 else None,
        "scale_ptr": "*fp16",
        "zero_ptr": None if sym else "*u8",
        "y_ptr": f"*{dtype}",
        "partial_ptr": "*fp32",
        "counter_ptr": "*i32",
        "n": 4096,
        "k": 4096,
        "BITS": bits,
        "GROUP": 128,
        "SYM": sym,
        "RUN": RUN[bits],
        "BN": 128,
        "SPLITS": 8,
        "EVEN_K": True,
        "USE_ASM": True,
    }


def block_sparse(
    bits: int,
    arch: int,
    m: int,
    budget: float,
    sym: bool = True,
    dtype: str = "fp16",
    rows: int = 64,
) -> dict[str, Any]:
    config = config_for(arch, bits, 128, m)
    columns = min(rows, config.columns)  # as the launcher cuts tiles
    return {
        "name": f"block_sparse-{bits}-{'sym' if sym else 'asym'}-{dtype}-m{m}-rows{rows}-sm{arch}",
        "kernel": "layerwise.kernels.block_sparse_matmul:block_sparse_kernel",
        "arch": arch,
        "arguments": quantized_arguments(bits, sym, dtype)
        | {
            "index_ptr": "*i32",
            "starts_ptr": "*i32",
            "m": m,
            "stride": rows,
            "ROWS": rows,
            "COLUMNS": 256,
            "BM": config.rows,
            "BN": columns,
            "LEFT": config.left,
        },
        "options": {"num_warps": config.num_warps, "num_stages": config.num_stages},
        "weights": columns * BLOCK[bits],
        "budget": budget,
        "opcodes": ["HMMA" if m <= 32 or arch < 90 else "HGMMA", "LDGSTS.E.BYPASS"],
    }


def low_rank(bits: int, arch: int, m: int, budget: float, sym: bool = True, dtype: str = "fp16") -> dict[str, Any]:
    config = config_for(arch, bits, 128, m)
    return {
        "name": f"low_rank-{bits}-{'sym' if sym else 'asym'}-{dtype}-m{m}-sm{arch}",
        "kernel": "layerwise.kernels.low_rank_matmul:low_rank_kernel",
        "arch": arch,
        "arguments": quantized_arguments(bits, sym, dtype)
        | {
            "packed_x_ptr": f"*{dtype}",
            "a_ptr": f"*{dtype}",
            "b_ptr": f"*{dtype}",
            "t_ptr": "*fp32",
            "signal_ptr": "*i32",
            "m": m,
            "rank": 64,
            "n_padded": 4096,
            "blocks": 4096 // BLOCK[bits],
            "tiles": 32,
            "BM": config.rows,
            "BR": 16,
            "BK": 64,
            "STRETCHES": 4,
            "PROJECTIONS": 16,
            "PATIENCE": 1 << 16,
        },
        "options": {"num_warps": config.num_warps, "num_stages": config.num_stages},
        "weights": 128 * BLOCK[bits],
        "budget": budget,
        "opcodes": ["HMMA.16816", "HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS"],
    }


CASES = [
    n_m("m1", 90, 1, 8, 3.33),
    n_m("m1", 80, 1, 8, 3.35),
    n_m("m16-alone", 90, 16, 1, 3.4),
    n_m("m64", 90, 64, 4, 4.86),
    n_m("m64", 80, 64, 4, 4.83),
    n_m("m16-bf16", 90, 16, 8, 3.4, dtype="bf16"),
    n_m("m16-bf16", 80, 16, 8, 3.35, dtype="bf16"),
    n_m("m16", 86, 16, 8, 3.35),
    unstructured("m1", 90, 1, 10.44),
    unstructured("m1", 80, 1, 10.44),
    unstructured("m4", 90, 4, 21.5),
    unstructured("m3-bf16", 90, 3, 18, dtype="bf16"),
    unstructured("m1-fp32", 90, 1, 9.82, values="fp32"),
    block_sparse(4, 90, 1, 2.35, rows=128),
    block_sparse(4, 90, 1, 3.24),
    block_sparse(4, 80, 1, 3.15),
    block_sparse(4, 90, 16, 3.38, sym=False, dtype="bf16"),
    block_sparse(2, 90, 1, 2.47),
    block_sparse(3, 90, 1, 3.38),
    block_sparse(8, 90, 1, 3.29),
    block_sparse(4, 90, 32, 3.66),
    block_sparse(4, 90, 64, 4.19),
    block_sparse(4, 80, 64, 4.72),
    block_sparse(2, 90, 64, 3.3),
    block_sparse(3, 80, 64, 4.77),
    low_rank(4, 90, 1, 2.22),
    low_rank(4, 80, 1, 2.18),
    low_rank(4, 90, 16, 2.31, sym=False, dtype="bf16"),
    low_rank(2, 90, 1, 1.96),
    low_rank(3, 90, 1, 2.79),
    low_rank(8, 90, 1, 2.41),
]
