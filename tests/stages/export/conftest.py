"""Models with levels chosen by hand, for what writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.stages.levels.database import Database


@pytest.fixture(scope="session")
def make_exportable(
    make_bench: Callable[[Path], Any], model_folder: Callable[[str], Path]
) -> Callable[..., Callable[..., Any]]:
    """From a menu, what makes a bench and a `model` artifact of a family in which each unit has the level that a
    function of it names."""

    def with_menu(menu: list[dict[str, Any]]) -> Callable[..., Any]:
        benches: dict[str, Any] = {}

        def make(family: str, choose: Callable[[Any], str]) -> tuple[Any, Any]:
            from layerwise.stages.allocate.allocation import make_allocation, save_allocations
            from layerwise.stages.allocate.costs import CostTable

            if family not in benches:
                bench = make_bench(model_folder(family))
                targets = ["blocks", "head", "embedding"]
                benches[family] = bench, bench.run("compress", {"menu": menu, "targets": targets})
            bench, levels = benches[family]
            table = CostTable(Database(levels.out, bench.model).index)
            genome = [[level.name for level in unit.levels].index(choose(unit.unit)) for unit in table.units]
            allocation = make_allocation(table, genome, solver="hand", budget={"bits": 32.0})
            folder = bench.folder / f"allocations-{bench.runs}"
            folder.mkdir()
            save_allocations(folder, [allocation])
            return bench, bench.run("apply", {"pick": allocation.candidate}, allocations=folder, database=levels.out)

        return make

    return with_menu
