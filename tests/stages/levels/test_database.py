"""The database artifact: what is written comes back, to the bit and in the same bytes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerwise.errors import CorruptArtifact, NotFinite, UsageError
from layerwise.stages.contract import ModelSource
from layerwise.stages.levels.database import (
    Database,
    DatabaseIndex,
    LevelEntry,
    UnitEntry,
    describe_failure,
    describe_levels,
    fallen_back,
    write_index,
)
from layerwise.stages.levels.dense import dense_level
from layerwise.stages.levels.files import unit_file, write_unit
from layerwise.stages.levels.grid import grid_level
from layerwise.stages.levels.level import Level
from layerwise.stages.levels.parent import parent_level
from layerwise.stages.models.network import Unit, View
from layerwise.stages.models.stored import Stored

UNITS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
PARENT = "model.layers.0"


def weight_of(unit: str) -> Tensor:
    return torch.randn((8, 40), generator=torch.Generator().manual_seed(UNITS.index(unit)))


def levels_of(unit: str) -> list[Level]:
    """Two grids around a unit's weight."""
    made = []
    for bits in (3, 2):
        scale = weight_of(unit).abs().amax(1, keepdim=True).half().float() / 2 ** (bits - 1)
        codes = ((weight_of(unit) / scale).round() + 2 ** (bits - 1)).clamp(0, 2**bits - 1)
        recipe = {"method": "any", "bits": bits, "group_size": -1, "sym": True}
        made.append(grid_level(f"any-{bits}b", recipe, codes, scale=scale, zero=scale))
    return made


def unit_of(name: str) -> Unit:
    return Unit(name, name.split(".", 3)[3], "linear", 0, (8, 40), (0,), View(f"{name}.weight"), parent=PARENT)


def write(folder: Path, *, block: int = 0) -> list[list[Level]]:
    """A model, a database of a block and two of its units, the second with a level that failed."""
    model = folder / "dense"
    model.mkdir()
    save_file({f"{unit}.weight": weight_of(unit).bfloat16() for unit in UNITS}, model / "model.safetensors")
    keep, drop = parent_level("keep"), parent_level("drop")
    parent = Unit(PARENT, "block", "block", block, (0, 0), (block,))
    described = tuple(LevelEntry(level.name, dict(level.recipe), level.costs) for level in (keep, drop))
    entries = [UnitEntry(parent, None, described)]
    write_unit(folder, PARENT, [drop])
    made = [levels_of(unit) for unit in UNITS]
    for unit, levels in zip(UNITS, made, strict=True):
        write_unit(folder, unit, levels)
        unchanged = dense_level(weight_of(unit).bfloat16())
        found = describe_levels([unchanged, *levels], weight_of(unit).bfloat16(), torch.eye(40))
        if unit == UNITS[1]:
            found.append(describe_failure("gptq-3b", "the Hessian has 2 NaN or Inf among its 1600 values"))
        entries.append(UnitEntry(unit_of(unit), Stored((View(f"{unit}.weight"),)), tuple(found)))
    write_index(folder, entries, {"bytes": 1234, "flops": 5.0})
    return made


def opened(folder: Path) -> Database:
    return Database(folder, ModelSource(folder / "dense"))


def test_every_level_comes_back_to_the_bit(tmp_path: Path) -> None:
    made = write(tmp_path)
    database = opened(tmp_path)
    assert database.unit_names == (PARENT, *UNITS)
    for unit, levels in zip(UNITS, made, strict=True):
        for number, level in enumerate(levels, 1):
            found = database.level(unit, level.name)
            assert (found.name, found.recipe, found.shape) == (level.name, level.recipe, level.shape)
            assert found.tensors.keys() == level.tensors.keys()
            assert all(torch.equal(found.tensors[name], level.tensors[name]) for name in level.tensors)
            assert all(found.tensors[name].dtype == level.tensors[name].dtype for name in level.tensors)
            decoded = database.weight(unit, number)
            assert decoded is not None
            assert torch.equal(decoded, level.decode())


def test_what_the_model_has_already_is_read_from_it_and_stored_nowhere_else(tmp_path: Path) -> None:
    write(tmp_path)
    database = opened(tmp_path)
    for unit in UNITS:
        assert database.weight(unit, 0) is None
        level = database.level(unit, "dense")
        assert level.tensors["weight"].dtype == torch.bfloat16
        assert torch.equal(level.decode(), weight_of(unit).bfloat16().float())
        with safe_open(unit_file(tmp_path, unit), "pt") as file:
            assert {key.partition("/")[0] for key in file.keys()} == {"any-3b", "any-2b"}  # noqa: SIM118
    assert database.level(PARENT, "keep").recipe["encoding"] == "keep"
    assert [database.drops(PARENT, number) for number in (0, 1)] == [False, True]
    assert not any(database.drops(UNITS[1], number) for number in range(4))


