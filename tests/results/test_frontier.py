"""A run's allocations are found whoever computed them, and ranked by figures that belong together."""

from __future__ import annotations

import math

import pytest

from layerwise.errors import UsageError
from layerwise.results.frontier import COLUMNS, dense_losses, frontier_table
from layerwise.results.store import Store


def rows(store: Store, *columns: str, **how: object) -> list[list[object]]:
    return frontier_table(store, **how)[list(columns)].values.tolist()


def evaluated(store: Store, *measurements: tuple[str, str, str, float], data: str = "held", first_seq: int = 0) -> None:
    records = [
        {"candidate": c, "source": s, "metric": m, "value": v, "data": data, "status": "ok"}
        for c, s, m, v in measurements
    ]
    at = {"run_id": "run-b", "stage": "evaluate", "stage_key": "e" * 64, "attempt": 1, "first_seq": first_seq}
    store.append("metrics", records, **at)


ALL = (("aaa111", "find", "kl", 1.0), ("aab222", "find", "kl", 0.3), ("ccc333", "find", "kl", 0.1),
       ("ddd444", "ilp", "kl", 0.2))  # fmt: skip


def test_without_an_evaluation_the_front_is_over_the_search_loss(two_runs: Store) -> None:
    frame = frontier_table(two_runs, "run-a")
    assert list(frame.columns) == COLUMNS
    assert frame[["candidate", "bits", "kl", "ranked_by", "stage"]].values.tolist() == [
        ["aaa111", 2.0, 0.9, "kl", "search"],
        ["aab222", 3.0, 0.2, "kl", "search"],
        ["ccc333", 4.0, 0.1, "kl", "search"],
    ]
    assert frame["knee"].tolist() == [False, True, False]
    assert frame[["heldout_kl", "heldout_perplexity", "heldout_data"]].isna().all(axis=None)
    with pytest.raises(UsageError, match="no allocation of this run has heldout_kl"):
        frontier_table(two_runs, "run-a", loss="heldout_kl")


def test_a_front_over_milliseconds_has_the_allocations_that_were_timed(two_runs: Store) -> None:
    with pytest.raises(UsageError, match="run run-a has no milliseconds") as caught:
        frontier_table(two_runs, "run-a", over="ms")
    assert "add a `latency` stage" in str(caught.value.hint)
    timed = [
        {"candidate": "eee555", "solver": "ilp", "bits": 4.0, "kl": 0.3, "ms": 2.0},
        {"candidate": "fff666", "solver": "ilp", "bits": 3.0, "kl": 0.1, "ms": 3.0},
        {"candidate": "fff777", "solver": "ilp", "bits": 2.0, "kl": 0.2, "ms": 4.0},
    ]
    at = {"run_id": "run-a", "stage": "ilp", "stage_key": "i" * 64, "attempt": 1, "first_seq": 1}
    two_runs.append("allocations", timed, **at)
    frame = frontier_table(two_runs, "run-a", over="ms", dominated=True)
    assert frame.loc[frame["on_front"], ["candidate", "ms"]].values.tolist() == [["eee555", 2.0], ["fff666", 3.0]]
    assert frame.loc[frame["ms"].isna(), "on_front"].tolist() == [False] * 4


def test_a_front_over_parameters_is_another_one_than_that_over_flops(two_runs: Store) -> None:
    """A dropped half-block saves more operations, pruned weights more parameters."""
    sized = [
        {"candidate": "eee555", "solver": "ilp", "bits": 9.0, "kl": 0.05, "parameters": 90, "flops": 300.0},
        {"candidate": "fff666", "solver": "ilp", "bits": 9.0, "kl": 0.04, "parameters": 120, "flops": 90.0},
    ]
    at = {"run_id": "run-a", "stage": "ilp", "stage_key": "i" * 64, "attempt": 1, "first_seq": 1}
    two_runs.append("allocations", sized, **at)
    by_parameters = frontier_table(two_runs, "run-a", over="parameters")
    assert by_parameters[["candidate", "parameters"]].values.tolist() == [["eee555", 90], ["fff666", 120]]
    assert str(by_parameters["parameters"].dtype) == "Int64"
    assert rows(two_runs, "candidate", "flops", run="run-a", over="flops") == [["fff666", 90.0]]


def test_a_cost_that_is_not_there_says_what_to_do_about_it(two_runs: Store) -> None:
    with pytest.raises(UsageError, match="there is no cost 'flop'") as unknown:
        frontier_table(two_runs, over="flop")
    assert "flops" in str(unknown.value.hint)
    old = {"candidate": "eee555", "solver": "old", "bits": 3.0, "kl": 0.1}
    at = {"run_id": "run-a", "stage": "ilp", "stage_key": "i" * 64, "attempt": 1, "first_seq": 1}
    two_runs.append("allocations", [old], **at)
    with pytest.raises(UsageError, match="run run-a has no flops") as lacking:
        frontier_table(two_runs, "run-a", over="flops", solver="old")
    assert "earlier layerwise" in str(lacking.value.hint)


def test_a_run_that_hit_the_cache_shows_the_rows_under_its_own_names(two_runs: Store) -> None:
    assert rows(two_runs, "run", "stage", "candidate", dominated=True) == [
        ["run-b", "find", "aaa111"],
        ["run-b", "find", "aab222"],
        ["run-b", "ilp", "ddd444"],
        ["run-b", "find", "ccc333"],
    ]


