"""Lets the methods of scope `block` make their levels, before those of single units; one model for each worker."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import NotFinite
from layerwise.results.durable import settle_file
from layerwise.stages.compress import find_compressor
from layerwise.stages.compress.chosen import Chosen
from layerwise.stages.compress.params import CompressParams
from layerwise.stages.compress.unit_levels import task_of, too_few
from layerwise.stages.contract import Context, ModelSource
from layerwise.stages.models.network import Unit

if TYPE_CHECKING:
    from layerwise.stages.models.in_blocks import InBlocks


def compress_blocks(context: Context, params: CompressParams, chosen: Chosen) -> Path | None:
    """Let the methods of scope `block` make their levels; gives the folder where they stand."""
    entries = [(number, entry) for number, entry in enumerate(params.menu) if entry.scope == "block"]
    if not entries:
        return None
    assert chosen.statistics is not None, "checked before the work starts"
    folder = context.items / "blocks"
    by_block: dict[int, list[dict[str, Any]]] = {}
    for unit, _ in chosen.units:
        item = chosen.item(unit)
        if unit.block is not None and not too_few(item["tokens"], params.least_tokens):
            by_block.setdefault(unit.block, []).append(item)
    items = [
        {"block": block, "number": number, "units": units} for number, _ in entries for block, units in by_block.items()
    ]
    factory = partial(_block_worker, chosen.source, chosen.statistics, params, folder)
    with context.executor.replicas(factory) as pool:
        pool.map(items, keys=[f"block-{item['block']}-{item['number']}" for item in items], note="blocks")
    return folder


def _block_worker(
    source: ModelSource, statistics: Path, params: CompressParams, folder: Path
) -> Callable[[dict[str, Any]], None]:
    from layerwise.stages.models.loading import load_network

    return partial(
        _compress_block,
        network=load_network(source),
        source=source,
        statistics=statistics,
        params=params,
        folder=folder,
    )


def _compress_block(
    item: dict[str, Any],
    *,
    network: InBlocks,
    source: ModelSource,
    statistics: Path,
    params: CompressParams,
    folder: Path,
) -> None:
    """Write the levels of one menu entry of all units of a block."""
    from layerwise.stages.calibrate.statistics import Statistics
    from layerwise.stages.compress.block_run import BlockRun
    from layerwise.stages.levels.files import write_unit
    from layerwise.stages.models.compressed import Weights
    from layerwise.stages.models.stored import Stored

    block, entry = item["block"], params.menu[item["number"]]
    known, weights = Statistics(statistics), Weights(source)
    located = [(Unit.from_json(unit["unit"]), Stored.from_json(unit["stored"])) for unit in item["units"]]
    units = {unit.name: (unit, weights.level(unit.name, stored)) for unit, stored in located}
    ids, inputs = known.hidden(block)
    run = BlockRun(network, block, [unit for unit, _ in located], ids, inputs, known.hidden(block + 1)[1])
    target = folder / str(item["number"])
    try:
        made = find_compressor(entry.method).run(task_of(units, known, source.device, run), entry)
    except NotFinite as error:
        target.mkdir(parents=True, exist_ok=True)
        unfinished = target / f"{block}.partial"
        unfinished.write_text(error.message, encoding="utf-8")
        settle_file(unfinished, target / f"{block}.failed")
        return
    for name, levels in made.items():
        write_unit(target, name, [level.to("cpu") for level in levels])
