"""One weight through one method, without a model, a workflow or a results folder: `layerwise.compress_weight`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from layerwise.errors import UsageError
from layerwise.stages.compress import MenuEntry, Task, find_compressor
from layerwise.stages.models.network import Unit, View

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.levels.level import Level

NAME = "weight"


def compress_weight(weight: Tensor, method: str, hessian: Tensor | None, menu: dict[str, Any]) -> Level:
    """The level that a menu entry makes of a weight; see `layerwise.compress_weight`."""
    compressor = find_compressor(method)
    entry = _entry(compressor.params, method, menu)
    _check(weight, method, hessian, entry)
    rows, columns = weight.shape
    unit = Unit(NAME, NAME, "linear", 0, (rows, columns), (0,), View(NAME))
    known = {} if hessian is None else {"hessian": hessian.to(weight.device)}
    levels = compressor.run(Task({NAME: weight}, lambda _, name: known[name], {NAME: unit}), entry)[NAME]
    return levels[0]


def _entry(params: type[MenuEntry], method: str, menu: dict[str, Any]) -> MenuEntry:
    try:
        entry = params.model_validate({"method": method, **menu})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{method}: {f'{where}: ' if where else ''}{first['msg']}") from error
    if entry.scope != "unit" or entry.parents():
        raise UsageError(f"{method} does not work on one weight alone", hint="run it in a workflow")
    names = entry.level_names()
    if len(names) != 1:
        raise UsageError(f"{method} would make {len(names)} levels ({', '.join(names)})", hint="ask for one at a time")
    return entry


def _check(weight: Tensor, method: str, hessian: Tensor | None, entry: MenuEntry) -> None:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise UsageError(f"the weight is {tuple(weight.shape)}, {weight.dtype}: expected (out, in) of a float dtype")
    columns = weight.shape[1]
    if hessian is not None and tuple(hessian.shape) != (columns, columns):
        raise UsageError(
            f"the Hessian is {tuple(hessian.shape)}: for a weight of {columns} inputs expected ({columns}, {columns})"
        )
    others = sorted(entry.needs - {"hessian"})
    if others:
        raise UsageError(f"{method} needs {', '.join(others)}, which only a workflow gathers", hint="run it in one")
    if "hessian" in entry.needs and hessian is None:
        raise UsageError(
            f"{method} needs the Hessian of the weight's inputs",
            hint="give hessian=X.T @ X of inputs X (tokens, in), or choose method='rtn'",
        )
