"""What of the quantized kernel is compiled (the form: offline.py). Budgets: Triton 3.9.0, counted when written.

Every entry of the table of tiles is here, for every width, with zero points, which cost the most registers.
"""

from __future__ import annotations

from typing import Any

from layerwise.kernels import planar
from layerwise.kernels.configs import config_for

ROWS = (1, 32, 64, 128)
"""Of x: one number in each bucket of the table."""

ASYM = {
    (90, 4, 128): (2.31, 2.77, 4.02, 4.70),
    (90, 4, 32): (3.44, 4.28, 6.73, 6.66),
    (90, 4, 64): (2.66, 3.25, 4.86, 4.91),
    (90, 4, -1): (2.02, 2.36, 3.31, 3.58),
    (90, 2, 128): (2.03, 2.46, 3.31, 4.09),
    (90, 2, 32): (3.22, 3.98, 6.22, 6.09),
    (90, 2, 64): (2.41, 2.99, 4.24, 4.34),
    (90, 2, -1): (1.70, 2.02, 2.60, 2.97),
    (90, 3, 128): (2.81, 3.18, 4.47, 5.53),
    (90, 3, 32): (4.85, 7.34, 7.34, 7.70),
    (90, 3, 64): (3.19, 3.71, 5.38, 5.88),
    (90, 3, -1): (2.49, 2.77, 3.66, 4.17),
    (90, 8, 128): (2.51, 2.94, 4.22, 4.69),
    (90, 8, 32): (3.97, 4.88, 8.06, 7.81),
    (90, 8, 64): (2.90, 3.47, 5.14, 4.81),
    (90, 8, -1): (2.26, 2.57, 3.72, 3.59),
    (80, 4, 128): (2.36, 2.78, 4.58, 4.38),
    (80, 4, 32): (3.50, 4.31, 7.55, 7.77),
    (80, 4, 64): (2.74, 3.18, 5.50, 5.38),
    (80, 4, -1): (2.11, 2.34, 3.81, 3.72),
    (80, 2, 128): (2.05, 2.44, 4.05, 3.95),
    (80, 2, 32): (3.19, 4.01, 6.85, 6.48),
    (80, 2, 64): (2.45, 2.92, 4.99, 4.88),
    (80, 2, -1): (1.74, 2.02, 3.16, 3.08),
    (80, 3, 128): (2.82, 3.19, 4.77, 4.73),
    (80, 3, 32): (5.08, 7.46, 7.46, 7.20),
    (80, 3, 64): (3.19, 3.71, 5.68, 5.59),
    (80, 3, -1): (2.50, 2.76, 3.93, 3.94),
    (80, 8, 128): (2.59, 3.06, 4.84, 4.77),
    (80, 8, 32): (4.09, 4.86, 8.56, 8.41),
    (80, 8, 64): (2.97, 3.56, 6.03, 5.78),
    (80, 8, -1): (2.34, 2.61, 4.08, 3.89),
}
"""Instructions per weight with zero points, by architecture, bits and group size, for each of ROWS."""

SYM = {
    (90, 4, 128): (2.23, 3.81, 4.53),
    (90, 2, 128): (1.94, 3.11, 3.93),
    (90, 3, 128): (2.73, 4.31, 5.41),
    (90, 8, 128): (2.41, 4.05, 4.52),
    (80, 4, 128): (2.28, 4.41, 4.19),
    (80, 2, 128): (1.97, 3.81, 3.69),
    (80, 3, 128): (2.74, 4.59, 4.54),
    (80, 8, 128): (2.53, 4.77, 4.42),
}
"""Without zero points, for 1, 64 and 128 rows."""

BFLOAT16 = {
    (90, 3, 32): (5.05,),
    (90, 4, 128): (2.31,),
    (90, 2, 128): (2.03,),
    (90, 3, 128): (3.00,),
    (90, 8, 128): (2.51,),
    (80, 4, 128): (2.37,),
    (80, 2, 128): (2.06,),
    (80, 3, 128): (3.01,),
    (80, 8, 128): (2.60,),
}
"""With zero points and bfloat16 activations, for one row."""

RAGGED = {(90, 4, 128): 2.39, (80, 4, 128): 2.45}
"""Without zero points, where x ends inside a block, for one row."""


def quantized(
    arch: int,
    bits: int,
    group_size: int,
    m: int,
    budget: float,
    *,
    sym: bool = False,
    dtype: str = "fp16",
    ragged: bool = False,
) -> dict[str, Any]:
    config = config_for(arch, bits, group_size, m)
    block = planar.block_columns(bits, group_size)
    group = "channel" if group_size == -1 else f"g{group_size}"
    kind = ("sym" if sym else "asym") + ("-ragged" if ragged else "") + ("-bf16" if dtype == "bf16" else "")
    wgmma = config.left and arch == 90
    return {
        "name": f"quantized-int{bits}-{group}-{kind}-m{m}-sm{arch}",
        "kernel": "layerwise.kernels.quantized_matmul:quantized_kernel",
        "arch": arch,
        "arguments": {
            "x_ptr": f"*{dtype}",
            "words_ptr": "*i16",
            "upper_ptr": "*i16" if bits == 3 else None,
            "scale_ptr": "*fp16",
            "zero_ptr": None if sym else "*u8",
            "y_ptr": f"*{dtype}",
            "partial_ptr": "*fp32",
            "counter_ptr": "*i32",
            "m": m,
            "n": 4096,
            "k": 4000 if ragged else 4096,
            "n_padded": 4096,
            "blocks": 4096 // block,
            "BITS": bits,
            "GROUP": group_size,
            "SYM": sym,
            "RUN": planar.field_columns(bits, group_size),
            "BM": config.rows,
            "BN": config.columns,
            "LEFT": config.left,
            "SPLITS": 4,
            "EVEN_K": not ragged,
            "USE_ASM": True,
        },
        "options": {"num_warps": config.num_warps, "num_stages": config.num_stages},
        "weights": block * config.columns,
        "budget": budget,
        # 16 bytes of words at a time straight into shared memory, and from there as operands.
        "opcodes": ["HGMMA" if wgmma else "HMMA", "LDGSTS.E.BYPASS.128", "LDSM.16.MT88.4"],
    }


CASES = [
    *(quantized(*key, m, budget) for key, budgets in ASYM.items() for m, budget in zip(ROWS, budgets, strict=True)),
    *(
        quantized(*key, m, budget, sym=True)
        for key, budgets in SYM.items()
        for m, budget in zip((1, 64, 128), budgets, strict=True)
    ),
    *(quantized(*key, 1, budgets[0], dtype="bf16") for key, budgets in BFLOAT16.items()),
    *(quantized(*key, 1, budget, sym=True, ragged=True) for key, budget in RAGGED.items()),
]
