"""A results folder with two runs of one workflow; the second found everything but the evaluation in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from layerwise.results.store import Store

KEYS = {name: name[0] * 64 for name in ("compress", "search", "ilp", "best", "repaired", "evaluate", "measure")}
USES = {
    "compress": "compress", "search": "allocate", "ilp": "allocate", "best": "apply", "repaired": "recover",
    "evaluate": "evaluate", "measure": "evaluate",
}  # fmt: skip


def allocation(candidate: str, solver: str, bits: float, kl: float, levels: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "candidate": candidate, "solver": solver, "budget": f"bits={bits:g}", "bits": bits,
        "effective_bits": bits + 0.125, "bytes": int(bits * 1000), "parameters": int(bits * 100),
        "flops": bits * 50.0, "metric": "kl", "kl": kl,
        "units": ["q", "k"][: len(levels)], "levels": list(levels), "genome": list(range(len(levels))),
    }  # fmt: skip


def begin(store: Store, run: str, stages: dict[str, str], renamed: dict[str, str] | None = None) -> None:
    """Record a run with its stages, given as the stage's entry of `KEYS` and whether it was a cache hit."""
    store.append("runs", [{"name": "demo", "status": "running"}], run_id=run, attempt=1, first_seq=0)
    for seq, (name, cache) in enumerate(stages.items()):
        shown = (renamed or {}).get(name, name)
        row = {"uses": USES[name], "cache": cache, "status": "ok"}
        at = {"run_id": run, "stage": shown, "stage_key": KEYS[name], "attempt": 1, "first_seq": seq}
        store.append("stages", [row], **at)
    store.append("runs", [{"name": "demo", "status": "ok", "seconds": 2.5}], run_id=run, attempt=1, first_seq=1)


def put(store: Store, run: str, table: str, stage: str, rows: Sequence[dict[str, Any]], first_seq: int = 0) -> None:
    at = {"run_id": run, "stage": stage, "stage_key": KEYS[stage], "attempt": 1, "first_seq": first_seq}
    store.append(table, rows, **at)


@pytest.fixture
def two_runs(tmp_path: Path) -> Store:
    """`run-a` computed compress, search and ilp; `run-b` found them, called its searches otherwise, and evaluated."""
    store = Store.open(tmp_path / "results", create=True)
    begin(store, "run-a", {"compress": "miss", "search": "miss", "ilp": "miss"})
    put(store, "run-a", "levels", "compress", [
        {"unit": unit, "level": f"gptq-{bits}b", "bits": bits, "weight_nmse": 4.0**-bits, "status": "ok"}
        for unit in "qk" for bits in (2, 4)
    ])  # fmt: skip
    put(store, "run-a", "allocations", "search", [
        allocation("aaa111", "evolve", 2.0, 0.9, ["gptq-2b", "gptq-2b"]),
        allocation("aab222", "evolve", 3.0, 0.2, ["gptq-4b", "gptq-2b"]),
        allocation("ccc333", "evolve", 4.0, 0.1, ["gptq-4b", "gptq-4b"]),
    ])  # fmt: skip
    put(store, "run-a", "allocations", "ilp", [allocation("ddd444", "ilp", 3.0, 0.4)])
    begin(store, "run-b", {"compress": "hit", "search": "hit", "ilp": "hit", "best": "miss", "repaired": "miss",
                           "evaluate": "miss"}, renamed={"search": "find"})  # fmt: skip
    return store
