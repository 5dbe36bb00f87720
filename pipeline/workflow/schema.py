"""The JSON Schema of workflow files, for completion and help in editors.

It is made from the same models that validate, so it cannot fall behind them. Draft 7, because that is what the YAML
servers of editors support in every version that is still about. What JSON Schema cannot say (names of stages, types of
artifacts, what a `${{ }}` stands for) is left to `layerwise validate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import AliasChoices, BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from pydantic_core import core_schema

from layerwise import stages as registry
from layerwise.errors import UsageError
from layerwise.pipeline.workflow.entries import Catalogue, FindStage
from layerwise.pipeline.workflow.fileformat import STAGE_KEYS, StageEntry, WorkflowFile
from layerwise.stages.contract import Params

Schema = dict[str, Any]

_DRAFT = "http://json-schema.org/draft-07/schema#"
_EXPRESSION = "#/definitions/expression"


def workflow_schema(stage: str | None = None, *, find_stage: FindStage = registry.find_stage) -> Schema:
    """The JSON Schema (draft 7) of a workflow file, or of what one stage takes under `with:`.

    Args:
        stage: a name after `uses:`; None for the whole file.
        find_stage: how such a name becomes a stage.
    Raises:
        UsageError: there is no such stage.
    """
    catalogue = Catalogue(find_stage)
    if stage is not None:
        params = catalogue.find(stage).params
        definitions, references = _definitions([params])
        return {
            "$schema": _DRAFT,
            "title": f"Parameters of the stage '{stage}'",
            "allOf": [references[params]],
            "definitions": definitions,
        }
    if not catalogue.names():
        raise UsageError("the schema of workflow files needs the names of all stages, not only a way to find one")
    stages = {name: catalogue.find(name).params for name in catalogue.names()}
    definitions, references = _definitions([WorkflowFile, StageEntry, *dict.fromkeys(stages.values())])
    entry = definitions[_name(references[StageEntry])]
    _tell_stages_apart(entry, {name: (params, references[params]) for name, params in stages.items()})
    top = definitions.pop(_name(references[WorkflowFile]))
    top["properties"]["stages"]["additionalProperties"] = references[StageEntry]
    top["properties"]["stages"].pop("anyOf", None)
    top["patternProperties"] = {"^x-": {}}
    # An entry of a profile is any part of an entry, so only the keys are checked.
    changes = {"type": "object", "properties": {key: {} for key in STAGE_KEYS}, "additionalProperties": False}
    partial: Schema = {key: {} for key in top["properties"] if key not in ("version", "extends", "profiles")}
    partial["stages"] = {"type": "object", "additionalProperties": changes}
    profile = {"type": "object", "properties": partial, "additionalProperties": False}
    top["properties"]["profiles"] = {**top["properties"]["profiles"], "additionalProperties": profile}
    # A file that extends another may leave out what the other gives.
    required = [key for key in top.pop("required") if key != "version"]
    top |= {"required": ["version"], "anyOf": [{"required": ["extends"]}, {"required": required}]}
    return {"$schema": _DRAFT, **top, "definitions": definitions}


def _definitions(models: list[type[BaseModel]]) -> tuple[dict[str, Schema], dict[type[BaseModel], Schema]]:
    """The schemas of models and of all that they are made of, and a reference to each model."""
    references, schema = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/definitions/{model}",
        schema_generator=_WithOtherNames,
    )
    definitions = {name: _draft7(body) for name, body in schema.get("$defs", {}).items()}
    definitions["expression"] = {
        "type": "string",
        "pattern": r"\$\{\{.*\}\}",
        "description": "A look-up: ${{ params.name }}, or ${{ item }} in a stage with foreach.",
    }
    return definitions, {model: references[model, "validation"] for model in models}


class _WithOtherNames(GenerateJsonSchema):
    """Knows that a field may be written under any of its aliases; pydantic's own mentions only the first."""

    def model_schema(self, schema: core_schema.ModelSchema) -> Schema:
        made = super().model_schema(schema)
        properties, fields = made.get("properties", {}), schema["cls"].model_fields
        for info in fields.values():
            if not isinstance(info.validation_alias, AliasChoices):
                continue
            first, *others = [choice for choice in info.validation_alias.choices if isinstance(choice, str)]
            same = {key: part for key, part in properties[first].items() if key != "default"}
            properties.update({name: {**same, "description": f"The same as `{first}`."} for name in others})
            if first in made.get("required", []):
                made["required"] = [key for key in made["required"] if key != first]
                one_of_them = {"anyOf": [{"required": [name]} for name in (first, *others)]}
                made["allOf"] = [*made.get("allOf", []), one_of_them]
        return made


def _name(reference: Schema) -> str:
    return str(reference["$ref"]).removeprefix("#/definitions/")


def _draft7(schema: Any) -> Any:
    """A schema of pydantic as draft 7, with a `${{ }}` allowed wherever a value stands."""
    if isinstance(schema, list):
        return [_draft7(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made: Schema = {}
    for key, part in schema.items():
        if key in ("properties", "patternProperties"):
            made[key] = {name: _or_expression(_draft7(value)) for name, value in part.items()}
        elif key in ("items", "additionalProperties") and isinstance(part, dict):
            made[key] = _or_expression(_draft7(part))
        elif key == "prefixItems":  # the name of draft 2020-12
            made["items"] = [_or_expression(_draft7(value)) for value in part]
        elif key == "oneOf":  # an expression may fit several branches
            made["anyOf"] = _draft7(part)
        elif key in ("anyOf", "allOf", "not"):
            made[key] = _draft7(part)
        elif key != "discriminator" and (key, part) != ("default", None):
            made[key] = part
    return made


def _or_expression(schema: Schema) -> Schema:
    """Either what a schema says or an expression; help and default stay where an editor looks for them.

    Maps and lists get if/else instead of anyOf, so that a mistake inside is shown where it is.
    """
    if schema.get("type") == "string" and not schema.keys() & {"const", "enum", "pattern"}:
        return schema
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"$ref": _EXPRESSION}]}
    if not schema.keys() & {"type", "const", "enum", "$ref"}:
        return schema
    help_: Schema = {key: schema[key] for key in ("title", "description", "default") if key in schema}
    value = {key: part for key, part in schema.items() if key not in help_}
    if schema.get("type") in ("object", "array"):
        return {**help_, "if": {"type": "string"}, "then": {"$ref": _EXPRESSION}, "else": value}
    return {**help_, "anyOf": [value, {"$ref": _EXPRESSION}]}


def _tell_stages_apart(entry: Schema, stages: Mapping[str, tuple[type[Params], Schema]]) -> None:
    """Make `with:` depend on `uses:`."""
    entry["properties"]["uses"] = {
        "description": entry["properties"]["uses"]["description"],
        "anyOf": [{"const": name, "description": _help(params)} for name, (params, _) in stages.items()]
        + [{"$ref": _EXPRESSION}],
    }
    entry["properties"]["with"] = {"description": entry["properties"]["with"]["description"]}
    entry["allOf"] = [
        {
            "if": {"properties": {"uses": {"const": name}}, "required": ["uses"]},
            "then": {"properties": {"with": reference}, **_needs_with(params)},
        }
        for name, (params, reference) in stages.items()
    ]


def _help(params: type[Params]) -> str:
    return " ".join((params.__doc__ or "").split())


def _needs_with(params: type[Params]) -> Schema:
    required = any(info.is_required() for info in params.model_fields.values())
    return {"required": ["with"]} if required else {}
