"""The frontier as a picture: average bits (or bytes) against the loss, one colour and marker per solver,
or per stage where one solver made them all.

Drawn with matplotlib's file-only backend and without its global state, so it works on a server and beside a notebook's
own figures. Left out: interactive plots; the Parquet tables are there for those.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import UsageError
from layerwise.results.destination import writing
from layerwise.results.frontier import Cost, Loss
from layerwise.results.resources import RESOURCES

if TYPE_CHECKING:
    import pandas as pd

# Okabe and Ito's colours, told apart by colour-blind readers too; the markers repeat the distinction without colour.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#666666"
_BLACK = "#000000"

_RECOVERED_COSTS = {
    "bytes": "recovered_bytes",
    "effective_bits": "recovered_effective_bits",
    "bits": "bits",
    "depth": "depth",
}
"""Where a repaired allocation stands on an axis: a repair changes neither bits without overhead nor depth."""

_COST_TITLES = {name: resource.axis for name, resource in RESOURCES.items()} | {"bytes": "stored size ({unit})"}
_LOSS_TITLES = {
    "heldout_kl": "KL to the dense model (held-out, nats/token)",
    "heldout_perplexity": "perplexity (held-out)",
    "heldout_accuracy": "accuracy (held-out)",
    "kl": "KL to the dense model (search data, nats/token)",
}
_BYTE_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def plot_frontier(
    frame: pd.DataFrame,
    path: Path,
    over: Cost = "bits",
    loss: Loss | None = None,
    dense_losses: Mapping[str, float] | None = None,
) -> None:
    """Draw a frontier into a file.

    Args:
        frame: from `frontier_table`; with its dominated allocations they are drawn pale.
        path: the file to write; its ending says the format (`.png`, `.svg`, `.pdf`), in a folder that exists.
        over: the cost on the horizontal axis, as in the call that made `frame`.
        loss: the loss on the vertical axis; by default the one that `frame` was ranked by.
        dense_losses: what the dense model scores, see `frontier.dense_losses`; that of the vertical axis is drawn as
            a line.
    Raises:
        UsageError: nothing to draw, a file ending that is no picture, or a file that cannot be written.
    """
    from matplotlib.figure import Figure

    loss = loss or (frame["ranked_by"].iloc[0] if len(frame) else "kl")
    dense = (dense_losses or {}).get(loss) or None  # its KL to itself is 0: no line to draw, and no place on a log axis
    points = frame[frame[loss].notna() & frame[over].notna()].sort_values(over)
    if points.empty:
        raise UsageError(f"no allocation with {over} and {loss} to draw", hint="run the allocate stage first")
    cost_title, scale = _cost_axis(points, over)
    x, y = points[over].astype("float64") / scale, points[loss]

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _draw_points(axes, x, y, points)
    after = _draw_repaired(axes, points, over, scale) if loss == "kl" else []
    if dense is not None:
        axes.axhline(dense, color=_GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1, label="dense model")
    values = [*y, *after, *([] if dense is None else [dense])]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel(cost_title)
    axes.set_ylabel(_loss_title(points, loss))
    axes.set_title(_origin(points, loss), loc="left", fontsize="small", color=_GREY)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.06)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)
    try:
        with writing(path):
            figure.savefig(path)
    except ValueError as error:
        raise UsageError(f"cannot draw {path}: {error}", hint="end its name in .png, .svg or .pdf") from error


def _draw_points(axes: Any, x: pd.Series, y: pd.Series, points: pd.DataFrame) -> None:
    """The front as a line, its allocations in full colour, the others pale, and a ring around the knee."""
    front = points["on_front"].astype(bool)
    if front.sum() > 1:
        axes.plot(x[front], y[front], color=_GREY, linewidth=1.2, zorder=2, label="front")
    told_apart_by = "solver" if points["solver"].nunique() > 1 else "stage"
    for i, (name, rows) in enumerate(points.groupby(told_apart_by, sort=True)):
        look = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "linestyle": "none"}
        best, others = rows.index[front[rows.index]], rows.index[~front[rows.index]]
        pale = {**look, "markersize": 5, "markeredgewidth": 0, "alpha": 0.35, "zorder": 3}
        axes.plot(x[others], y[others], **pale, label=None if len(best) else name)
        if len(best):
            axes.plot(x[best], y[best], **look, markersize=7, markeredgewidth=0, zorder=4, label=name)
    for i in points.index[points["knee"].astype(bool)]:
        ring = {"marker": "o", "markersize": 15, "markerfacecolor": "none", "markeredgecolor": "black"}
        axes.plot(x[i], y[i], **ring, linestyle="none", zorder=5, label=f"knee ({x[i]:.3g}, {y[i]:.3g})")


def _draw_repaired(axes: Any, points: pd.DataFrame, over: Cost, scale: int) -> list[float]:
    """What allocations are after the repair that they were compared by, where that is known; gives the losses."""
    cost = _RECOVERED_COSTS.get(over)
    made = points[points["recovered_kl"].notna()]
    if cost is None or made.empty:
        return []
    repairs = ", ".join(sorted(made["repair"].unique()))
    look = {"color": _BLACK, "marker": "x", "linestyle": "none", "markersize": 7, "zorder": 5}
    axes.plot(made[cost].astype("float64") / scale, made["recovered_kl"], **look, label=f"after {repairs}")
    return [float(loss) for loss in made["recovered_kl"]]


def _cost_axis(points: pd.DataFrame, over: Cost) -> tuple[str, int]:
    """The title of the cost axis, and by what to divide the costs."""
    if over != "bytes":
        return _COST_TITLES[over], 1
    unit, scale = next(((unit, size) for unit, size in _BYTE_UNITS if points[over].max() >= size), ("bytes", 1))
    return _COST_TITLES[over].format(unit=unit), scale


def _loss_title(points: pd.DataFrame, loss: Loss) -> str:
    measured = points["metric"].dropna().unique()
    if loss == "kl" and len(measured) == 1 and measured[0] != "kl":
        return f"{measured[0]} (search data)"
    return _LOSS_TITLES[loss]


def _origin(points: pd.DataFrame, loss: Loss) -> str:
    """Where the figures come from, so that a picture passed on can be found again."""
    run, data = points["run"].iloc[0], points["heldout_data"].iloc[0]
    return f"run {run}" if loss == "kl" else f"run {run}, measured on {data}"