def test_held_out_figures_rank_the_front_once_every_allocation_has_them(two_runs: Store) -> None:
    evaluated(two_runs, *ALL[:3])
    assert rows(two_runs, "ranked_by") == [["kl"]] * 3
    evaluated(two_runs, ALL[3], first_seq=3)
    assert rows(two_runs, "candidate", "heldout_kl", "ranked_by") == [
        ["aaa111", 1.0, "heldout_kl"],
        ["ddd444", 0.2, "heldout_kl"],
        ["ccc333", 0.1, "heldout_kl"],
    ]


def test_a_loss_asked_for_by_name_leaves_out_what_has_none(two_runs: Store) -> None:
    evaluated(two_runs, ("aab222", "find", "perplexity", 8.0), ("ccc333", "find", "perplexity", 9.0))
    assert rows(two_runs, "candidate", loss="heldout_perplexity") == [["aab222"]]
    found = rows(two_runs, "candidate", "on_front", loss="heldout_perplexity", dominated=True)
    assert found == [["aaa111", False], ["aab222", True], ["ddd444", False], ["ccc333", False]]


def test_figures_of_an_applied_allocation_count_and_those_of_a_repaired_one_do_not(two_runs: Store) -> None:
    evaluated(two_runs, ("aab222", "repaired", "kl", 0.01), ("aab222", "best", "kl", 0.3))
    evaluated(two_runs, ("ccc333", "repaired", "kl", 0.005), first_seq=2)
    assert rows(two_runs, "heldout_kl", loss="heldout_kl") == [[0.3]]


def test_the_same_id_from_two_searches_keeps_its_own_figure(two_runs: Store) -> None:
    at = {"run_id": "run-a", "stage": "ilp", "stage_key": "i" * 64, "attempt": 1, "first_seq": 1}
    two_runs.append("allocations", [{"candidate": "aab222", "solver": "ilp", "bits": 3.0, "kl": 0.2}], **at)
    evaluated(two_runs, ("aab222", "find", "kl", 0.3), ("aab222", "ilp", "kl", 0.7))
    found = rows(two_runs, "stage", "heldout_kl", loss="heldout_kl", dominated=True)
    assert ["find", 0.3] in found
    assert ["ilp", 0.7] in found


def test_figures_on_two_texts_are_not_mixed(two_runs: Store) -> None:
    evaluated(two_runs, *ALL)
    evaluated(two_runs, ("aaa111", "find", "kl", 5.0), ("dense", "find", "perplexity", 7.0), data="other", first_seq=4)
    evaluated(two_runs, ("dense", "find", "perplexity", 6.0), first_seq=6)
    assert rows(two_runs, "heldout_kl", "heldout_data")[0] == [1.0, "held"]
    assert rows(two_runs, "heldout_kl", "heldout_data", data="other", loss="heldout_kl") == [[5.0, "other"]]
    assert dense_losses(two_runs) == {"heldout_perplexity": 6.0}
    assert dense_losses(two_runs, data="other") == {"heldout_perplexity": 7.0}
    assert dense_losses(two_runs, "run-a") == {}


def test_a_measurement_that_failed_is_no_figure(two_runs: Store) -> None:
    at = {"run_id": "run-b", "stage": "evaluate", "stage_key": "e" * 64, "attempt": 1, "first_seq": 9}
    failed = {"candidate": "aab222", "source": "find", "metric": "kl", "data": "held", "value": math.nan}
    two_runs.append("metrics", [{**failed, "status": "nan"}], **at)
    evaluated(two_runs, ("aaa111", "find", "kl", 1.0))
    assert rows(two_runs, "candidate", loss="heldout_kl") == [["aaa111"]]


@pytest.mark.parametrize("over", ["bits", "effective_bits", "bytes", "parameters", "flops"])
def test_the_front_can_be_over_any_cost(two_runs: Store, over: str) -> None:
    frame = frontier_table(two_runs, over=over)
    assert frame["candidate"].tolist() == ["aaa111", "aab222", "ccc333"]
    assert frame[over].is_monotonic_increasing


def test_a_stage_or_a_solver_alone_has_its_own_front(two_runs: Store) -> None:
    assert rows(two_runs, "candidate", solver="ilp") == [["ddd444"]]
    assert rows(two_runs, "candidate", stage="ilp") == [["ddd444"]]
    with pytest.raises(UsageError, match="run run-b has no candidates of solver 'nobody'") as none:
        frontier_table(two_runs, solver="nobody")
    assert none.value.hint == "it has evolve, ilp"
    with pytest.raises(UsageError, match="stage compress of run run-b has no candidates"):
        frontier_table(two_runs, stage="compress")
    with pytest.raises(UsageError, match="no stage 'search'") as caught:
        frontier_table(two_runs, stage="search")
    assert "find" in str(caught.value.hint)


def test_a_run_without_candidates_says_which_stage_kept_them_from_it(two_runs: Store) -> None:
    for seq, status in enumerate(("running", "failed")):
        two_runs.append("runs", [{"name": "demo", "status": status}], run_id="run-c", attempt=1, first_seq=seq)
    with pytest.raises(UsageError, match=r"run run-c has no candidates yet\n"):
        frontier_table(two_runs, "run-c", over="ms")
    failed = {"uses": "compress", "cache": "miss", "status": "failed"}
    two_runs.append("stages", [failed], run_id="run-c", stage="levels", stage_key="f" * 64, attempt=1, first_seq=0)
    with pytest.raises(UsageError, match="run run-c has no candidates yet: stage levels failed") as caught:
        frontier_table(two_runs, "run-c", over="ms")
    assert caught.value.hint == f"see how it stands: layerwise status run-c --results {two_runs.root}"
