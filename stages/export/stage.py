"""`export`: a folder with the model, for other tools or as small as it was promised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from layerwise.errors import UsageError
from layerwise.stages.contract import Context, ModelSource, Params, Port, Stage
from layerwise.stages.export import FORMATS, find_format, options_of
from layerwise.stages.export.shards import SHARD_BYTES
from layerwise.stages.models.compressed import Document, source_of
from layerwise.stages.quantities import ByteSize


class ExportParams(Params):
    """The format."""

    format: str = Field(
        "dense",
        description="dense: decoded weights in the checkpoint's own dtype and files, for any tool; native: levels "
        "encoded, in the predicted bytes, for layerwise; compressed_tensors: packed linear layers, for transformers, "
        "vLLM and SGLang; gptq, gptq_v2: the same for GPTQModel and vLLM",
        json_schema_extra={"examples": list(FORMATS)},
    )
    any_bits: bool = Field(
        False, description="compressed_tensors: also widths other than 4 and 8 bits, which not every reader takes"
    )
    asymmetric: bool = Field(
        False, description="compressed_tensors: also grids with zero points, which transformers 5.23 does not reload"
    )
    dense_experts: bool = Field(
        False,
        description="compressed_tensors: also models whose experts stay dense in stacked parameters, which vLLM loads "
        "and transformers 5.23 does not",
    )
    pad: bool = Field(
        False,
        description="dense: fill half-blocks that are narrower than others up with zeros, where the model's "
        "configuration has one width for all",
    )
    shard_bytes: ByteSize = Field(SHARD_BYTES, description="compressed_tensors, gptq: largest weight file")

    @field_validator("format")
    @classmethod
    def _known(cls, value: str) -> str:
        value = value.replace("-", "_")
        try:
            find_format(value)
        except UsageError as error:
            raise ValueError(error.message) from error
        return value

    @property
    def options(self) -> dict[str, Any]:
        """The settings that the format reads."""
        return options_of(self.format, self.model_dump(exclude={"format"}))

    def material(self) -> dict[str, Any]:
        """Without what the format does not read."""
        return {"format": self.format, **self.options}


def export(context: Context, params: ExportParams) -> None:
    """Write the model folder: weights, config, tokenizer, and `layerwise.json` with where it came from.

    Raises:
        UnsupportedModel: the format cannot hold the model.
    """
    model = context.input("model")
    write = partial(_write, format_=params.format, options=params.options, out=context.out)
    context.executor.map(write, [source_of(model, context.model)], note="models")
    about = dict(Document.load(model).about)
    about["weight_files"] = _sizes(context.out, params.format, about.get("allocation"))
    (context.out / "layerwise.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _sizes(out: Path, format_: str, allocation: Mapping[str, Any] | None) -> dict[str, int]:
    """Bytes of the weight files, and what was predicted, if bytes were counted in this format."""
    sizes = {"bytes": sum(file.stat().st_size for file in out.rglob("*.safetensors"))}
    if allocation is not None and allocation.get("format") == format_:
        sizes["predicted_bytes"] = allocation["sizes"]["bytes"]
    return sizes


def _write(source: ModelSource, *, format_: str, options: Mapping[str, Any], out: Path) -> None:
    find_format(format_)(source, out, **options)


STAGE = Stage("export", ExportParams, export, gives="checkpoint", takes={"model": Port("model")})
