"""The database artifact: what is written comes back, to the bit and in the same bytes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import CorruptArtifact, NotFinite, UsageError
from layerwise.stages.compress.dense import Params as DenseParams
from layerwise.stages.compress.dense import dense
from layerwise.stages.compress.rtn import Params as RtnParams
from layerwise.stages.compress.rtn import rtn
from layerwise.stages.levels.database import (
    Database,
    DatabaseIndex,
    describe,
    describe_failure,
    describe_levels,
    unit_file,
    write_index,
    write_unit,
)
from layerwise.stages.levels.level import Level

UNITS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def weight_of(unit: str) -> Tensor:
    return torch.randn((8, 40), generator=torch.Generator().manual_seed(UNITS.index(unit)))


def levels_of(unit: str) -> list[Level]:
    params = RtnParams(bits=(3, 2), group_size=16, sym=False)
    return [*rtn(weight_of(unit), None, params), *dense(weight_of(unit).bfloat16(), None, DenseParams())]


def write(folder: Path, **facts: Any) -> list[list[Level]]:
    """A database of two units, the second with a level that failed."""
    made = [levels_of(unit) for unit in UNITS]
    rows = []
    for unit, levels in zip(UNITS, made, strict=True):
        write_unit(folder, unit, levels)
        entries = describe_levels(levels, weight_of(unit), torch.eye(40))
        about = {"unit": unit, "kind": unit.split(".", 3)[3], "block": 0, "shape": [8, 40], "group": None}
        rows.append({**about, "levels": entries, **facts})
    rows[1]["levels"].append(describe_failure("gptq-3b-g16", "the Hessian has 2 NaN or Inf among its 1600 values"))
    write_index(folder, rows, rest_bytes=1234)
    return made


def test_every_level_comes_back_to_the_bit(tmp_path: Path) -> None:
    made = write(tmp_path)
    database = Database(tmp_path)
    assert database.unit_names == UNITS
    for unit, levels in zip(UNITS, made, strict=True):
        for number, level in enumerate(levels):
            found = database.level(unit, level.name)
            assert (found.name, found.recipe, found.shape) == (level.name, level.recipe, level.shape)
            assert found.tensors.keys() == level.tensors.keys()
            assert all(torch.equal(found.tensors[name], level.tensors[name]) for name in level.tensors)
            assert all(found.tensors[name].dtype == level.tensors[name].dtype for name in level.tensors)
            assert torch.equal(database.decode(unit, level.name), level.decode())
            assert torch.equal(database.weight(unit, number), level.decode())


def test_the_same_levels_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert [str(file) for file in files] == ["database.json", *sorted(f"units/{unit}.safetensors" for unit in UNITS)]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_order_in_which_levels_are_made_does_not_change_a_units_file(tmp_path: Path) -> None:
    levels = levels_of(UNITS[0])
    forwards = write_unit(tmp_path / "a", UNITS[0], levels).read_bytes()
    backwards = write_unit(tmp_path / "b", UNITS[0], levels[::-1]).read_bytes()
    assert forwards == backwards


def test_the_index_tells_units_levels_costs_and_failures(tmp_path: Path) -> None:
    made = write(tmp_path)
    index = DatabaseIndex(tmp_path)
    assert index.rest_bytes == 1234
    assert [unit["n_weights"] for unit in index.units] == [320, 320]
    second = index.by_name[UNITS[1]]["levels"]
    assert [level["level"] for level in second] == ["rtn-3b-g16-asym", "rtn-2b-g16-asym", "dense", "gptq-3b-g16"]
    assert [level["status"] for level in second] == ["ok", "ok", "ok", "nan"]
    for entry, level in zip(second[:3], made[1], strict=True):
        assert entry["bits"] == level.bits
        assert entry["effective_bits"] == level.effective_bits
        assert entry["size_bytes"] == level.size_bytes
        assert entry["recipe"] == level.recipe
    assert second[3]["effective_bits"] is None
    assert "NaN" not in json.dumps(index.units, allow_nan=False).replace("2 NaN or Inf", "")


def test_a_transposed_unit_is_handed_over_as_the_model_holds_it(tmp_path: Path) -> None:
    made = write(tmp_path, transposed=True)
    assert torch.equal(Database(tmp_path).weight(UNITS[0], 1), made[0][1].decode().T)


def test_the_digest_tells_two_databases_apart(tmp_path: Path) -> None:
    for name, facts in (("a", {}), ("b", {}), ("c", {"block": 1})):
        (tmp_path / name).mkdir()
        write(tmp_path / name, **facts)
    a, b, c = (DatabaseIndex(tmp_path / name).digest for name in "abc")
    assert a == b != c


def test_a_database_pickles_with_files_open(tmp_path: Path) -> None:
    made = write(tmp_path)
    database = Database(tmp_path)
    database.level(UNITS[0], "dense")
    copy = pickle.loads(pickle.dumps(database))
    assert torch.equal(copy.decode(UNITS[0], "dense"), made[0][2].decode())


def test_errors_are_relative_and_the_output_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(5)
    weight, X = torch.randn((6, 20), generator=generator), torch.randn((20, 300), generator=generator)
    (level,) = rtn(weight, None, RtnParams(bits=(3,), group_size=-1))
    entry = describe(level, weight, X @ X.T)
    W, Q, inputs = weight.double(), level.decode().double(), X.double()
    # float32 Hessian and product: 2⁻²⁴ per term, 300 terms, summed pairwise or better.
    assert entry["output_error"] == pytest.approx(
        float(((Q - W) @ inputs).square().sum() / (W @ inputs).square().sum()), rel=1e-4
    )
    assert entry["weight_nmse"] == pytest.approx(float((Q - W).square().sum() / W.square().sum()), rel=1e-12)
    assert describe(level, weight)["output_error"] is None


def test_a_zero_weight_has_no_error() -> None:
    weight = torch.zeros((2, 4))
    (level,) = rtn(weight, None, RtnParams(bits=(2,)))
    entry = describe(level, weight, torch.eye(4))
    assert (entry["weight_nmse"], entry["output_error"]) == (0.0, 0.0)


def test_a_level_that_is_not_finite_is_refused() -> None:
    level = Level("dense", {"encoding": "dense"}, (1, 2), {"weight": torch.tensor([[1.0, torch.nan]])})
    with pytest.raises(NotFinite, match="level dense: weight_nmse is nan"):
        describe(level, torch.ones((1, 2)))


def test_a_unit_of_which_every_level_failed_still_has_its_file(tmp_path: Path) -> None:
    write_unit(tmp_path, UNITS[0], [])
    entry = {"unit": UNITS[0], "shape": [1, 1], "levels": [describe_failure("rtn-2b-g128", "not finite")]}
    write_index(tmp_path, [entry], rest_bytes=0)
    with pytest.raises(UsageError, match="has no level 'rtn-2b-g128': not finite"):
        Database(tmp_path).level(UNITS[0], "rtn-2b-g128")


def test_a_missing_name_is_answered_with_what_there_is(tmp_path: Path) -> None:
    write(tmp_path)
    database = Database(tmp_path)
    with pytest.raises(UsageError, match=r"has no level 'rtn-5b' \(known: rtn-3b-g16-asym, rtn-2b-g16-asym, dense\)"):
        database.level(UNITS[1], "rtn-5b")
    with pytest.raises(UsageError, match="has no level 'gptq-3b-g16': the Hessian has 2 NaN"):
        database.level(UNITS[1], "gptq-3b-g16")
    with pytest.raises(UsageError, match="the database has no unit 'lm_head'"):
        database.level("lm_head", "dense")


@pytest.mark.parametrize("damage", ["cut short", "emptied", "missing"])
def test_a_damaged_unit_file_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path)
    file = unit_file(tmp_path, UNITS[0])
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 100 if damage == "cut short" else 0])
    with pytest.raises(CorruptArtifact, match=r"q_proj\.safetensors"):
        Database(tmp_path).level(UNITS[0], "dense")


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "database.json").write_text('{"units": [')
    with pytest.raises(CorruptArtifact, match=r"database\.json"):
        _ = DatabaseIndex(tmp_path).units


def test_nothing_half_written_stays_behind(tmp_path: Path) -> None:
    write(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
