"""Costs, budgets and ids of allocations: counted by hand on tiny databases, and on real models by other means."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from layerwise.errors import InfeasibleBudget, LayerwiseError, NotFinite, UsageError
from layerwise.solvers import SOLVERS, branch
from layerwise.stages.allocate.costs import CostTable, Times, budget_text, load_times
from layerwise.stages.levels.database import DatabaseIndex, LevelEntry, UnitEntry, write_index
from layerwise.stages.models.network import Unit

REST = {"bytes": 1000, "parameters": 250, "flops": 70.0}


def level(name: str, bits: float, effective: float, size: int, kept: int = 0, **more: Any) -> LevelEntry:
    """A level of so many bits altogether, so many bytes, and so many weights that are kept."""
    costs = {"bits": bits, "effective_bits": effective, "bytes": size, "parameters": kept, "flops": 2.0 * kept}
    return LevelEntry(name, {"encoding": "grid"}, costs, **more)


def broken(name: str) -> LevelEntry:
    return LevelEntry(name, None, None, status="nan", error="a weight is NaN")


def unit(
    name: str, shape: tuple[int, int], *levels: LevelEntry, group: str | None = "0.qk", parent: str | None = None
) -> UnitEntry:
    return UnitEntry(Unit(name, name, "linear", 0, shape, (0,), group=group, parent=parent), None, levels)


def parent(name: str, role: Any, own: int, above: str | None = None, *, may_drop: bool = True) -> UnitEntry:
    """A parent with so many bytes and weights of its own."""
    keep = LevelEntry("keep", {"encoding": "keep"}, {**dict.fromkeys(("bits", "effective_bits"), 0), "bytes": 4 * own,
                                                     "parameters": own, "flops": 0.0})  # fmt: skip
    nothing = dict.fromkeys(("bits", "effective_bits", "bytes", "parameters", "flops"), 0)
    levels = (keep, LevelEntry("drop", {"encoding": "drop"}, nothing)) if may_drop else (keep,)
    return UnitEntry(Unit(name, name, role, 0, (0, 0), (0,), parent=above), None, levels)


def database(folder: Path, *units: UnitEntry, halves: Mapping[str, list[str]] | None = None) -> DatabaseIndex:
    folder.mkdir(exist_ok=True)
    write_index(folder, units, REST, halves=halves)
    return DatabaseIndex(folder)


@pytest.fixture
def two_units(tmp_path: Path) -> CostTable:
    """q has 100 weights and three levels, k has 300 and only the first and the third."""
    q = unit(
        "q", (10, 10), level("2b", 200, 250, 32, 100), level("4b", 400, 450, 57, 50), level("8b", 800, 825, 104, 100)
    )
    k = unit("k", (10, 30), level("2b", 600, 750, 94, 300), broken("4b"), level("8b", 2400, 2550, 319, 300))
    return CostTable(database(tmp_path / "two", q, k))


def test_costs_are_absolute_and_a_level_that_was_not_made_costs_infinity(two_units: CostTable) -> None:
    inf = np.inf
    assert {name: table.tolist() for name, table in two_units.costs.items()} == {
        "bits": [[200, 400, 800], [600, inf, 2400]],
        "effective_bits": [[250, 450, 825], [750, inf, 2550]],
        "bytes": [[32, 57, 104], [94, inf, 319]],
        "parameters": [[100, 50, 100], [300, inf, 300]],
        "flops": [[200, 100, 200], [600, inf, 600]],
    }


def test_sizes_are_said_as_people_read_them(two_units: CostTable) -> None:
    assert two_units.describe([1, 0]) == {
        "bits": (400 + 600) / 400,
        "effective_bits": (450 + 750) / 400,
        "bytes": 1000 + 57 + 94,
        "parameters": 250 + 50 + 300,
        "flops": 70 + 100 + 600,
    }


def test_a_candidate_is_named_after_its_levels_and_its_database(two_units: CostTable, tmp_path: Path) -> None:
    ids = {two_units.candidate(genome) for genome in [(0, 0), (1, 0), (2, 2)]}
    assert len(ids) == 3
    assert all(len(name) == 12 and set(name) <= set("0123456789abcdef") for name in ids)
    assert two_units.candidate([1, 0]) == two_units.candidate((1, 0))
    again = database(tmp_path / "again", *two_units.units)
    assert CostTable(again).candidate((1, 0)) == two_units.candidate((1, 0))
    other = [*two_units.units[:1], unit("k", (10, 30), level("2b", 600, 750, 95))]
    assert CostTable(database(tmp_path / "other", *other)).candidate((0, 0)) != two_units.candidate((0, 0))


def test_a_budget_is_written_as_briefly_as_it_was_typed() -> None:
    assert budget_text({"bits": 3.0}) == "bits=3"
    assert budget_text({"bits": 2.55, "bytes": 900_000_000}) == "bits=2.55,bytes=900000000"
    assert budget_text({"flops": "12.5%", "ms": 1.5}) == "flops=12.5%,ms=1.5"


# --- parts that are dropped ---


@pytest.fixture
def one_block(tmp_path: Path) -> CostTable:
    """A block of two halves, each with one weight, and a weight beside it."""
    two = (level("8b", 80, 80, 10, 10), level("4b", 40, 40, 5, 10))
    return CostTable(database(
        tmp_path / "block",
        parent("block", "block", 3), parent("attn", "attention", 2, "block"), parent("mlp", "mlp", 1, "block"),
        unit("q", (1, 10), *two, parent="attn"), unit("up", (1, 10), *two, parent="mlp"), unit("head", (1, 10), *two),
        halves={"block": ["attn", "mlp"]},
    ))  # fmt: skip


def test_what_is_dropped_costs_nothing_and_neither_does_what_is_inside(one_block: CostTable) -> None:
    sizes = {
        genome: (said["bytes"], said["parameters"], said["flops"], said["bits"])
        for genome in [(0,) * 6, (0, 1, 0, 0, 1, 0), (0, 0, 1, 1, 0, 0), (1, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 0)]
        for said in [one_block.describe(genome)]
    }
    assert sizes == {
        (0, 0, 0, 0, 0, 0): (1000 + 4 * 6 + 30, 250 + 6 + 30, 70 + 60, 240 / 30),
        (0, 1, 0, 0, 1, 0): (1000 + 4 * 4 + 15, 250 + 4 + 20, 70 + 40, 120 / 30),  # attention gone, up at 4 bits
        (0, 0, 1, 1, 0, 0): (1000 + 4 * 5 + 15, 250 + 5 + 20, 70 + 40, 120 / 30),  # mlp gone, q at 4 bits
        (1, 0, 0, 0, 0, 0): (1000 + 10, 250 + 10, 70 + 20, 80 / 30),
        (1, 1, 1, 1, 1, 0): (1000 + 10, 250 + 10, 70 + 20, 80 / 30),
    }


def test_one_model_has_one_genome_and_one_id(one_block: CostTable) -> None:
    """Of all 64 genomes: told apart by what is there, at which level. A block without its halves is not there."""
    models: dict[Any, set[tuple[Any, ...]]] = {}
    for genome in itertools.product((0, 1), repeat=6):
        block, attn, mlp, q, up, head = genome
        no_attn, no_mlp = block or attn, block or mlp
        model = (no_attn, no_mlp, None if no_attn else q, None if no_mlp else up, head)
        known = one_block.canonical(genome)
        assert one_block.canonical(known) == known
        assert one_block.describe(known)["bytes"] <= one_block.describe(genome)["bytes"]
        models.setdefault(model, set()).add((tuple(known), one_block.candidate(genome)))
    assert {len(found) for found in models.values()} == {1}
    assert len(set().union(*models.values())) == len(models) == 2 * (4 + 2 + 2 + 1)
    assert one_block.canonical((0, 1, 1, 1, 1, 1)) == [1, 0, 0, 0, 0, 1]
    assert one_block.present((0, 1, 0, 0, 0, 0)).tolist() == [True, True, True, False, True, True]


def test_halves_that_are_not_all_of_a_block_leave_it_standing(tmp_path: Path) -> None:
    two = (level("8b", 80, 80, 10, 10), level("4b", 40, 40, 5, 10))
    units = [
        parent("block", "block", 3),
        parent("attn", "attention", 2, "block"),
        unit("q", (1, 10), *two, parent="attn"),
    ]
    other = CostTable(database(tmp_path / "other", *units))  # a feed-forward half without any level is there, too
    assert other.canonical((0, 1, 1)) == [0, 1, 0]
    alone = CostTable(database(tmp_path / "alone", *units, halves={"block": ["attn"]}))  # attention is all of it
    assert alone.canonical((0, 1, 1)) == alone.canonical((1, 0, 0)) == [1, 0, 0]


def test_a_block_that_may_not_be_dropped_is_not_said_to_be(tmp_path: Path) -> None:
    two = (level("8b", 80, 80, 10, 10), level("4b", 40, 40, 5, 10))
    table = CostTable(database(
        tmp_path / "fixed", parent("block", "block", 3, may_drop=False), parent("attn", "attention", 2, "block"),
        unit("q", (1, 10), *two, parent="attn"), halves={"block": ["attn"]},
    ))  # fmt: skip
    assert table.canonical((0, 1, 1)) == [0, 1, 0]


def test_what_is_in_a_part_that_can_only_go_with_its_block_goes_with_it(tmp_path: Path) -> None:
    two = (level("8b", 80, 80, 10, 10), level("4b", 40, 40, 5, 10))
    table = CostTable(database(
        tmp_path / "fixed", parent("block", "block", 3), parent("attn", "attention", 2, "block", may_drop=False),
        unit("q", (1, 10), *two, parent="attn"),
    ))  # fmt: skip
    assert table.nested == {(0, 1): [1, 2]}
    assert table.canonical((1, 0, 1)) == [1, 0, 0]
    assert table.describe((1, 0, 1))["bytes"] == 1000


def test_the_problem_knows_what_is_inside_what(one_block: CostTable) -> None:
    losses = [[0.0, 9.0], [0.0, 3.0], [0.0, 4.0], [0.0, 0.5], [0.0, 0.6], [0.0, 0.1]]
    for solver in ("ilp", "branch"):
        problem = one_block.problem({"bytes": 1000 + 4 * 4 + 20}, tie=False, losses=losses)
        choice = SOLVERS[solver](problem).choice
        assert one_block.canonical(choice.tolist()) == [0, 1, 0, 0, 0, 0]


# --- of real models ---

EVERYTHING = {
    "menu": [
        {"method": "rtn", "bits": 3, "group_size": 16, "sym": False},
        {"method": "magnitude", "sparsity": 0.5},
        {"method": "dense"},
    ],
    "targets": ["blocks", "head", "embedding"],
}
HALVES = {
    "opt": {"attention": ["self_attn"], "mlp": ["fc1", "fc2"]},
    "gpt2": {"attention": ["attn"], "mlp": ["mlp"]},
    "mixtral": {"attention": ["self_attn"], "mlp": ["mlp", "block_sparse_moe"]},  # in the network, and in the files
    "granitemoe": {"attention": ["self_attn"], "mlp": ["block_sparse_moe"]},
}


def _prefixes(family: str, unit: Unit) -> list[str]:
    """What the names of everything in a half-block or block begin with, in the network and in its files."""
    if unit.role == "block":
        return [f"{unit.name}."]
    block = unit.name.rpartition(".")[0]
    parts = HALVES.get(family, {"attention": ["self_attn"], "mlp": ["mlp"]})[unit.role]
    return [f"{block}.{part}." for part in parts]


@pytest.mark.parametrize(
    "any_family", ["llama", "qwen3", "gpt2", "opt", "bloom", "mixtral", "granitemoe"], indirect=True
)
def test_sizes_of_real_models_are_those_of_their_files(
    any_family: str, model_folder: Callable[[str], Path], new_bench: Callable[..., Any]
) -> None:
    """Counted from names, shapes and files alone: everything stored, less what is dropped, and the units as encoded."""
    folder, family = model_folder(any_family), any_family
    bench = new_bench(folder)
    drop = {"method": "drop", "units": ["block"] if family == "bloom" else ["attention", "mlp", "block"]}
    made = bench.run("compress", {**EVERYTHING, "menu": [*EVERYTHING["menu"], drop]})
    stored = load_file(folder / "model.safetensors")
    table = CostTable(DatabaseIndex(made.out))
    weights = [entry for entry in table.units if not entry.is_parent]
    generator = np.random.default_rng(0)
    for _ in range(6):
        genome = [int(generator.random() < 0.25) if entry.is_parent else int(generator.integers(3))
                  for entry in table.units]  # fmt: skip
        gone = [
            prefix
            for entry, number in zip(table.units, genome, strict=True)
            if entry.is_parent and number
            for prefix in _prefixes(family, entry.unit)
        ]
        left = [tensor for name, tensor in stored.items() if not name.startswith(tuple(gone))]
        size, kept = sum(tensor.nbytes for tensor in left), sum(tensor.numel() for tensor in left)
        bits = effective = flops = 0.0
        for entry, number in zip(table.units, genome, strict=True):
            if entry.is_parent or f"{entry.name}.".startswith(tuple(gone)):
                continue
            rows, columns = entry.shape
            count, whole = rows * columns, rows * columns
            if number:
                tensors = load_file(made.out / "units" / f"{entry.name}.safetensors")
                own = {key.partition("/")[2]: tensor for key, tensor in tensors.items()
                       if key.partition("/")[0] == entry.levels[number].name}  # fmt: skip
                size += sum(tensor.nbytes for tensor in own.values()) - 4 * whole
            if number == 2:
                count = own["values"].numel()
                assert count == whole - round(0.5 * whole)
            kept -= whole - count
            groups = -(-columns // 16)
            bits += {0: 32 * whole, 1: 3 * whole, 2: 32 * count}[number]
            effective += {0: 32 * whole, 1: 3 * whole + (16 + 3) * groups * rows, 2: whole + 32 * count}[number]
            if entry.unit.role != "embedding":
                flops += 2 * count * (0.5 if entry.unit.role == "expert" else 1)  # two of four experts
        said = table.describe(genome)
        n_weights = sum(entry.n_weights for entry in weights)
        assert (said["bytes"], said["parameters"]) == (size, kept)
        assert (said["bits"], said["effective_bits"]) == pytest.approx((bits / n_weights, effective / n_weights))
        assert said["flops"] == pytest.approx(flops)


@pytest.mark.parametrize("targets", [["blocks"], ["re:.*self_attn|.*attn\\."], ["blocks", "head", "embedding"]])
@pytest.mark.parametrize("any_family", ["llama", "qwen3", "gpt2", "mixtral"], indirect=True)
def test_the_dense_model_has_the_parameters_and_operations_that_torch_counts_whatever_has_levels(
    any_family: str, targets: list[str], load_model: Callable[[str], Any], new_bench: Callable[..., Any],
    model_folder: Callable[[str], Path],
) -> None:  # fmt: skip
    """And a model that lacks a part has what torch counts of one whose ModuleList is shorter, whoever pays for it."""
    from torch.utils.flop_counter import FlopCounterMode

    lm = load_model(any_family)
    parts = {"method": "drop", "units": ["block", "attention", "mlp"]}
    made = new_bench(model_folder(any_family)).run(
        "compress", {"menu": [{"method": "rtn", "bits": 4}, {"method": "dense"}, parts], "targets": targets}
    )
    table = CostTable(DatabaseIndex(made.out))

    def counted(model: Any) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.arange(16)[None], use_cache=False)
        products = counter.get_flop_counts()["Global"]
        return float(sum(products[op] for op in products if op.__name__ in ("mm", "addmm"))) / 16

    said = table.describe([0] * len(table.units))
    assert said["parameters"] == lm.model.num_parameters()
    assert said["flops"] == counted(lm.model)
    shorter = copy.deepcopy(lm.model)
    del shorter.get_submodule(lm.block_path)[1]
    genome = [int(entry.name == f"{lm.block_path}.1") for entry in table.units]
    assert table.describe(genome)["parameters"] == shorter.num_parameters()
    assert table.describe(genome)["flops"] == counted(shorter)


# --- budgets ---


@pytest.mark.parametrize(
    ("resource", "smallest", "least", "most"),
    [
        ("bits", (0, 0), 2.0, 8.0),
        ("effective_bits", (0, 0), 2.5, (825 + 2550) / 400),
        ("bytes", (0, 0), 1000 + 32 + 94, 1000 + 104 + 319),
        ("parameters", (1, 0), 250 + 50 + 300, 250 + 400),
        ("flops", (1, 0), 70 + 100 + 600, 70 + 800),
    ],
)
def test_a_budget_out_of_reach_says_what_is_reachable_in_the_unit_it_was_given_in(
    two_units: CostTable, resource: str, smallest: tuple[int, int], least: float, most: float
) -> None:
    for amount, fits in ((least, smallest), (most, (2, 2))):
        problem = two_units.problem({resource: amount}, tie=False, losses=None)
        assert problem.feasible(fits)
        assert problem.feasible([2, 2]) == (amount == most)
    with pytest.raises(InfeasibleBudget) as short:
        two_units.problem({resource: least * 0.99}, tie=False, losses=None)
    assert f"{resource} is below the least reachable {least:.6g}" in short.value.message
    assert short.value.reachable == pytest.approx(least)


def test_a_limit_that_does_not_bind_is_told_and_no_error(
    two_units: CostTable, caplog: pytest.LogCaptureFixture
) -> None:
    least, most = (
        amount / two_units.n_weights for amount in two_units.problem({}, tie=False, losses=None).reachable("bits")
    )
    problem = two_units.problem({"bits": most * 2, "bytes": 1e9}, tie=False, losses=None)
    assert set(problem.budgets) == {"bits", "bytes"}
    assert problem.feasible([2, 2])
    (bits, _) = caplog.messages
    assert bits == f"budget {most * 2:.6g} bits limits nothing: this menu reaches {least:.6g} to {most:.6g} bits"


def test_budgets_that_only_fail_together_are_reported_in_the_same_units(tmp_path: Path) -> None:
    # the second has few bits, but a scale for every other weight
    both = level("4b", 400, 450, 60), level("2b-g2", 200, 1000, 130)
    table = CostTable(database(tmp_path / "odd", unit("a", (10, 10), *both), unit("b", (10, 10), *both)))
    budget = {"bits": 3.0, "effective_bits": 5.0}
    problem = table.problem(budget, tie=False, losses=[[1.0, 2.0], [1.0, 2.0]])
    with pytest.raises(InfeasibleBudget) as caught:
        SOLVERS["ilp"](problem)
    told = table.in_words(caught.value, budget)
    assert told.message == "no allocation is within bits=3,effective_bits=5: the least effective_bits found is 7.25"
    assert told.budget == 5.0


def test_ties_bind_fused_units_to_levels_that_all_of_them_have(two_units: CostTable) -> None:
    assert two_units.problem({"bits": 3}, tie=False, losses=None).groups == ()
    tied = two_units.problem({"bits": 3}, tie=True, losses=None)
    assert tied.groups == ((0, 1),)
    assert not tied.feasible([2, 0])
    assert tied.feasible([0, 0])


def test_units_of_no_group_or_alone_in_theirs_are_free(tmp_path: Path) -> None:
    two = (level("2b", 200, 200, 25), level("4b", 400, 400, 50))
    units = [unit("q", (10, 10), *two), unit("o", (10, 10), *two, group=None), unit("up", (10, 10), *two, group="0.up")]
    assert CostTable(database(tmp_path / "free", *units)).problem({"bits": 3}, tie=True, losses=None).groups == ()


def test_a_level_without_a_loss_cannot_be_chosen(two_units: CostTable) -> None:
    problem = two_units.problem({"bits": 3}, tie=False, losses=[[3.0, None, 1.0], [1.0, None, None]])
    assert problem.available.tolist() == [[True, False, True], [True, False, False]]


def test_a_unit_without_any_level_is_named_with_the_reason(tmp_path: Path) -> None:
    table = CostTable(
        database(tmp_path / "none", unit("q", (2, 2), level("2b", 8, 8, 1)), unit("k", (2, 2), broken("2b")))
    )
    with pytest.raises(NotFinite, match="unit k has no level to choose: a weight is NaN"):
        table.problem({"bits": 3}, tie=False, losses=None)


def test_a_unit_whose_levels_have_no_loss_is_named(two_units: CostTable) -> None:
    with pytest.raises(UsageError, match="the profile has no loss for any level of k") as caught:
        two_units.problem({"bits": 3}, tie=False, losses=[[3.0, None, 1.0], [None, None, None]])
    assert "kl" in str(caught.value.hint)


def test_only_what_is_offered_can_be_chosen_and_counts_for_what_is_reachable(tmp_path: Path) -> None:
    levels = level("dense", 3200, 3200, 400, offered=False), level("2b", 200, 250, 32), level("4b", 400, 450, 57)
    table = CostTable(database(tmp_path / "offered", unit("q", (10, 10), *levels)))
    assert table.problem({}, tie=False, losses=[[0.0, 2.0, 1.0]]).available.tolist() == [[False, True, True]]
    assert table.problem({}, tie=False, losses=None).reachable("bits") == (200, 400)
    assert table.describe([0])["bytes"] == 1400, "an allocation may have it all the same, where another part is dropped"
    nothing = CostTable(database(tmp_path / "nothing", unit("q", (10, 10), *levels[:1])))
    with pytest.raises(NotFinite, match="unit q has no level to choose: none is offered"):
        nothing.problem({}, tie=False, losses=None)


# --- milliseconds ---

REST_MS = 0.5
MS = [[0.2, 0.3, 0.25], [0.6, None, 0.7]]
"""4 bits are slower than 8, as without a kernel for them."""


@pytest.fixture
def timed(two_units: CostTable) -> CostTable:
    """The same two units with the times of their levels."""
    return CostTable(two_units.index, Times(MS, REST_MS))


def test_milliseconds_are_those_of_the_whole_model(timed: CostTable) -> None:
    assert timed.describe([2, 0])["ms"] == pytest.approx(REST_MS + 0.25 + 0.6)
    assert timed.describe([0, 2])["ms"] == pytest.approx(REST_MS + 0.2 + 0.7)


def test_without_measured_times_nothing_is_said_of_milliseconds_and_no_budget_taken(two_units: CostTable) -> None:
    assert "ms" not in two_units.describe([1, 0])
    with pytest.raises(UsageError, match="a budget of ms needs measured times"):
        two_units.problem({"ms": 1.4}, tie=False, losses=None)


def test_a_budget_of_milliseconds_admits_exactly_what_fits_beside_the_rest(timed: CostTable) -> None:
    problem = timed.problem({"ms": REST_MS + 0.25 + 0.6}, tie=False, losses=None)
    assert [problem.feasible(genome) for genome in [(0, 0), (2, 0), (1, 0), (0, 2)]] == [True, True, False, False]


def test_milliseconds_out_of_reach_say_the_least_of_the_whole_model(timed: CostTable) -> None:
    with pytest.raises(InfeasibleBudget, match=r"1\.2 ms is below the least reachable 1\.3 \(short by 0\.1\)") as short:
        timed.problem({"ms": 1.2}, tie=False, losses=None)
    assert short.value.hint == "raise the budget or add a faster level to the menu"


def test_a_budget_of_milliseconds_and_one_of_bytes_bind_together(timed: CostTable) -> None:
    losses = [[9.0, 4.0, 0.0], [8.0, None, 0.0]]
    amounts = {"ms": REST_MS + 0.25 + 0.7, "bytes": 1000 + 57 + 319}
    alone = {name: SOLVERS["ilp"](timed.problem({name: amounts[name]}, tie=False, losses=losses)) for name in amounts}
    assert alone["ms"].choice.tolist() == [2, 2]
    assert alone["bytes"].choice.tolist() == [1, 2]
    both = SOLVERS["ilp"](timed.problem(amounts, tie=False, losses=losses))
    assert both.choice.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("resource", "least", "most"), [("ms", 1.3, 1.5), ("bytes", 1000 + 126, 1000 + 423), ("bits", 2.0, 8.0)]
)
def test_a_share_of_a_budget_lies_between_the_least_and_the_greatest_that_is_reachable(
    timed: CostTable, resource: str, least: float, most: float
) -> None:
    for share, expected in (("0%", least), ("100%", most), ("12.5%", least + (most - least) / 8)):
        budget = {"effective_bits": 8.0, resource: share}
        amounts = timed.amounts(budget, tie=False, losses=None)
        assert list(amounts) == ["effective_bits", resource]
        assert amounts == {"effective_bits": 8.0, resource: pytest.approx(expected)}
        timed.problem(amounts, tie=False, losses=None)


def test_a_share_is_of_what_tied_units_and_finite_losses_leave_reachable(timed: CostTable) -> None:
    tied = timed.amounts({"ms": "0%"}, tie=True, losses=None)
    assert tied["ms"] == pytest.approx(REST_MS + 0.2 + 0.6)
    finite = timed.amounts({"ms": "0%"}, tie=False, losses=[[None, 4.0, 0.0], [8.0, None, 0.0]])
    assert finite["ms"] == pytest.approx(REST_MS + 0.25 + 0.6)


def test_times_of_another_database_are_refused(timed: CostTable, tmp_path: Path) -> None:
    document = {"database": timed.index.digest, "ms": MS, "rest_ms": REST_MS}
    (tmp_path / "latency.json").write_text(json.dumps(document))
    assert load_times(tmp_path, timed.index) == Times(MS, REST_MS)
    (tmp_path / "latency.json").write_text(json.dumps({**document, "database": "0" * 64}))
    with pytest.raises(UsageError, match="the latencies are those of another database"):
        load_times(tmp_path, timed.index)


# --- levels that units must have ---


def test_a_fixed_level_is_the_only_one_and_need_not_be_offered(two_units: CostTable) -> None:
    table = CostTable(two_units.index, fixed={"q": "8b"})
    problem = table.problem({"bytes": 1000 + 104 + 94}, tie=False, losses=[[0.3, 0.2, 0.1], [0.3, None, 0.1]])
    assert problem.available[0].tolist() == [False, False, True]
    assert branch(problem).choice.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"nothing": "8b"}, "fixed: 'nothing' names no unit"),
        ({"q": "9b"}, r"fixed: q has no level '9b' \(known: 2b, 4b, 8b\)"),
        ({"q": "8b", "re:.*": "2b"}, "fixed: q is to have two levels"),
    ],
)
def test_a_level_that_cannot_be_had_is_refused(two_units: CostTable, fixed: dict[str, str], message: str) -> None:
    with pytest.raises(LayerwiseError, match=message):
        CostTable(two_units.index, fixed=fixed)


def test_a_parent_that_must_go_and_something_in_it_that_must_stay_exclude_each_other(one_block: CostTable) -> None:
    for fixed in ({"block": "drop", "q": "4b"}, {"attn": "drop", "q": "8b"}, {"block": "drop", "attn": "keep"}):
        with pytest.raises(UsageError, match="which it is in, is to be dropped"):
            CostTable(one_block.index, fixed=fixed)
    stays = CostTable(one_block.index, fixed={"block": "keep", "q": "4b"})
    losses = [[0.0, 0.9], [0.0, 0.1], [0.0, 0.2], [0.0, 0.3], [0.0, 0.3], [0.0, 0.3]]
    choice = branch(stays.problem({"bytes": 1000 + 4 * 6 + 5 + 5 + 5}, tie=False, losses=losses)).choice.tolist()
    assert stays.canonical(choice) == [0, 1, 0, 0, 0, 0], (
        "dropping attention costs 0.1, and what must be at 4 bits in it costs more"
    )
