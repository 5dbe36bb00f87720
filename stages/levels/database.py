"""The database artifact: every level of every unit, encoded, with what each costs and how far it is off.

    database.json                what there is: units, levels, costs, errors; readable without torch
    units/<unit>.safetensors     the tensors of a unit's levels, `<level>/<tensor>`; their recipes in the header

One file per unit, because a unit's levels are made by one task, and memory-mapped, because a search reads few of them
and replicas on one machine then share the pages. Names are sorted and nothing tells the time: the same levels give the
same bytes. `DatabaseIndex` is all that the driver needs; `Database` reads levels. Left out: decoding caches, which
belong to who decodes in a loop.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import CorruptArtifact, NotFinite, UsageError
from layerwise.results.durable import settle_file
from layerwise.stages.levels.level import Level

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "database.json"
RECIPES = "levels"
"""Key in the file's header: recipe and shape of every level, as JSON. A single key: they have no order there."""


# --- writing ----------------------------------------------------------------------------------------------------------


def unit_file(folder: Path, unit: str) -> Path:
    """Where the levels of a unit stand."""
    return folder / "units" / f"{unit}.safetensors"


def write_unit(folder: Path, unit: str, levels: Sequence[Level]) -> Path:
    """Write the levels of one unit; the file is complete or absent.

    Args:
        folder: the database.
        unit: full module name.
        levels: with distinct names.
    Returns:
        the file.
    """
    from safetensors.torch import save_file

    assert len({level.name for level in levels}) == len(levels), f"{unit}: two levels of one name"
    tensors = {
        f"{level.name}/{name}": tensor.detach().cpu().contiguous()
        for level in levels
        for name, tensor in level.tensors.items()
    }
    recipes = {level.name: {"recipe": dict(level.recipe), "shape": list(level.shape)} for level in levels}
    target = unit_file(folder, unit)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    save_file(
        {key: tensors[key] for key in sorted(tensors)},
        partial,
        metadata={RECIPES: json.dumps(recipes, sort_keys=True, allow_nan=False)},
    )
    settle_file(partial, target)
    return target


def describe_levels(levels: Sequence[Level], weight: Tensor, hessian: Tensor | None = None) -> list[dict[str, Any]]:
    """The entries of a unit's levels in the index.

    Both errors are relative: `weight_nmse` is ‖Q - W‖² / ‖W‖², `output_error` is the same of the unit's output on the
    calibration tokens, tr((Q - W) H (Q - W)ᵀ) / tr(W H Wᵀ). A level that is off by nothing has error 0, also from zero.

    Args:
        levels: all of the unit at once, because the norm of its output costs as much as the error of a level.
        weight: (out, in), what they stand for.
        hessian: (in, in), `X Xᵀ`; without it there is no output error.
    Raises:
        NotFinite: a level decodes to NaN or Inf, or an error is not finite.
    """
    W = weight.double()
    weight_norm, output_norm = _squared_norms(W, hessian)
    entries = []
    for level in levels:
        weight_error, output_error = _squared_norms(level.decode().double() - W, hessian)
        errors = {
            "weight_nmse": _ratio(weight_error, weight_norm),
            "output_error": _ratio(output_error, output_norm) if hessian is not None else None,
        }
        for name, value in errors.items():
            if value is not None and not math.isfinite(value):
                raise NotFinite(f"level {level.name}: {name} is {value}")
        costs = {"bits": level.bits, "effective_bits": level.effective_bits, "size_bytes": level.size_bytes}
        entries.append(
            {"level": level.name, "recipe": dict(level.recipe), **costs, **errors, "status": "ok", "error": None}
        )
    return entries


def describe(level: Level, weight: Tensor, hessian: Tensor | None = None) -> dict[str, Any]:
    """`describe_levels` of a single one."""
    return describe_levels([level], weight, hessian)[0]


def describe_failure(name: str, error: str) -> dict[str, Any]:
    """The entry of a level that could not be made; it costs nothing known, and nobody may choose it."""
    empty = dict.fromkeys(("recipe", "bits", "effective_bits", "size_bytes", "weight_nmse", "output_error"))
    return {"level": name, **empty, "status": "nan", "error": error}


def _squared_norms(D: Tensor, hessian: Tensor | None) -> tuple[float, float]:
    """‖D‖² and tr(D H Dᵀ), D in float64; the product in the Hessian's own precision, at half the price."""
    output = 0.0 if hessian is None else ((D.to(hessian.dtype) @ hessian).double() * D).sum().item()
    return D.square().sum().item(), output


def _ratio(error: float, norm: float) -> float:
    if error == 0:
        return 0.0
    return error / norm if norm else math.inf


