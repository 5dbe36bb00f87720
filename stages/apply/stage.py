"""`apply`: turns one allocation into a compressed model; on request its levels are made again for the inputs that they
will get (`remade.py`), and laid out for kernels (`packed.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

from pydantic import Field, model_validator

from layerwise.stages.allocate.allocation import check_database, load_allocations
from layerwise.stages.apply.pick import PICK, misfit, pick
from layerwise.stages.apply.remade import RESIDUAL, remake
from layerwise.stages.apply.written import write_model
from layerwise.stages.compress import compressor_names, find_compressor
from layerwise.stages.contract import Context, Params, Port, Stage
from layerwise.stages.levels.database import DatabaseIndex
from layerwise.stages.quantities import Count

TEXT = "calibration"
"""The text that levels are made again with, if none is named."""


def picks(params: ApplyParams, feeding: Mapping[str, Sequence[Any]]) -> Iterator[tuple[tuple[str, ...], str]]:
    """As `contract.Check`: a `pick` that can fit none of the allocations to come."""
    wrong = misfit(params.pick, feeding.get("allocations", ()))
    if wrong is not None:
        yield ("pick",), wrong


class ApplyParams(Params):
    """Which allocation to take, and whether to make its levels again."""

    pick: str = Field("knee", description=PICK)
    packed: bool = Field(
        False, description="also write the weights as kernels take them: a model that runs on them can be loaded"
    )
    remake: bool = Field(
        False,
        strict=True,
        description="make the levels again, block by block, for the inputs that the compressed blocks before leave; of "
        "the two models the one with less KL is written",
    )
    data: str | None = Field(
        None,
        description="the text that levels are made again with, by its name in the workflow's data section; "
        "calibration, if left out. Every eighth sequence is set aside for the choice of blocks",
    )
    judge: str | None = Field(
        None,
        description="the text on which both models are compared; the sequences of `data` that were set aside, if left "
        "out",
    )
    tokens: Count = Field(256 << 10, description="of `data`, to make levels again with, at most")
    residual: float = Field(
        RESIDUAL,
        ge=0,
        le=1,
        description="share of the error of its inputs that a layer makes up for, beside keeping its own small",
    )

    steps: int = Field(
        0,
        ge=0,
        description="of gradient descent before each step of a block, by which its weights that are still to be "
        "compressed make up for those that are; 50 go further than `residual`, and take about as long as learned "
        "rounding of 200",
    )

    @model_validator(mode="before")
    @classmethod
    def _on_calibration_text(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("remake") is True and given.get("data") is None:
            return {**given, "data": TEXT}
        return given

    @model_validator(mode="after")
    def _only_with_remake(self) -> Self:
        fields = type(self).model_fields
        in_vain = [name for name in _OF_REMAKE if getattr(self, name) != fields[name].default and not self.remake]
        if in_vain:
            raise ValueError(f"{in_vain[0]} says how levels are made again: add remake: true")
        if self.judge is not None and self.judge == self.data:
            raise ValueError(
                "judge is the text that levels are made again with; leave it out, and what is set aside judges"
            )
        return self

    def material(self) -> dict[str, Any]:
        """Without what changes nothing."""
        idle = {"packed"} if not self.packed else set()
        return self.model_dump(mode="json", exclude=idle if self.remake else {*idle, "remake", *_OF_REMAKE})

    def sources(self) -> Iterable[str]:
        """The modules of all methods, for any may have made the levels."""
        return [find_compressor(name).run.__module__ for name in compressor_names()] if self.remake else ()


_OF_REMAKE = ("data", "judge", "tokens", "residual", "steps")
"""Parameters that say nothing without `remake`."""


def apply(context: Context, params: ApplyParams) -> None:
    """Write a `model` artifact (`layerwise.stages.models.compressed`); with `packed` also its packed form.

    Raises:
        UsageError: nothing fits `pick`, or the database is not that of the allocations.
        DataError: with `remake`, not enough text.
    """
    allocation = pick(load_allocations(context.input("allocations")), params.pick)
    check_database([allocation], DatabaseIndex(context.input("database")))
    write = partial(write_model, workflow=context.model, database=context.input("database"), packed=params.packed)
    if params.remake:
        remake(context, params, allocation, write)
    else:
        context.executor.map(partial(write, out=context.out), [allocation], note="models")


STAGE = Stage(
    "apply",
    ApplyParams,
    apply,
    gives="model",
    takes={"allocations": Port("allocations"), "database": Port("database")},
    data=("data", "judge"),
    any_network=lambda params: not params.packed and not params.remake,
    on_gpu=lambda params: params.remake,
    check=picks,
)
