"""A survey accounts for every byte of a checkpoint, whatever is chosen, and knows what goes with a dropped part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from layerwise.stages.contract import ModelSource
from layerwise.stages.models.checkpoint import Checkpoint
from layerwise.stages.models.survey import Survey, survey_model, take_survey


@pytest.fixture(scope="module")
def surveys(
    model_folder: Callable[[str], Path], load_model: Callable[[str], Any]
) -> Callable[[str], tuple[Survey, Checkpoint]]:
    made: dict[str, Any] = {}

    def get(family: str) -> tuple[Survey, Checkpoint]:
        if family not in made:
            source = ModelSource(model_folder(family))
            made[family] = take_survey(load_model(family), source), Checkpoint(source.path)
        return made[family]

    return get


def own_units(survey: Survey, names: Iterable[str]) -> set[str]:
    """Units inside some parents, at any depth."""
    above = {parent.name: parent.parent for parent in survey.parents}
    gone = set()
    for unit, _ in survey.units:
        at = unit.parent
        while at is not None and at not in names:
            at = above[at]
        gone |= {unit.name} if at is not None else set()
    return gone


def test_everything_stored_is_told_of(
    surveys: Callable[[str], Any], model_folder: Callable[[str], Path], any_family: str
) -> None:
    survey, _ = surveys(any_family)
    stored = load_file(model_folder(any_family) / "model.safetensors")
    assert {name: (tensor.size_bytes, tensor.elements) for name, tensor in survey.tensors.items()} == {
        name: (4 * tensor.numel(), tensor.numel()) for name, tensor in stored.items()
    }
    assert Survey.from_json(json.loads(json.dumps(survey.as_json(), allow_nan=False))) == survey
    assert survey_model(ModelSource(model_folder(any_family))) == survey.as_json()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral", "granitemoe", "bloom"])
def test_units_parents_and_rest_are_the_checkpoint_byte_for_byte(
    surveys: Callable[[str], Any], family: str, data: Any
) -> None:
    survey, checkpoint = surveys(family)
    chosen = [entry for entry in survey.units if data.draw(st.booleans())]
    parents = [parent for parent in survey.parents if data.draw(st.booleans())]
    left = survey.left([unit for unit, _ in chosen], parents)
    assert set(left) == {None, *(parent.name for parent in parents)}
    units = sum(stored.size_bytes(checkpoint) for _, stored in chosen)
    total = sum(file.stat().st_size for file in checkpoint.files)
    for file in checkpoint.files:  # of a safetensors file all that is no header is tensors
        with file.open("rb") as stream:
            total -= 8 + int.from_bytes(stream.read(8), "little")
    assert units + sum(size_bytes for size_bytes, _ in left.values()) == total
    values = sum(unit.n_weights for unit, _ in chosen)
    assert values + sum(elements for _, elements in left.values()) == total // 4
    assert all(elements >= 0 and size_bytes == 4 * elements for size_bytes, elements in left.values())


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3moe"])
def test_what_is_left_of_a_parent_is_what_stands_in_its_module(
    surveys: Callable[[str], Any], family: str, data: Any
) -> None:
    """By names: those of these families are the same in the model and in the file, but for the experts."""
    survey, _ = surveys(family)
    chosen = [unit for unit, _ in survey.units if data.draw(st.booleans())]
    parents = [parent for parent in survey.parents if data.draw(st.booleans())]
    left = survey.left(chosen, parents)
    for parent in parents:
        within = {
            name: tensor.elements for name, tensor in survey.tensors.items() if name.startswith(f"{parent.name}.")
        }
        nested = [other for other in parents if other.parent == parent.name]
        inside = [
            unit for unit in chosen if unit.parent == parent.name or unit.parent in _children(survey, parent.name)
        ]
        values = sum(within.values()) - sum(unit.n_weights for unit in inside)
        for half in nested:
            of_half = sum(count for name, count in within.items() if name.startswith(f"{half.name}."))
            values -= of_half - sum(unit.n_weights for unit in inside if unit.parent == half.name)
        assert left[parent.name][1] == values


def _children(survey: Survey, name: str) -> set[str]:
    return {parent.name for parent in survey.parents if parent.parent == name}


@pytest.mark.parametrize("family", ["llama", "mixtral", "bloom"])
def test_without_a_part_nothing_of_it_is_left(surveys: Callable[[str], Any], family: str) -> None:
    survey, _ = surveys(family)
    for parent in survey.parents:
        without = survey.without([parent.name])
        gone = own_units(survey, {parent.name})
        assert gone
        assert [entry for entry in survey.units if entry[0].name not in gone] == list(without.units)
        assert {other.name for other in survey.parents} - {other.name for other in without.parents} == {
            parent.name,
            *_children(survey, parent.name),
        }
        lost = set(survey.tensors) - set(without.tensors)
        assert lost == {name for name, tensor in survey.tensors.items() if _inside(survey, tensor.inside, parent.name)}
        if family == "llama" or parent.role == "block":
            assert lost == {name for name in survey.tensors if name.startswith(f"{parent.name}.")}
    both = [parent.name for parent in survey.parents if parent.role == "block"]
    assert {unit.block for unit, _ in survey.without(both).units} == {None}


def _inside(survey: Survey, at: str | None, parent: str) -> bool:
    above = {other.name: other.parent for other in survey.parents}
    while at is not None and at != parent:
        at = above[at]
    return at is not None
