"""The pretrained models that benchmarks of whole workflows run on, and what a workflow is told of each."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

SHARED = Path(__file__).parents[2] / "shared"
"""What stands beside the project and is not ours; without it only the demo model is at hand."""

OVERRIDES: dict[str, list[str]] = {
    "demo": [],
    "stories260k": [
        f"model={SHARED / 'models/stories260k'}",
        f"data.calibration.text={SHARED / 'data/tinystories_calibration.txt'}",
        f"data.heldout.text={SHARED / 'data/tinystories_heldout.txt'}",
    ],
}


def at_hand(models: Iterable[str]) -> Iterator[str]:
    """Those that are here; says of the others that they are skipped."""
    for model in models:
        if model == "demo" or SHARED.is_dir():
            yield model
        else:
            print(f"{model}: skipped, {SHARED} is not here", file=sys.stderr)
