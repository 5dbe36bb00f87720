"""`speed`: whether times add up: the measured forward pass of whole packed models beside the predicted one.

An allocation's milliseconds are a sum, of its units' times and the rest's. Here each chosen allocation is made into a
model on packed weights, with the very kernels that the table of times chooses, and timed as a whole. A prediction that
is off by more than `tolerance` is not dropped and not corrected: its status in the `metrics` table says so.

On a shared machine the machine itself may be the reason. So each model is timed in turns with one that the `latency`
stage timed too, all units dense; `drift` is what that takes by now over what it took then. Where the prediction would
have held at the speed of then, the status is `drifted`, else `off`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import Field

from layerwise.errors import UsageError
from layerwise.stages.allocate.allocation import Allocation, check_database, load_allocations
from layerwise.stages.allocate.costs import CostTable, load_times
from layerwise.stages.apply.pick import misfit, pick
from layerwise.stages.contract import Context, Port, Row, Stage
from layerwise.stages.latency.forward_pass import ForwardPass, time_loaded, time_packed
from layerwise.stages.latency.machine import TABLE, MeasureParams, fingerprint, one_by_one
from layerwise.stages.levels.database import DatabaseIndex

DENSE = "dense"
"""The dense model as transformers loads it, among the candidates."""


class SpeedParams(MeasureParams):
    """Which allocations to time, and how much."""

    pick: list[str] | None = Field(
        None, min_length=1, description="as of `apply`, one or more: knee, best, smallest, a budget, a candidate; all "
        "allocations if left out"
    )  # fmt: skip
    tolerance: float = Field(
        0.10, gt=0, description="|predicted - measured| / measured above which a prediction is not `ok`"
    )


def speed(context: Context, params: SpeedParams) -> None:
    """Write `speed.json`: for each allocation, and the dense model, what was measured and what was predicted.

    Raises:
        UsageError: allocations or latencies of another database, or of another device.
        NoisyMeasurement: times scatter too much; what was measured before is kept.
        DeviceChanged: the table of times comes from another machine.
    """
    from layerwise.kernels.device import Device, require_same

    index, folder = DatabaseIndex(context.input("database")), context.input("latency")
    table = CostTable(index, load_times(folder, index))
    timed = json.loads((folder / "latency.json").read_text(encoding="utf-8"))
    machine = fingerprint(params)
    require_same(Device.from_json(timed["machine"]), Device.from_json(machine), "the table of the latency stage")
    chosen = _chosen(context, params, index)
    check_timed(chosen, index)
    work = ForwardPass(context.model, params.device, timed["batch"], timed["tokens"], params.whole_sampling())
    items: dict[str, Any] = {DENSE: partial(time_loaded, work)}
    for allocation in chosen:
        items[allocation.candidate] = partial(
            time_packed,
            work,
            context.input("database"),
            allocation.levels,
            folder / TABLE,
            timed["exact"],
        )
    answers = dict(one_by_one(context, items, machine, note="models"))
    predicted = {allocation.candidate: table.describe(allocation.genome)["ms"] for allocation in chosen}
    then = timed["wholes"]["dense"]["median_ms"]
    found = {DENSE: {**answers.pop(DENSE), "predicted_ms": None, "error": None, "drift": None, "status": "ok"}}
    for name, timed_now in answers.items():
        found[name] = _compare(timed_now["packed"], timed_now["dense"], predicted[name], then, params.tolerance)
    (context.out / "speed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    tokens = timed["batch"] * timed["tokens"]
    context.record("metrics", [row for name in found for row in _rows(name, found[name], tokens)])


def _chosen(context: Context, params: SpeedParams, index: DatabaseIndex) -> list[Allocation]:
    """The allocations to time, each candidate once."""
    allocations = [allocation for folder in context.inputs["allocations"] for allocation in load_allocations(folder)]
    check_database(allocations, index)
    picked = allocations if params.pick is None else [pick(allocations, how) for how in params.pick]
    return list({allocation.candidate: allocation for allocation in picked}.values())


def check_timed(chosen: Sequence[Allocation], index: DatabaseIndex) -> None:
    """Refuse what would run at full size here, and was not timed."""
    for allocation in chosen:
        narrow = [unit for unit, level in allocation.levels.items() if index.inside(unit, level)]
        if narrow:
            raise UsageError(
                f"allocation {allocation.candidate} has narrower half-blocks, which only a dense export makes smaller; "
                f"the first is {narrow[0]}",
                hint="`apply` and `export` it, and time the model in that folder; or `pick` others here",
            )


def _compare(
    packed: Mapping[str, Any], dense: Mapping[str, Any], predicted: float, dense_then: float, tolerance: float
) -> dict[str, Any]:
    error = predicted / packed["median_ms"] - 1
    drift = dense["median_ms"] / dense_then
    held = abs(predicted * drift / packed["median_ms"] - 1) <= tolerance
    status = "ok" if abs(error) <= tolerance else "drifted" if held else "off"
    about = {"predicted_ms": predicted, "error": error, "drift": drift, "status": status}
    return {**packed, "dense": dict(dense), **about}


METRICS = {
    "latency_ms": "median_ms",
    "predicted_latency_ms": "predicted_ms",
    "latency_error": "error",
    "latency_drift": "drift",
}
"""Metrics of the results store, and where `speed.json` has them. Only the second and the third can be off."""


def _rows(candidate: str, found: Mapping[str, Any], tokens: int) -> list[Row]:
    return [
        {
            "candidate": candidate,
            "metric": metric,
            "value": found[name],
            "n_tokens": tokens,
            "status": found["status"] if metric in ("predicted_latency_ms", "latency_error") else "ok",
        }
        for metric, name in METRICS.items()
        if found[name] is not None
    ]


def mistakes(params: SpeedParams, feeding: Mapping[str, Sequence[Any]]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What can be seen to be wrong before anything runs."""
    for timed in feeding.get("latency", ()):
        if timed.device != params.device:
            yield ("device",), f"the latency stage measures {timed.device}, so this one must too"
    for place, how in enumerate(params.pick or ()):
        wrong = misfit(how, feeding.get("allocations", ()))
        if wrong is not None:
            yield ("pick", place), wrong


STAGE = Stage(
    "speed",
    SpeedParams,
    speed,
    gives="speed",
    takes={
        "allocations": Port("allocations", many=True),
        "database": Port("database"),
        "latency": Port("latency"),
    },
    check=mistakes,
    measures=fingerprint,
    on_gpu=lambda params: params.device == "cuda",
)