def write_index(folder: Path, units: Sequence[dict[str, Any]], rest_bytes: int) -> Path:
    """Write `database.json`: the commit point of a database.

    Args:
        folder: the database.
        units: per unit, in the order of a genome: `unit`, `kind`, `block`, `shape`, `group` (what it is fused with,
            or None), `levels` (from `describe_levels` and `describe_failure`), and whatever else readers of the model
            need. `n_weights` is added.
        rest_bytes: bytes of everything of the model that is no unit.
    """
    rows = [{**unit, "n_weights": math.prod(unit["shape"])} for unit in units]
    document = {"rest_bytes": rest_bytes, "units": rows}
    target = folder / INDEX
    target.write_text(json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    return target


# --- reading ----------------------------------------------------------------------------------------------------------


class DatabaseIndex:
    """What a database holds, without torch.

    Args:
        folder: the artifact.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _text(self) -> bytes:
        return (self.folder / INDEX).read_bytes()

    @cached_property
    def _document(self) -> dict[str, Any]:
        try:
            document: dict[str, Any] = json.loads(self._text)
        except ValueError as error:
            raise CorruptArtifact(f"{self.folder / INDEX}: {error}") from error
        return document

    @cached_property
    def digest(self) -> str:
        """The same for the same units, levels, costs and errors: 64 hex digits."""
        return hashlib.sha256(self._text).hexdigest()

    @property
    def units(self) -> list[dict[str, Any]]:
        """The units in the order of a genome; see `write_index`."""
        units: list[dict[str, Any]] = self._document["units"]
        return units

    @property
    def rest_bytes(self) -> int:
        """Bytes of everything of the model that is no unit."""
        return int(self._document["rest_bytes"])

    @cached_property
    def by_name(self) -> dict[str, dict[str, Any]]:
        """The units by their name."""
        return {unit["unit"]: unit for unit in self.units}


class Database:
    """Reads the levels themselves, memory-mapped; only what is asked for is read.

    Pickles as its folder, so that a worker can be handed one.

    Args:
        folder: the artifact.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = DatabaseIndex(folder)
        self._open: dict[str, tuple[Any, dict[str, Any]]] = {}

    def __reduce__(self) -> tuple[type[Database], tuple[Path]]:
        return Database, (self.folder,)

    @property
    def units(self) -> list[dict[str, Any]]:
        """As in the index."""
        return self.index.units

    @property
    def unit_names(self) -> tuple[str, ...]:
        """The units of a genome, in its order."""
        return tuple(self.index.by_name)

    def level(self, unit: str, name: str) -> Level:
        """One level of one unit; its tensors stay on disk until they are touched.

        Raises:
            UsageError: there is no such unit or level, or it could not be made.
            CorruptArtifact: the unit's file is missing or damaged.
        """
        file, recipes = self._file(unit)
        if name not in recipes:
            raise UsageError(f"unit {unit} has no level '{name}'{self._why(unit, name)}")
        prefix = f"{name}/"
        tensors = {
            key.removeprefix(prefix): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118 (a safetensors file is no dict)
            if key.startswith(prefix)
        }
        rows, columns = recipes[name]["shape"]
        return Level(name, recipes[name]["recipe"], (rows, columns), tensors)

    def decode(self, unit: str, name: str) -> Tensor:
        """The dense weight of a level: (out, in), float32."""
        return self.level(unit, name).decode()

    def weight(self, unit: str, level: int) -> Tensor:
        """The same by the number of the level, in the layout of the model (GPT-2's Conv1D: transposed)."""
        row = self.index.by_name[unit]
        decoded = self.decode(unit, row["levels"][level]["level"])
        return decoded.T if row.get("transposed") else decoded

    def _file(self, unit: str) -> tuple[Any, dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        if unit not in self._open:
            if unit not in self.index.by_name:
                raise UsageError(f"the database has no unit '{unit}'")
            path = unit_file(self.folder, unit)
            try:
                file: Any = safe_open(path, framework="pt")
                recipes = json.loads(file.metadata()[RECIPES])
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                raise CorruptArtifact(
                    f"{path}: {error}", hint="delete the database artifact; the next run makes it again"
                ) from error
            self._open[unit] = file, recipes
        return self._open[unit]

    def _why(self, unit: str, name: str) -> str:
        levels = self.index.by_name[unit]["levels"]
        errors = [level["error"] for level in levels if level["level"] == name and level["error"]]
        known = ", ".join(level["level"] for level in levels if level["status"] == "ok")
        return f": {errors[0]}" if errors else f" (known: {known})"
