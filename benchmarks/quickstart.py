"""How long a newcomer waits: the quickstart, the same again from the cache, and `layerwise --help`.

    python benchmarks/quickstart.py      # writes benchmarks/results/quickstart.md

Each command runs in a process of its own, with the bounds that the project set itself beside the figures. "Imports
only" is what Python needs to load numpy, pyarrow and pandas and nothing else, on the same machine in the same run.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from machine import header

HERE = Path(__file__).parent
WORKFLOW = HERE.parent / "workflows" / "quickstart.yaml"
LAYERWISE = [sys.executable, "-m", "layerwise"]


def seconds(command: Sequence[str]) -> float:
    """Wall time of one command, which must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Measure and write the table."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        cold, cached = [], []
        for attempt in range(2):
            run = [*LAYERWISE, "run", str(WORKFLOW), "--results", f"{scratch}/{attempt}"]
            cold.append(seconds(run))
            cached += [seconds(run) for _ in range(3)]
    rows.append(("quickstart, nothing cached", cold, 150.0))
    rows.append(("quickstart, everything cached", cached, 4.0))
    rows.append(("`layerwise --help`", [seconds([*LAYERWISE, "--help"]) for _ in range(5)], 0.7))
    imports = [sys.executable, "-c", "import numpy, pyarrow.dataset, pandas"]
    rows.append(("imports only", [seconds(imports) for _ in range(5)], None))
    lines = [
        "# How long a newcomer waits",
        "",
        *header("quickstart.py", ["layerwise", "torch", "ray", "transformers", "pyarrow"]),
        "",
        "| what | runs | median s | least | greatest | bound s |",
        "|---|---|---|---|---|---|",
    ]
    for name, times, bound in rows:
        figures = f"{statistics.median(times):.2f} | {min(times):.2f} | {max(times):.2f}"
        lines.append(f"| {name} | {len(times)} | {figures} | {'' if bound is None else f'{bound:g}'} |")
    text = "\n".join(lines) + "\n"
    (HERE / "results" / "quickstart.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
