"""`latency`: what every level of every unit takes on this machine, on the kernel that would really run it.

Levels of one shape and kind take the same time, so each kind is timed once per shape. All that could run a shape takes
turns in one item, the dense products among them, and what an allocation is charged is the time of the backend that the
dispatcher then chooses. A level without a kernel is charged as the dense weight that it runs as (`no_kernel`). The rest
of the model is what two whole models take beside their products (`charging.py`). Their sum is the model's forward pass;
the `speed` stage measures how true that is.

Copies of a weight go by turns, as many as the model has weights for, and no more than it takes to leave the cache: a
small model's layers are in the cache, and so are they when they are timed.

The times are those of kernels, and some of these round activations or scales, which the losses of a profile do not
know; `exact` leaves them out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from layerwise.stages.contract import Context, ModelSource, Port, Row, Stage
from layerwise.stages.latency.charging import Shape, charge, fastest_levels, fit_rest, is_timed, narrows, of_level
from layerwise.stages.latency.forward_pass import ForwardPass, time_packed
from layerwise.stages.latency.machine import TABLE, MeasureParams, fingerprint, one_by_one
from layerwise.stages.levels.database import DatabaseIndex, LevelEntry, UnitEntry
from layerwise.stages.quantities import ByteSize, Count

if TYPE_CHECKING:
    from layerwise.kernels.dispatch import Choice
    from layerwise.kernels.latency_table import LatencyTable
    from layerwise.kernels.timing import Sampling


class LatencyParams(MeasureParams):
    """What a forward pass is, and how much of it is measured."""

    batch: int = Field(1, ge=1, description="sequences of a forward pass")
    tokens: Count = Field(1, description="tokens of each; 1 is one step of decoding, without the cache of earlier ones")
    exact: bool = Field(
        False, description="let only kernels count that round nothing but their result, not activations or scales"
    )
    rotate: ByteSize | None = Field(
        None, description="bytes of weights that a kernel goes through before one comes again, at most the model's; "
        "twice the last level of cache if left out"
    )  # fmt: skip


def latency(context: Context, params: LatencyParams) -> None:
    """Write `latency.json` (milliseconds by unit and level, and the rest's) and `table.json`.

    Raises:
        NoisyMeasurement: times scatter too much; what was measured before is kept.
        DeviceChanged: an item was worked on by another machine.
        UsageError: the device is not there, or the model takes no sequences so long.
    """
    index, machine = DatabaseIndex(context.input("database")), fingerprint(params)
    labels, table = _measure_products(context, params, index, machine)
    table.save(context.out / TABLE)
    choices = _choose(context, params, labels, table)
    wholes = _measure_wholes(context, params, machine, fastest_levels(index.units, choices))
    _write(context, params, index, table, choices, wholes)


def _measure_products(
    context: Context, params: LatencyParams, index: DatabaseIndex, machine: Mapping[str, Any]
) -> tuple[dict[tuple[Shape, str], str], LatencyTable]:
    """One race for each shape; gives the label of every shape and kind, and all rows."""
    from layerwise.kernels.device import Device
    from layerwise.kernels.latency_table import Row as TableRow
    from layerwise.kernels.measure import table_of

    total = sum(unit.n_weights for unit in index.units)
    kinds = _kinds(index)
    work: dict[str, Any] = {
        _name(shape): partial(
            _race,
            list(examples.values()),
            database=context.input("database"),
            rows=params.batch * params.tokens,
            model=context.model,
            device=params.device,
            sampling=params.sampling(rotate_bytes=params.rotate, max_copies=_copies(shape, total)),
        )
        for shape, examples in kinds.items()
    }
    answers = dict(one_by_one(context, work, machine, note="shapes"))
    labels = {
        (shape, name): label
        for shape, examples in kinds.items()
        for name, label in zip(examples, answers[_name(shape)]["labels"], strict=True)
    }
    rows = [TableRow(**row) for shape in kinds for row in answers[_name(shape)]["rows"]]
    return labels, table_of(Device.from_json(machine), rows, params.sampling(rotate_bytes=params.rotate))


def _choose(
    context: Context, params: LatencyParams, labels: Mapping[tuple[Shape, str], str], table: LatencyTable
) -> dict[tuple[Shape, str], Choice]:
    from layerwise.kernels.dispatch import Dispatcher

    dispatcher = Dispatcher(table, exact=params.exact)
    rows, dtype = params.batch * params.tokens, context.model.dtype
    return {(shape, name): dispatcher.choose(label, *shape, rows, dtype) for (shape, name), label in labels.items()}


def _measure_wholes(
    context: Context, params: LatencyParams, machine: Mapping[str, Any], fastest: Mapping[str, str]
) -> dict[str, Any]:
    """The forward passes of two models, in turns: all units at their fastest level, and all dense."""
    whole = ForwardPass(context.model, params.device, params.batch, params.tokens, params.whole_sampling())
    work = partial(time_packed, whole, context.input("database"), fastest, context.out / TABLE, params.exact)
    ((_, timed),) = one_by_one(context, {"whole models": work}, machine, note="whole models")
    return {"fastest": timed["packed"], "dense": timed["dense"]}


def _kinds(index: DatabaseIndex) -> dict[Shape, dict[str, tuple[str, str]]]:
    """For each shape, every kind of level with an example: unit and level."""
    found: dict[Shape, dict[str, tuple[str, str]]] = {}
    for unit in index.units:
        examples = found.setdefault(unit.shape, {})
        for level in unit.levels:
            if is_timed(unit, level):
                examples.setdefault(of_level(unit, level)[1], (unit.name, level.name))
    return {shape: examples for shape, examples in found.items() if examples}


def _name(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"


def _copies(shape: Shape, total: int) -> int:
    """As many copies of a weight as the model has weights for: so much passes before a layer's turn comes again."""
    return max(1, min(256, round(total / math.prod(shape))))


def _race(
    examples: Sequence[tuple[str, str]],
    *,
    database: Path,
    model: ModelSource,
    rows: int,
    device: str,
    sampling: Sampling,
) -> dict[str, Any]:
    """Time all that can run levels of one shape; gives the label of each example, and the rows of a table."""
    import torch

    from layerwise.kernels.backends import Work
    from layerwise.kernels.measure import races, run_race
    from layerwise.stages.apply.packed import pack_or_dense
    from layerwise.stages.levels.database import Database

    levels = Database(database, model)
    weights = [pack_or_dense(levels.level(unit, level)) for unit, level in examples]
    work = Work(rows, getattr(torch, model.dtype), torch.device(device))
    (race,) = races(weights, [rows], work.dtype, work.device)
    return {"labels": [weight.label for weight in weights], "rows": [asdict(row) for row in run_race(race, sampling)]}


def _write(
    context: Context,
    params: LatencyParams,
    index: DatabaseIndex,
    table: LatencyTable,
    choices: Mapping[tuple[Shape, str], Choice],
    measured: Mapping[str, Mapping[str, Any]],
) -> None:
    rest = fit_rest(index.units, choices, measured["dense"]["median_ms"], measured["fastest"]["median_ms"])
    charged = charge(choices, rest)

    def time_of(unit: UnitEntry, level: LevelEntry) -> float | None:
        if is_timed(unit, level):
            return charged[of_level(unit, level)]
        return 0.0 if level.usable and not unit.unit.replaceable and not narrows(level) else None

    document = {
        "database": index.digest,
        "machine": table.device.as_json(),
        "batch": params.batch,
        "tokens": params.tokens,
        "device": params.device,
        "dtype": context.model.dtype,
        "exact": params.exact,
        "units": [unit.name for unit in index.units],
        "shapes": [list(unit.shape) for unit in index.units],
        "levels": [[level.name for level in unit.levels] for unit in index.units],
        "ms": [[time_of(unit, level) for level in unit.levels] for unit in index.units],
        "rest_ms": rest.ms,
        "rest_ms_per_byte": rest.ms_per_byte,
        "wholes": dict(measured),
        "lines": _lines(table),
    }
    (context.out / "latency.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    about = {"m": params.batch * params.tokens, "dtype": context.model.dtype}
    about |= {"device": table.device.name, "fingerprint": table.device.digest}
    records: list[Row] = [
        {**about, **_row(unit, level, choices, charged)} for unit in index.units for level in unit.levels
    ]
    context.record("latency", [*records, {**about, "ms": rest.ms, "status": "fitted"}])


def _lines(table: LatencyTable) -> list[dict[str, Any]]:
    """t0 + bytes / bandwidth of each backend and label, and the error on shapes that a fit has not seen."""
    from layerwise.kernels.dispatch import Dispatcher

    return [
        {"backend": backend, "label": label, "m": m, "dtype": dtype, "t0_ms": line.t0_ms, "shapes": line.shapes}
        | {"gigabytes_per_second": _finite(line.gigabytes_per_second)}
        | {"error": _finite(line.error), "worst": _finite(line.worst)}
        for (backend, label, m, dtype), line in Dispatcher(table).lines().items()
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _row(
    unit: UnitEntry,
    level: LevelEntry,
    choices: Mapping[tuple[Shape, str], Choice],
    charged: Mapping[tuple[Shape, str], float],
) -> Row:
    n, k = unit.shape
    names = {"unit": unit.name, "level": level.name, "n": n, "k": k}
    if not level.usable:
        return names | {"status": level.status}
    if not is_timed(unit, level):
        return names | {
            "status": "not_offered" if unit.unit.replaceable else "not_timed" if narrows(level) else "in_rest"
        }
    key = of_level(unit, level)
    row = choices[key].row
    known = {"label": row.label, "backend": row.backend, "ms": charged[key], "status": row.status}
    return names | known | _times(asdict(row))


def _times(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured, in the columns of the store."""
    columns = {"milliseconds": "median_ms", "p10": "p10_ms", "p90": "p90_ms", "mad": "mad_ms"}
    same = {name: measured[name] for name in ("samples", "quality")}
    return {column: measured[name] for column, name in columns.items()} | same


STAGE = Stage(
    "latency",
    LatencyParams,
    latency,
    gives="latency",
    takes={"database": Port("database")},
    measures=fingerprint,
    on_gpu=lambda params: params.device == "cuda",
)
