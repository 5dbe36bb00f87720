"""What a workflow says of `recover`: the repairs, one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Union

from pydantic import Field, model_validator

from layerwise.stages.contract import Params
from layerwise.stages.models.selection import Ignored, Targets
from layerwise.stages.recover import find_repair, repair_names

ENTRY_TYPES = tuple(find_repair(name).params for name in repair_names())
AnyEntry: Any = Annotated[Union[ENTRY_TYPES], Field(discriminator="method")]  # noqa: UP007 (made at run time)

TRAINING = tuple(name for name in repair_names() if find_repair(name).params.scope == "model")
"""Methods that train."""
WITH_TEXT = tuple(name for name in repair_names() if find_repair(name).params.scope != "unit")
"""Methods that read text."""


class RecoverParams(Params):
    """The repairs, and of which units."""

    repairs: list[AnyEntry] = Field(
        min_length=1, description="one after another, each with its `method` and its parameters"
    )
    targets: Targets = Field([], description="compressed units to repair, as of `calibrate`; all of them if left out")
    data: str | None = Field(
        None,
        description="the text that repairs are fitted to or trained on, by its name in the workflow's data section; "
        "`calibration` if one of them reads any",
    )
    ignore: Ignored = Field([], description="units to leave alone, in the same form")

    @model_validator(mode="before")
    @classmethod
    def _trained_on(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("data") is not None or not isinstance(given.get("repairs"), list):
            return given
        methods = [entry.get("method") if isinstance(entry, dict) else entry.method for entry in given["repairs"]]
        reads = any(name in WITH_TEXT for name in methods)
        return {**given, "data": "calibration"} if reads else given

    @property
    def name(self) -> str:
        """What was done to the model, in results: `eora-r8+perp`."""
        return "+".join(entry.name for entry in self.repairs)

    @property
    def needs_statistics(self) -> list[str]:
        """Statistics that the repairs need."""
        return sorted({name for entry in self.repairs for name in entry.needs})

    def material(self) -> dict[str, Any]:
        """With the implementation number of each method."""
        repairs = [entry.material() | {"impl": entry.impl} for entry in self.repairs]
        return self.model_dump(mode="json", exclude={"repairs"}) | {"repairs": repairs}

    def sources(self) -> Iterable[str]:
        """The modules of its methods."""
        return dict.fromkeys(find_repair(entry.method).run.__module__ for entry in self.repairs)


Mistakes = Iterator[tuple[tuple[str | int, ...], str]]


def mistakes(params: RecoverParams, feeding: Mapping[str, Sequence[Any]]) -> Mistakes:
    """What can be seen to be wrong before anything runs."""
    calibrated = feeding.get("statistics", ())
    for number, entry in enumerate(params.repairs):
        if entry.needs and not calibrated:
            needed = ", ".join(sorted(entry.needs))
            yield ("repairs", number, "method"), f"{entry.method} needs {needed}: add a `calibrate` stage to needs"
        for stage in calibrated:
            given: list[str] | None = getattr(stage, "statistics", None)
            lacking = [name for name in sorted(entry.needs) if given is not None and name not in given]
            if lacking:
                yield (
                    ("repairs", number, "method"),
                    f"{entry.method} needs {', '.join(lacking)}, but the calibrate stage gathers only "
                    f"{', '.join(given or ()) or 'nothing'}: add it to its `statistics`, or leave that key out",
                )
