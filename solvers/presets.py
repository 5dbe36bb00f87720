"""Published settings of the evolutionary search, by name, so that "as in the paper" is one word in a workflow.

Source: EvoPress, arXiv:2410.14649, in the values of its repository's run scripts for depth pruning, unstructured
sparsity and quantization (github.com/IST-DASLab/EvoPress, `scripts/` and `example_scripts/`). The scripts start from
random allocations in depth pruning only, 64 of them; the other two presets borrow that number for budgets between two
levels.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from layerwise.errors import UsageError


@dataclass(frozen=True)
class Preset:
    """Settings of `Evolve`, which documents them. `generations` is None where it depends on the model."""

    generations: int | None
    offspring: int
    survivors: tuple[int, ...]
    tokens: tuple[int | None, ...]
    max_switches: int = 3
    initially_generated: int = 64


PRESETS: dict[str, Preset] = {
    "evopress-depth": Preset(None, 32, (2, 1), (2048, 32768)),  # generations: `depth_generations`
    "evopress-sparsity": Preset(400, 64, (8, 2, 1), (2048, 16384, 65536)),
    "evopress-quantization": Preset(150, 128, (16, 4, 1), (2048, 16384, 131072)),
    # Ours, not published: 1/35 of the evaluations and 1/100 of the tokens of the one above, for small models on CPUs.
    "quick": Preset(30, 16, (4, 1), (1024, 8192), initially_generated=16),
}


def find_preset(name: str) -> Preset:
    """The preset of that name; an unknown name is answered with the nearest known one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0)
        raise UsageError(f"unknown preset {name}; known are {', '.join(PRESETS)}", hint=f"did you mean {near[0]}?")
    return PRESETS[name]


def depth_generations(n_blocks: int, n_dropped: int) -> int:
    """How many generations EvoPress gives to dropping k of n blocks: k (n - k) / 1.5, rounded down."""
    return int(n_dropped * (n_blocks - n_dropped) / 1.5)
