"""A run is known by its latest rows, and an allocation by the start of its id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from layerwise.errors import UsageError
from layerwise.results.runs import find_run, latest_stages, runs_table, show_allocation
from layerwise.results.store import Store


def test_runs_are_listed_newest_first_as_they_stand_now(two_runs: Store) -> None:
    frame = runs_table(two_runs)
    assert frame["run"].tolist() == ["run-b", "run-a"]
    assert frame["status"].tolist() == ["ok", "ok"]
    assert frame["seconds"].tolist() == [2.5, 2.5]


def test_a_resumed_run_is_the_newest_and_shows_its_second_attempt(two_runs: Store) -> None:
    two_runs.append("runs", [{"status": "failed", "error": "boom"}], run_id="run-a", attempt=2, first_seq=0)
    frame = runs_table(two_runs)
    assert frame[["run", "status", "error"]].values.tolist()[0] == ["run-a", "failed", "boom"]


def test_an_empty_store_has_no_runs(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    assert runs_table(store).empty
    with pytest.raises(UsageError, match="no run yet"):
        find_run(store)


def test_a_run_is_found_by_the_start_of_its_id_and_by_default_the_newest(two_runs: Store) -> None:
    assert find_run(two_runs) == "run-b"
    assert find_run(two_runs, "run-a") == "run-a"
    two_runs.append("runs", [{"status": "ok"}], run_id="run-ab", attempt=1, first_seq=0)
    assert find_run(two_runs, "run-a") == "run-a"
    with pytest.raises(UsageError, match="ambiguous: run-ab, run-b, run-a"):
        find_run(two_runs, "run-")
    with pytest.raises(UsageError, match="no run 'x'"):
        find_run(two_runs, "x")


def test_the_latest_row_of_a_stage_holds(two_runs: Store) -> None:
    two_runs.append("stages", [{"uses": "allocate", "status": "failed"}], run_id="run-a", stage="search",
                    stage_key="new", attempt=2, first_seq=0)  # fmt: skip
    stages = latest_stages(two_runs, "run-a")
    assert (stages["search"]["stage_key"], stages["search"]["status"]) == ("new", "failed")
    assert stages["ilp"]["status"] == "ok"


def test_an_allocation_is_shown_unit_by_unit(two_runs: Store) -> None:
    details = show_allocation(two_runs, "aab")
    assert details.summary["candidate"] == "aab222"
    assert (details.summary["run"], details.summary["stage"], details.summary["bits"]) == ("run-a", "search", 3.0)
    assert details.units[["unit", "level", "bits", "weight_nmse"]].values.tolist() == [
        ["q", "gptq-4b", 4.0, 4.0**-4],
        ["k", "gptq-2b", 2.0, 4.0**-2],
    ]
    assert (details.summary["parameters"], details.summary["flops"]) == (300, 150.0)
    assert details.metrics.empty


def test_a_dropped_part_is_shown_as_what_it_is(two_runs: Store) -> None:
    """A parent has a row in `levels` without bits of its own; units inside it are not in the allocation."""
    at = {"run_id": "run-a", "stage": "compress", "stage_key": "c" * 64, "attempt": 1}
    parts = [
        {"unit": "attn", "level": level, "method": level, "bits": 0.0, "size_bytes": size, "status": "ok"}
        for level, size in (("keep", 128), ("drop", 0))
    ]
    two_runs.append("levels", parts, **at, first_seq=4)
    chosen = {"candidate": "eee555", "solver": "ilp", "units": ["attn", "k"], "levels": ["drop", "gptq-2b"]}
    where = {"run_id": "run-a", "stage": "ilp", "stage_key": "i" * 64, "attempt": 1, "first_seq": 1}
    two_runs.append("allocations", [chosen], **where)
    units = show_allocation(two_runs, "eee").units
    assert units[["unit", "level", "bits"]].values.tolist() == [["attn", "drop", 0.0], ["k", "gptq-2b", 2.0]]
    assert units["size_bytes"].tolist()[0] == 0


def test_a_level_name_that_means_two_things_shows_no_numbers(two_runs: Store) -> None:
    at = {"run_id": "run-a", "stage": "other", "stage_key": "o" * 64, "attempt": 1, "first_seq": 9}
    two_runs.append("stages", [{"uses": "compress", "status": "ok"}], **at)
    two_runs.append("levels", [{"unit": "q", "level": "gptq-4b", "bits": 4, "weight_nmse": 0.5, "status": "ok"}], **at)
    units = show_allocation(two_runs, "aab222").units
    assert units["level"].tolist() == ["gptq-4b", "gptq-2b"]
    assert np.isnan(units["weight_nmse"].tolist()[0])
    assert units["weight_nmse"].tolist()[1] == 4.0**-2


def test_what_was_measured_of_an_allocation_is_shown(two_runs: Store) -> None:
    row = {"candidate": "aab222", "source": "best", "data": "held", "metric": "kl", "value": 0.25, "status": "ok"}
    at = {"run_id": "run-b", "stage": "evaluate", "stage_key": "e" * 64, "attempt": 1, "first_seq": 0}
    two_runs.append("metrics", [row, {**row, "candidate": "dense"}], **at)
    metrics = show_allocation(two_runs, "aab222").metrics
    assert metrics[["run", "source", "metric", "value"]].values.tolist() == [["run-b", "best", "kl", 0.25]]


def test_an_allocation_id_that_is_unknown_or_not_unique_is_refused(two_runs: Store) -> None:
    with pytest.raises(UsageError, match="ambiguous: aaa111, aab222"):
        show_allocation(two_runs, "aa")
    with pytest.raises(UsageError, match="no allocation 'zzz'"):
        show_allocation(two_runs, "zzz")


def test_an_allocation_without_level_names_has_an_empty_unit_table(two_runs: Store) -> None:
    units = show_allocation(two_runs, "ddd").units
    assert units.empty
    assert units.columns[:2].tolist() == ["unit", "level"]
