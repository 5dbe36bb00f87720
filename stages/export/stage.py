"""`export`: a folder with the model, for other tools or as small as it was promised."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from pydantic import Field, field_validator

from layerwise.errors import UsageError
from layerwise.stages.contract import Context, ModelSource, Params, Port, Stage
from layerwise.stages.export import FORMATS, find_format
from layerwise.stages.models.compressed import Document, source_of


class ExportParams(Params):
    """The format."""

    format: str = Field(
        "dense",
        description="dense: decoded weights in the checkpoint's own dtype and files, for any tool; native: levels "
        "encoded, in the predicted bytes, for layerwise",
        json_schema_extra={"examples": list(FORMATS)},
    )

    @field_validator("format")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            find_format(value)
        except UsageError as error:
            raise ValueError(error.message) from error
        return value


def export(context: Context, params: ExportParams) -> None:
    """Write the model folder: weights, config, tokenizer, and `layerwise.json` with where it came from.

    Raises:
        UnsupportedModel: the format cannot hold the model.
    """
    model = context.input("model")
    write = partial(_write, format_=params.format, out=context.out)
    context.executor.map(write, [source_of(model, context.model)], note="models")
    about = dict(Document.load(model).about)
    (context.out / "layerwise.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _write(source: ModelSource, *, format_: str, out: Path) -> None:
    find_format(format_)(source, out)


STAGE = Stage("export", ExportParams, export, gives="checkpoint", takes={"model": Port("model")})
