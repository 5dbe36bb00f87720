"""What may stand in a workflow file, as pydantic models: the source of validation and of the JSON Schema alike.

The models describe the file after `extends`, profiles and `${{ }}` are dealt with. What `with:` holds is each stage's
own affair (`Stage.params`), so here it is any map. Docstrings and descriptions are what an editor shows as help.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

VERSION = 1
"""The workflow format that this layerwise reads."""

_COUNT_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_BYTE_UNITS = {
    **{"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}
_NAME = r"[A-Za-z_][A-Za-z0-9_-]*"
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def _quantity(value: object, units: dict[str, int], wanted: str) -> object:
    """Text with a unit as a whole number; anything else is left to pydantic."""
    if not isinstance(value, str):
        return value
    match = _QUANTITY.fullmatch(value)
    if match is None or match[2] not in units or not (amount := float(match[1]) * units[match[2]]).is_integer():
        raise ValueError(f"must be {wanted}, got text '{value}'")
    return int(amount)


def parse_count(value: object) -> object:
    """`2Mi` -> 2097152, `64k` -> 64000; a number stays as it is."""
    return _quantity(value, _COUNT_UNITS, "a whole number like 65536, 64k, 32Ki or 2Mi")


def parse_bytes(value: object) -> object:
    """`2GiB` -> 2147483648, `500MB` -> 500000000; a number of bytes stays as it is."""
    return _quantity(value, _BYTE_UNITS, "a size like 512MiB or 2GiB")


def _check_name(name: str) -> str:
    if not re.fullmatch(_NAME, name):
        raise ValueError(f"'{name}' cannot be a name: use letters, digits, '_' and '-', a letter first")
    return name


def _check_stage_name(name: str) -> str:
    if not re.fullmatch(rf"{_NAME}(@[^\s/@]+)?", name):
        raise ValueError(f"'{name}' cannot name a stage: use letters, digits, '_' and '-', a letter first")
    return name


Name = Annotated[str, AfterValidator(_check_name)]
StageName = Annotated[str, AfterValidator(_check_stage_name)]
Count = Annotated[
    int,
    Field(gt=0),
    BeforeValidator(parse_count),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string", "pattern": r"^\d"}]}),
]
ByteSize = Annotated[
    int,
    Field(gt=0),
    BeforeValidator(parse_bytes),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string", "pattern": r"^\d"}]}),
]
Dtype = Literal["float32", "bfloat16", "float16"]


class Part(BaseModel):
    """Base of everything in the file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelEntry(Part):
    """The dense model: a local folder (`path`) or a Hugging Face id (`id`)."""

    path: str | None = Field(None, description="Folder with config.json and safetensors, relative to this file.")
    id: str | None = Field(None, description="Hugging Face id such as meta-llama/Meta-Llama-3-8B.")
    revision: str | None = Field(None, description="Commit of a Hugging Face model; a branch is not reproducible.")
    dtype: Dtype = Field("float32", description="What the dense model is computed in.")

    @model_validator(mode="after")
    def _one_source(self) -> ModelEntry:
        if (self.path is None) == (self.id is None):
            raise ValueError("give either path (a folder) or id (a Hugging Face id)")
        if self.revision is not None and self.id is None:
            raise ValueError("revision belongs to a Hugging Face id, not to a folder")
        return self


class TextEntry(Part):
    """Local UTF-8 text files."""

    text: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="Text file or files, relative to this file, read in this order."
    )
    tokens: Count | None = Field(None, description="How many tokens to use (65536, 64k, 2Mi); all of them if left out.")
    sequence_length: int = Field(2048, gt=1, description="Tokens of one sequence.")


class DatasetEntry(Part):
    """A dataset of the Hugging Face hub."""

    dataset: str = Field(description="Hugging Face name such as HuggingFaceFW/fineweb-edu.")
    config: str | None = Field(None, description="Configuration of the dataset, where it has several.")
    split: str = Field("train", description="Split to read.")
    column: str = Field("text", description="Column that holds the text.")
    tokens: Count | None = Field(None, description="How many tokens to use (65536, 64k, 2Mi); all of them if left out.")
    sequence_length: int = Field(2048, gt=1, description="Tokens of one sequence.")


class ResourcesEntry(Part):
    """What one task of a stage may use."""

    cpus: float = Field(default=1, gt=0, description="CPU cores of one task, and its number of threads.")
    gpus: float = Field(default=0, ge=0, description="GPUs of one task; a fraction shares one.")
    memory: ByteSize | None = Field(default=None, description="Memory of one task, such as 2GiB; no claim if left out.")


class StageEntry(Part):
    """One stage of the workflow."""

    uses: str = Field(description="Which stage this is.")
    needs: str | list[str] = Field(default_factory=list, description="Stages whose artifacts this one takes.")
    inputs: dict[str, str | list[str]] = Field(
        default_factory=dict, description="Input -> stage, where the type of the artifact alone leaves a choice."
    )
    with_: dict[str, Any] = Field(default_factory=dict, alias="with", description="Parameters of the stage.")
    foreach: Any = Field(
        None, description="A list: the stage runs once per item. `${{ needs.x }}`: once per instance of stage x."
    )
    resources: ResourcesEntry | None = Field(None, description="Overrides the workflow's resources for this stage.")
    description: str | None = Field(None, description="For the reader.")


class WorkflowFile(Part):
    """A layerwise workflow."""

    version: Literal[1] = Field(description="Version of the workflow format.")
    name: str | None = Field(None, description="Name of the workflow; the file's name if left out.")
    description: str | None = Field(None, description="For the reader.")
    extends: str | None = Field(None, description="A workflow file that this one changes: maps merge, lists replace.")
    model: str | ModelEntry = Field(description="The dense model: a folder or a Hugging Face id.")
    data: dict[Name, TextEntry | DatasetEntry] = Field(
        default_factory=dict, description="Texts by name, for calibration, search and reporting."
    )
    params: dict[Name, Any] = Field(
        default_factory=dict, description="What `-p name=value` may set; used as `${{ params.name }}`."
    )
    resources: ResourcesEntry = Field(ResourcesEntry(), description="Default resources of one task.")
    stages: dict[StageName, Any] = Field(min_length=1, description="The stages by name.")
    profiles: dict[Name, dict[str, Any]] = Field(
        default_factory=dict, description="Named changes to this file, applied by `--profile name`."
    )


TOP_KEYS = tuple(WorkflowFile.model_fields)
STAGE_KEYS = tuple(field.alias or name for name, field in StageEntry.model_fields.items())
