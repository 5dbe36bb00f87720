"""The JSON Schema of workflow files, judged by somebody else's validator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from layerwise.errors import UsageError
from layerwise.pipeline.workflow.schema import workflow_schema
from layerwise.pipeline.workflow.yaml12 import load_text

GOOD = """\
version: 1
name: demo
model: {id: a/b, dtype: bfloat16}
x-notes: {anything: goes}
params: {seed: 1, budgets: [3.0]}
data:
  calibration: {text: [a.txt, b.txt], tokens: 2Mi, sequence_length: 128}
  heldout: {dataset: a/b, split: test, tokens: 4096}
resources: {cpus: 2, memory: 2GiB}
stages:
  stats: {uses: calibrate, with: {shards: "${{ params.seed }}"}}
  levels:
    uses: compress
    needs: stats
    with: {menu: [{method: gptq, bits: [3], percdamp: 0.1}, {method: sparsegpt, patterns: [2:4]}]}
  search:
    uses: allocate
    needs: [levels]
    foreach: ["${{ params.seed }}", 2]
    with: {seed: "${{ item }}", budgets: "${{ params.budgets }}", solver: ilp, workers: auto}
    resources: {gpus: 0.5}
profiles:
  smoke: {data: {calibration: {tokens: 64}}, stages: {search: {with: {population: 3}}}}
"""


@pytest.fixture
def validator(fakes: Any) -> Draft7Validator:
    schema = workflow_schema(find_stage=fakes.stages)
    Draft7Validator.check_schema(schema)
    return Draft7Validator(json.loads(json.dumps(schema)))


def test_a_good_workflow_is_valid(validator: Draft7Validator) -> None:
    assert list(validator.iter_errors(load_text(GOOD, "f").plain())) == []


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("version: 1", "version: 2", ["version"]),
        ("name: demo", "nmae: demo", []),
        ("bfloat16", "float17", ["model"]),
        ("tokens: 2Mi", "tokens: many", ["data", "calibration"]),
        ("uses: allocate", "uses: alocate", ["stages", "search", "uses"]),
        ("needs: stats", "neds: stats", ["stages", "levels"]),
        ("solver: ilp", "solver: ipl", ["stages", "search", "with", "solver"]),
        ("solver: ilp", "sovler: ilp", ["stages", "search", "with"]),
        ("patterns: [2:4]", "bits: [3]", ["stages", "levels", "with", "menu", 1]),
        ("bits: [3], percdamp", "percdamp", ["stages", "levels", "with", "menu", 0]),
        ("gpus: 0.5", "gpus: -1", ["stages", "search", "resources"]),
        ("{with: {population: 3}}", "{wiht: {population: 3}}", ["profiles", "smoke", "stages", "search"]),
    ],
)
def test_a_mistake_is_found_where_it_is(validator: Draft7Validator, old: str, new: str, path: list[str]) -> None:
    assert old in GOOD
    errors = list(validator.iter_errors(load_text(GOOD.replace(old, new), "f").plain()))
    assert [list(error.path) for error in errors] == [path]


def test_a_stage_with_required_parameters_needs_them(validator: Draft7Validator) -> None:
    document = load_text(GOOD, "f").plain()
    del document["stages"]["levels"]["with"]
    (error,) = validator.iter_errors(document)
    assert "'with' is a required property" in error.message


def test_a_file_that_extends_another_may_be_partial(validator: Draft7Validator) -> None:
    assert validator.is_valid({"version": 1, "extends": "base.yaml"})
    assert not validator.is_valid({"version": 1, "name": "x"})


def test_editors_find_help_in_the_schema(validator: Draft7Validator) -> None:
    definitions = validator.schema["definitions"]
    uses = definitions["StageEntry"]["properties"]["uses"]["anyOf"]
    assert {"const": "allocate", "description": "The solver and its budgets."} in uses
    assert definitions["SearchParams"]["properties"]["solver"]["description"] == "how to choose"
    assert definitions["SearchParams"]["properties"]["solver"]["default"] == "evolve"


def test_the_schema_of_one_stage_is_that_of_its_parameters(fakes: Any) -> None:
    schema = workflow_schema("allocate", find_stage=fakes.stages)
    Draft7Validator.check_schema(schema)
    validator = Draft7Validator(schema)
    assert validator.is_valid({"solver": "ilp"})
    assert not validator.is_valid({"sovler": "ilp"})
    with pytest.raises(UsageError, match="unknown stage 'alocate'"):
        workflow_schema("alocate", find_stage=fakes.stages)


def test_a_function_that_finds_stages_cannot_tell_their_names(fakes: Any) -> None:
    with pytest.raises(UsageError, match="needs the names of all stages"):
        workflow_schema(find_stage=fakes.stages.__getitem__)


def test_the_stages_of_layerwise_have_a_schema() -> None:
    schema = workflow_schema()
    Draft7Validator.check_schema(schema)
    names = {option.get("const") for option in schema["definitions"]["StageEntry"]["properties"]["uses"]["anyOf"]}
    assert {"calibrate", "compress", "profile", "allocate", "apply", "evaluate", "export"} <= names


def test_the_committed_schema_is_that_of_the_models() -> None:
    committed = Path(__file__).parents[3] / "workflows" / "schema.json"
    assert json.loads(committed.read_text()) == workflow_schema(), "run `layerwise schema > workflows/schema.json`"
