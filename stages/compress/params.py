"""What a workflow says of `compress`: the menu, and which units get levels of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Union

from pydantic import Field, field_validator

from layerwise.stages.compress import MenuEntry, compressor_names, find_compressor
from layerwise.stages.contract import ModelSource, Params
from layerwise.stages.models.selection import Ignored, Targets, noted

ENTRY_TYPES = tuple(find_compressor(name).params for name in compressor_names())
AnyEntry: Any = Annotated[Union[ENTRY_TYPES], Field(discriminator="method")]  # noqa: UP007 (made at run time)


class CompressParams(Params):
    """The menu: which levels every unit gets."""

    menu: list[AnyEntry] = Field(min_length=1, description="one entry per method, with `method` and its parameters")
    targets: Targets | None = Field(
        None,
        description="units to compress, as of `calibrate`; those that were calibrated if left out, without calibration "
        "all of the blocks",
    )
    ignore: Ignored = Field([], description="units to leave alone, in the same form")
    least_tokens: int = Field(
        32,
        ge=0,
        description="calibration tokens that must reach a unit (an expert); with fewer, a method that needs them gives "
        "way to its fallback",
    )

    @field_validator("menu")
    @classmethod
    def _distinct(cls, menu: list[MenuEntry]) -> list[MenuEntry]:
        names = Counter(
            (role, name)
            for entry in menu
            for role in (entry.parents() if entry.scope == "half" else [""])  # no half-block is of two roles
            for name in entry.level_names()
        )
        twice = [name for (_, name), count in names.items() if count > 1]
        if twice:
            raise ValueError(f"makes level {twice[0]} twice; remove one of the entries")
        return menu

    @property
    def needs_statistics(self) -> list[str]:
        """Statistics that the menu needs."""
        return sorted({name for entry in self.menu for name in entry.needs})

    @property
    def offers_unchanged(self) -> bool:
        """Whether a search may leave a unit as it is."""
        return any(entry.offers_unchanged for entry in self.menu)

    @property
    def parent_roles(self) -> set[str]:
        """Roles of parents that get levels."""
        return {role for entry in self.menu for role in entry.parents()}

    def material(self) -> dict[str, Any]:
        """With the implementation number of each method."""
        menu = [entry.material() | {"impl": entry.impl} for entry in self.menu]
        return self.model_dump(mode="json", exclude={"menu"}) | {"menu": menu}

    def sources(self) -> Iterable[str]:
        """The modules of its methods."""
        return dict.fromkeys(find_compressor(entry.method).run.__module__ for entry in self.menu)


def read_menu(menu: Sequence[Mapping[str, Any]]) -> list[MenuEntry]:
    """The entries of a menu that was written as JSON."""
    return CompressParams.model_validate({"menu": list(menu)}).menu


def maker(menu: Sequence[MenuEntry], level: str) -> MenuEntry:
    """The entry that makes the levels of a name."""
    return next(entry for entry in menu if level in entry.level_names())


def notes(params: CompressParams, model: ModelSource) -> Iterable[str]:
    """What stays as it is. Where the menu needs statistics, the stage that gathers them tells of it."""
    if params.targets is not None or not params.needs_statistics:
        yield from noted(model, params.targets or (), params.ignore)


Mistakes = Iterator[tuple[tuple[str | int, ...], str]]


def mistakes(params: CompressParams, feeding: Mapping[str, Sequence[Any]]) -> Mistakes:
    """What can be seen to be wrong before anything runs."""
    calibrated = feeding.get("statistics", ())
    for number, entry in enumerate(params.menu):
        missing = [name for name in sorted(entry.needs) if not calibrated]
        if missing:
            yield (
                ("menu", number, "method"),
                f"{entry.method} needs {', '.join(missing)}: add a `calibrate` stage to needs",
            )
        for stage in calibrated:
            given: list[str] | None = getattr(stage, "statistics", None)
            lacking = [name for name in sorted(entry.needs) if given is not None and name not in given]
            if lacking:
                yield (
                    ("menu", number, "method"),
                    f"{entry.method} needs {', '.join(lacking)}, but the calibrate stage gathers only "
                    f"{', '.join(given or ()) or 'nothing'}: add it to its `statistics`, or leave that key out",
                )
    if calibrated and feeding.get("model"):
        yield (), "the statistics say which model they are of: give `model` to the calibrate stage, not here, too"
