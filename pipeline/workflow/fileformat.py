"""What may stand in a workflow file, as pydantic models: the source of validation and of the JSON Schema alike.

The models describe the file after `extends`, profiles and `${{ }}` are dealt with. What `with:` holds is each stage's
own affair (`Stage.params`), so here it is any map. Docstrings and descriptions are what an editor shows as help.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from layerwise.pipeline.workflow.limits import MAX_NAME
from layerwise.stages.quantities import ByteSize, Count

VERSION = 1
"""The workflow format that this layerwise reads."""

_NAME = r"[A-Za-z_][A-Za-z0-9_-]*"


def _check_length(name: str) -> str:
    if len(name) > MAX_NAME:
        raise ValueError(f"'{name[:20]}...' is too long for a name: {len(name)} characters, at most {MAX_NAME}")
    return name


def _check_name(name: str) -> str:
    _check_length(name)
    if not re.fullmatch(_NAME, name):
        raise ValueError(f"'{name}' cannot be a name: use letters, digits, '_' and '-', a letter first")
    return name


def _check_stage_name(name: str) -> str:
    _check_length(name)
    if not re.fullmatch(rf"{_NAME}(@[^\s/@\x00-\x1f\x7f]+)?", name):
        raise ValueError(f"'{name}' cannot name a stage: use letters, digits, '_' and '-', a letter first")
    return name


Name = Annotated[str, AfterValidator(_check_name)]
Title = Annotated[str, AfterValidator(_check_length)]
StageName = Annotated[str, AfterValidator(_check_stage_name)]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]


class Part(BaseModel):
    """Base of everything in the file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelEntry(Part):
    """The dense model: a local folder (`path`), a Hugging Face id (`id`), or a function that makes it (`python`)."""

    path: str | None = Field(None, description="Folder with config.json and safetensors, relative to this file.")
    id: str | None = Field(None, description="Hugging Face id such as meta-llama/Meta-Llama-3-8B.")
    python: str | None = Field(
        None,
        description="Function of yours that gives a trained torch.nn.Module, file.py:function (relative to this file) "
        "or package.module:function; needs trust: true.",
    )
    revision: str | None = Field(None, description="Commit of a Hugging Face model; a branch is not reproducible.")
    dtype: Dtype = Field("float32", description="What the dense model is computed in.")
    trust: bool = Field(
        False,
        description="Run Python code that the model's folder brings, or that `python` names; read it first.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelEntry:
        if sum(source is not None for source in (self.path, self.id, self.python)) != 1:
            raise ValueError("give either path (a folder), id (a Hugging Face id) or python (a function)")
        if self.python is not None and not self.trust:
            raise ValueError(f"{self.python} is code, which can do whatever you can, and is not run; add trust: true")
        if self.revision is not None and self.id is None:
            raise ValueError("revision belongs to a Hugging Face id, not to a folder")
        return self


class CutEntry(Part):
    """How a text becomes sequences, wherever it comes from."""

    tokens: Count | None = Field(None, description="How many tokens to use (65536, 64k, 2Mi); all of them if left out.")
    sequence_length: int | None = Field(
        None, gt=1, description="Tokens of one sequence; as many as the model takes, up to 2048, if left out."
    )
    bos: bool | None = Field(
        None,
        description="Whether each sequence begins with the beginning-of-sequence token; as the model's tokenizer has "
        "it, if left out.",
    )


class TextEntry(CutEntry):
    """Local files of text or of records."""

    text: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="File or files of UTF-8 text or of records (.jsonl, .json, .parquet, .csv, .tsv), or folders of "
        "them, relative to this file, read in this order."
    )
    column: str | None = Field(
        None, description="Column that holds the text of a record, or a conversation; `text` if left out."
    )


class DatasetEntry(CutEntry):
    """A dataset of the Hugging Face hub."""

    dataset: str = Field(description="Hugging Face name such as HuggingFaceFW/fineweb-edu.")
    config: str | None = Field(None, description="Configuration of the dataset, where it has several.")
    split: str = Field("train", description="Split to read.")
    column: str = Field("text", description="Column that holds the text, or a conversation.")


class TensorEntry(Part):
    """Tensors for a network of your own (`model: {python: ...}`)."""

    python: str = Field(
        description="Function of yours that gives inputs, (entries, ...), or (inputs, labels), as tensors or arrays; "
        "file.py:function (relative to this file) or package.module:function."
    )
    entries: Count | None = Field(None, description="How many to use, spread evenly; all of them if left out.")


class ResourcesEntry(Part):
    """What one task of a stage may use."""

    cpus: float = Field(default=1, gt=0, le=1024, description="CPU cores of one task, and its number of threads.")
    gpus: float = Field(default=0, ge=0, le=1024, description="GPUs of one task; a fraction shares one.")
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
    device: Device | None = Field(None, description="Overrides the workflow's device for this stage.")
    description: str | None = Field(None, description="For the reader.")


class WorkflowFile(Part):
    """A layerwise workflow."""

    version: Literal[1] = Field(description="Version of the workflow format.")
    name: Title | None = Field(None, description="Name of the workflow; the file's name if left out.")
    description: str | None = Field(None, description="For the reader.")
    extends: str | None = Field(None, description="A workflow file that this one changes: maps merge, lists replace.")
    model: str | ModelEntry = Field(description="The dense model: a folder or a Hugging Face id.")
    data: dict[Name, TextEntry | DatasetEntry | TensorEntry] = Field(
        default_factory=dict, description="Texts, or tensors, by name, for calibration, search and reporting."
    )
    params: dict[Name, Any] = Field(
        default_factory=dict, description="What `-p name=value` may set; used as `${{ params.name }}`."
    )
    resources: ResourcesEntry = Field(ResourcesEntry(), description="Default resources of one task.")
    device: Device = Field(
        "auto",
        description="What stages compute on that can use a GPU; auto: on one where `gpus` asks for it or this machine "
        "has it, else on the CPU.",
    )
    stages: dict[StageName, Any] = Field(min_length=1, description="The stages by name.")
    profiles: dict[Name, dict[str, Any]] = Field(
        default_factory=dict, description="Named changes to this file, applied by `--profile name`."
    )


TOP_KEYS = tuple(WorkflowFile.model_fields)
STAGE_KEYS = tuple(field.alias or name for name, field in StageEntry.model_fields.items())
