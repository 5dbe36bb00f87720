"""The tables of the results store and their columns.

The tables are literals of type names, so that columns can be checked and documented without pyarrow (which costs half a
second to import); `arrow_schema` makes pyarrow's own object of one. With a higher `SCHEMA_VERSION` columns are added,
nullable, or left out; none gets another meaning, and a type only a wider one. So every layerwise reads every file: a
column that is not there yet is NULL, one that it does not know is passed over.

A number that could not be measured is NULL with a `status` that says why, never NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerwise.results.resources import columns, level_columns

SCHEMA_VERSION = 4

COMMON: Mapping[str, str] = {
    "run_id": "string",  # the run that computed the row; other runs find it through `stage_key`
    "stage": "string",
    "stage_key": "string",
    "attempt": "int16",  # how many times the run had been started, from 1
    "seq": "int64",  # position of the row among those of its run (`runs`, `stages`) or of its stage (the others)
    "written_at": "timestamp",
    "schema_version": "int16",
}
"""Columns that every table starts with; the store fills them in."""

TABLES: Mapping[str, Mapping[str, str]] = {
    "runs": {  # several rows per run, of which the latest holds
        "name": "string",
        "status": "string",  # running, ok, failed, stopped
        "workflow_sha256": "string",
        "resolved": "string",  # the workflow with all defaults, as JSON
        "layerwise_version": "string",
        "argv": "list<string>",
        "executor": "string",
        "started_at": "timestamp",
        "ended_at": "timestamp",
        "seconds": "float64",
        "error_type": "string",
        "error": "string",
    },
    "stages": {  # several rows per stage of a run, of which the latest holds
        "uses": "string",
        "cache": "string",  # hit, partial, miss
        "reason": "string",
        "status": "string",
        "items_total": "int32",
        "items_cached": "int32",
        "output_digest": "string",
        "seconds": "float64",
        "peak_rss_bytes": "int64",
        "error_type": "string",
        "error": "string",
    },
    "units": {
        "unit": "string",
        "kind": "string",
        "block": "int16",
        "shape": "list<int32>",  # (out, in)
        "n_weights": "int64",
        "group": "string",  # units of one group share their level
        "role": "string",  # linear, conv, parameter, expert, head, embedding
        "parent": "string",  # the half-block or block that it is in
        "status": "string",  # ok, not selected, no unit (a weight that can have no level)
        "error": "string",
    },
    "levels": {
        "unit": "string",
        "level": "string",
        "method": "string",
        "recipe": "string",  # JSON: everything that it takes to make it again
        "offered": "bool",  # whether a search may choose it
        **level_columns(),  # its share of each resource
        "weight_nmse": "float64",
        "output_error": "float64",
        "status": "string",  # ok, fallback (made by another method), nan (could not be made)
        "error": "string",
    },
    "profile": {
        "unit": "string",
        "level": "string",
        "metric": "string",
        "value": "float64",
        "stderr": "float64",
        "n_tokens": "int64",
        "status": "string",  # ok, nan, not_offered (no choice of its own: not measured)
    },
    "latency": {
        "unit": "string",  # NULL for the rest of the model: everything that is no unit
        "level": "string",
        "label": "string",  # what it was timed as: format, bits, group
        "n": "int32",
        "k": "int32",
        "m": "int64",  # tokens that run at a time
        "dtype": "string",  # of the activations
        "backend": "string",  # the fastest that was measured, which is what would run
        "ms": "float64",  # what allocations are charged; where noise hides a difference, the mean of the tied levels
        "milliseconds": "float64",  # the measured median
        "p10": "float64",
        "p90": "float64",
        "mad": "float64",
        "samples": "int32",
        "device": "string",
        "fingerprint": "string",
        "quality": "float64",  # on a CPU: process time over wall time while it was measured
        # measured, no_kernel (timed as the dense weight), fitted (the rest), in_rest (no linear layer: it runs decoded,
        # or not at all), not_offered, not_timed (a narrower half-block), nan (no such level)
        "status": "string",
    },
    "candidates": {
        "candidate": "string",
        "solver": "string",
        "budget": "string",  # bits=3
        "generation": "int32",
        "round": "int16",
        "draw": "int64",
        "genome": "list<int16>",
        "n_tokens": "int64",
        "metric": "string",
        "fitness": "float64",
        "status": "string",
        "error": "string",
        **columns(),  # of the whole model
    },
    "allocations": {
        "candidate": "string",
        "solver": "string",
        "budget": "string",
        "seed": "int64",
        "genome": "list<int16>",
        "units": "list<string>",
        "levels": "list<string>",  # the chosen level of each of `units`
        "predicted_loss": "float64",
        "metric": "string",  # what `kl` is the value of
        "kl": "float64",  # on the search data
        "perplexity": "float64",
        "lower_bound": "float64",
        "gap": "float64",
        "solver_status": "string",
        "evaluations": "int64",
        "tokens": "int64",  # evaluated by the search itself, the profile's not counted
        "profile_tokens": "int64",
        "seconds": "float64",
        "finalists": "int64",  # how many of this budget were compared after a repair
        "ranks_changed": "int64",  # how many of them have another rank after it than before
        "unrepaired_kl": "float64",  # of the finalist that is best without a repair, and its bytes
        "unrepaired_bytes": "int64",
        "repair": "string",  # NULL where there was none, or nothing that it fits
        "recovered_kl": "float64",
        "recovered_bytes": "int64",  # with what the repair adds
        "recovered_effective_bits": "float64",
        **columns(),  # of the whole model
    },
    "recovery": {
        "candidate": "string",  # the finalist of an `allocate` stage that was repaired; NULL in a `recover` stage
        "repair": "string",  # the method and what tells it from others: eora-r8
        "unit": "string",  # NULL for all that the repair is made of, together
        "step": "int64",  # of training; of a repair without, 0 before and 1 after
        "metric": "string",  # weight_nmse, output_error, bytes, effective_bits; of training loss, heldout_loss
        "value": "float64",
        "n_tokens": "int64",
        "status": "string",  # ok, left (the method does not fit the level, `error` says why), nan
        "error": "string",
    },
    "metrics": {
        "candidate": "string",  # an allocation's candidate, or `dense`
        "source": "string",  # the stage that the evaluated model came from
        "data": "string",
        "metric": "string",
        "value": "float64",
        "stderr": "float64",
        "n_tokens": "int64",
        "status": "string",
    },
}
"""Every table's own columns with their types."""

RUN_TABLES = frozenset({"runs", "stages"})
"""Tables whose rows tell about one start of a run. Those of the others are what a stage computed, in whichever run."""


def columns_of(table: str) -> dict[str, str]:
    """All columns of a table with their type names, the common ones first."""
    return {**COMMON, **TABLES[table]}


def arrow_schema(table: str) -> Any:
    """The `pyarrow.Schema` of a table; its metadata carries `SCHEMA_VERSION`."""
    import pyarrow as pa

    types = {
        "string": pa.string(),
        "bool": pa.bool_(),
        "int16": pa.int16(),
        "int32": pa.int32(),
        "int64": pa.int64(),
        "float32": pa.float32(),
        "float64": pa.float64(),
        "timestamp": pa.timestamp("us", tz="UTC"),
        "list<string>": pa.list_(pa.string()),
        "list<int16>": pa.list_(pa.int16()),
        "list<int32>": pa.list_(pa.int32()),
    }
    fields = [pa.field(name, types[kind]) for name, kind in columns_of(table).items()]
    return pa.schema(fields, metadata={"layerwise_schema_version": str(SCHEMA_VERSION)})
