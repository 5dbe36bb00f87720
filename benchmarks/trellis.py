"""What the trellis code errs on a Gaussian source, and what it takes on this processor.

    python benchmarks/trellis.py        # writes benchmarks/results/trellis.md; minutes on one core

The mean squared error is that of 256 sequences of 256 independent Gaussian weights of variance 1, at the scale that
`trellis` begins with. Seconds are of one thread, for columns of 4096 rows, which are 16 sequences at a time.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from machine import header

from layerwise.kernels.trellis_code import LENGTH, values
from layerwise.stages.compress.trellis import SPREAD
from layerwise.stages.compress.viterbi import Trellis

HERE = Path(__file__).parent
SEQUENCES, AT_A_TIME = 256, 16
SCALAR = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
"""Mean squared error of the best scalar quantizer of a Gaussian source: Max, IRE Trans. Inform. Theory 6, 1960, table
1."""
PUBLISHED = {(2, 16): "0.069"}
"""QTIP, arXiv:2406.11235: 1MAD and 3INST, as the paper rounds it."""
BLOCKS_OF_8B = 6980
"""Million weights in the blocks of Llama 3 8B."""


def row(bits: float, state_bits: int) -> str:
    """One line of the table."""
    spread = float(np.interp(bits, list(SPREAD), list(SPREAD.values())))
    x = spread * torch.randn((LENGTH, SEQUENCES), generator=torch.Generator().manual_seed(0))
    code, table, weight = Trellis(bits, state_bits), values(state_bits), torch.ones(LENGTH, AT_A_TIME)
    started = time.process_time()
    states = torch.cat([code.encode(part.contiguous(), weight) for part in x.split(AT_A_TIME, dim=1)])
    seconds = (time.process_time() - started) / x.numel() * 1e6
    error = (table[states].T - x).square().mean().item() / spread**2
    published = PUBLISHED.get((bits, state_bits), "")
    limit, scalar = 2.0 ** (-2 * bits), SCALAR.get(bits)
    line = (
        f"| {bits:g} | {state_bits} | {error:.5f} | {published} | {'' if scalar is None else scalar} | {limit:.5f} | "
    )
    return line + f"{seconds:.1f} | {seconds * BLOCKS_OF_8B / 3600:.0f} |"


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    lines = [
        "# The trellis code",
        "",
        *header("trellis.py", ["layerwise", "torch"]),
        f"- mean squared error on {SEQUENCES} sequences of {LENGTH} independent Gaussian weights of variance 1",
        "- published: QTIP; scalar: the best quantizer of single weights (Max 1960); limit: 4^-bits, of any code",
        f"- s/M: processor seconds of one thread for a million weights, {AT_A_TIME} sequences at a time, as of a layer "
        f"with {AT_A_TIME * LENGTH} rows; hours: of one core for the {BLOCKS_OF_8B} million weights of the blocks of "
        "an 8 B model",
        "",
        "| bits | L | MSE | published | scalar | limit | s/M | hours for 8 B |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for bits, state_bits in [(bits, 12) for bits in (1, 1.5, 2, 2.5, 3, 4)] + [(2, L) for L in (10, 14, 16)]:
        lines.append(row(bits, state_bits))
        print(lines[-1], flush=True)
    (HERE / "results" / "trellis.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