def test_the_same_levels_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    files = sorted(str(file.relative_to(tmp_path / "a")) for file in (tmp_path / "a").rglob("*") if file.is_file())
    units = sorted(f"units/{unit}.safetensors" for unit in (PARENT, *UNITS))
    assert files == ["database.json", "dense/model.safetensors", *units]
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
    assert index.rest == {"bytes": 1234, "flops": 5.0}
    assert [(unit.n_weights, unit.is_parent) for unit in index.units] == [(0, True), (320, False), (320, False)]
    second = index.by_name[UNITS[1]]
    assert (second.unit, second.stored) == (unit_of(UNITS[1]), Stored((View(f"{UNITS[1]}.weight"),)))
    assert [level.name for level in second.levels] == ["dense", "any-3b", "any-2b", "gptq-3b"]
    assert [level.status for level in second.levels] == ["ok", "ok", "ok", "nan"]
    assert [level.usable for level in second.levels] == [True, True, True, False]
    for entry, level in zip(second.levels[1:], made[1], strict=False):
        assert entry.costs == level.costs
        assert entry.recipe == level.recipe
    assert second.level("gptq-3b").costs is None
    assert second.levels[0].weight_nmse == second.levels[0].output_error == 0
    assert "NaN" not in (tmp_path / "database.json").read_text().replace("2 NaN or Inf", "")
    for unit in index.units:
        assert UnitEntry.from_json(json.loads(json.dumps(unit.as_json()))) == unit


def test_the_digest_tells_two_databases_apart(tmp_path: Path) -> None:
    for name, block in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, block=block)
    a, b, c = (DatabaseIndex(tmp_path / name).digest for name in "abc")
    assert a == b != c


def test_a_database_pickles_with_files_open(tmp_path: Path) -> None:
    made = write(tmp_path)
    database = opened(tmp_path)
    database.level(UNITS[0], "any-3b")
    copy = pickle.loads(pickle.dumps(database))
    assert torch.equal(copy.level(UNITS[0], "any-3b").decode(), made[0][0].decode())
    assert torch.equal(copy.level(UNITS[0], "dense").decode(), weight_of(UNITS[0]).bfloat16().float())


def test_errors_are_relative_and_the_output_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(5)
    weight, X = weight_of(UNITS[0]), torch.randn((40, 300), generator=generator)
    levels = levels_of(UNITS[0])
    W, inputs = weight.double(), X.double()
    for entry, level in zip(describe_levels(levels, weight, X @ X.T, share=0.25), levels, strict=True):
        D = level.decode().double() - W
        # float32 Hessian and product: 2⁻²⁴ per term, 300 terms, summed pairwise or better.
        expected = float((D @ inputs).square().sum() / (W @ inputs).square().sum())
        assert entry.output_error == pytest.approx(expected, rel=1e-4)
        assert entry.weight_nmse == pytest.approx(float(D.square().sum() / W.square().sum()), rel=1e-12)
        assert entry.costs == {**level.costs, "flops": 2 * 320 * 0.25}, "an expert meets a share of the tokens"
    (alone,) = describe_levels(levels[:1], weight)
    assert alone.output_error is None


def test_a_zero_weight_has_no_error() -> None:
    level = dense_level(torch.zeros((2, 4)))
    (entry,) = describe_levels([level], torch.zeros((2, 4)), torch.eye(4))
    assert (entry.weight_nmse, entry.output_error) == (0.0, 0.0)


def test_a_level_that_is_not_finite_is_refused() -> None:
    level = dense_level(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(NotFinite, match="level dense: weight_nmse is nan"):
        describe_levels([level], torch.ones((1, 2)))


def test_a_level_made_by_another_method_says_so() -> None:
    (entry,) = describe_levels(levels_of(UNITS[0])[:1], weight_of(UNITS[0]))
    other = fallen_back(entry, "gptq-3b", "only 3 tokens: made by any")
    assert (other.name, other.status, other.error) == ("gptq-3b", "fallback", "only 3 tokens: made by any")
    assert other.usable
    assert (other.costs, other.recipe) == (entry.costs, entry.recipe)


def test_a_unit_of_which_every_level_failed_still_has_its_file(tmp_path: Path) -> None:
    write_unit(tmp_path, UNITS[0], [])
    failed = tuple(describe_failure(name, "not finite") for name in ("dense", "rtn-2b-g128"))
    write_index(tmp_path, [UnitEntry(unit_of(UNITS[0]), Stored((View("w"),)), failed)], {})
    with pytest.raises(UsageError, match="has no level 'rtn-2b-g128': not finite"):
        opened(tmp_path).level(UNITS[0], "rtn-2b-g128")


def test_a_missing_name_is_answered_with_what_there_is(tmp_path: Path) -> None:
    write(tmp_path)
    database = opened(tmp_path)
    with pytest.raises(UsageError, match=r"has no level 'rtn-5b' \(known: dense, any-3b, any-2b\)"):
        database.level(UNITS[1], "rtn-5b")
    with pytest.raises(UsageError, match="has no level 'gptq-3b': the Hessian has 2 NaN"):
        database.level(UNITS[1], "gptq-3b")
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
        opened(tmp_path).level(UNITS[0], "any-3b")


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "database.json").write_text('{"units": [')
    with pytest.raises(CorruptArtifact, match=r"database\.json"):
        _ = DatabaseIndex(tmp_path).units


def test_nothing_half_written_stays_behind(tmp_path: Path) -> None:
    write(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
