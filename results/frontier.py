"""The Pareto frontier: which allocations no other one beats, and where giving more bits stops paying.

`non_dominated` and `knee` are plain geometry over arrays. `frontier_table` brings a run's allocations together with
what was measured of them on held-out text. Left out: fronts over more than one cost at a time, and hypervolumes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerwise.errors import UsageError
from layerwise.results.runs import find_run, latest_stages, stage_keys

if TYPE_CHECKING:
    import pandas as pd

    from layerwise.results.store import Store

Cost = Literal["bits", "effective_bits", "bytes"]
Loss = Literal["heldout_kl", "kl", "heldout_perplexity"]

HELDOUT: Mapping[str, str] = {"heldout_kl": "kl", "heldout_perplexity": "perplexity"}
"""Columns of `frontier_table` that come from the `metrics` table, with the metric's name there."""

_UNREPAIRED = {"allocate", "apply"}
"""Stages whose model is the allocation itself; behind any other, a recovery say, it has been changed."""

COLUMNS = [
    "run",
    "stage",
    "solver",
    "budget",
    "bits",
    "effective_bits",
    "bytes",
    "metric",
    "kl",
    *HELDOUT,
    "heldout_data",
    "ranked_by",
    "on_front",
    "knee",
    "candidate",
]
"""Columns of `frontier_table`."""

_COSTS = ("bits", "effective_bits", "bytes")
_TYPES = {**dict.fromkeys(("bits", "effective_bits", "kl", *HELDOUT), "float64"), "bytes": "Int64"}


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point beats, every coordinate to be minimised.

    A point is beaten by one that is nowhere larger and somewhere smaller. Equal points do not beat each other, so
    either all of them are on the front or none.

    Args:
        points: (n, d). A point with a NaN is never on the front and beats nobody.
    Returns:
        (n,), True on the front. Two dimensions take O(n log n), others O(n^2).
    """
    points = np.asarray(points, dtype=np.float64)
    known = ~np.isnan(points).any(axis=1)
    front = np.zeros(len(points), dtype=np.bool_)
    front[known] = _sweep(points[known]) if points.shape[1] == 2 else _compare(points[known])
    return front


def _sweep(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """From left to right: on the front are the lowest points of each x that are lower than all further left."""
    order = np.lexsort((points[:, 1], points[:, 0]))
    x, y = points[order].T
    starts = np.flatnonzero(np.append(True, x[1:] != x[:-1])) if len(x) else np.empty(0, dtype=np.intp)
    lowest = y[starts]  # of each x, for its points are sorted by y
    lower = np.ones(len(starts), dtype=np.bool_)
    lower[1:] = lowest[1:] < np.minimum.accumulate(lowest)[:-1]
    sizes = np.diff(np.append(starts, len(x)))
    front = np.empty(len(x), dtype=np.bool_)
    front[order] = (y == np.repeat(lowest, sizes)) & np.repeat(lower, sizes)
    return front


def _compare(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Each point with all others."""
    beaten = [bool(((points <= point).all(axis=1) & (points < point).any(axis=1)).any()) for point in points]
    return ~np.array(beaten, dtype=np.bool_)


def knee(x: ArrayLike, y: ArrayLike) -> int | None:
    """Where a front bends most: the point furthest below the straight line between its two ends.

    Both axes are first scaled to [0, 1], so their units do not matter; the measure is linear in the loss.

    Args:
        x: (n,) costs of the points of a front, in any order.
        y: (n,) their losses.
    Returns:
        The index of the knee (the first of several equal points), or None if no point lies below the line: with fewer
        than three different points, or a front that bends outwards.
    Source: the chord construction of Das, "On characterizing the knee of the Pareto curve" (1999), in two dimensions;
        the scaling as in Kneedle (Satopää et al., 2011).
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    below = 1 - (x - x.min()) / np.ptp(x) - (y - y.min()) / np.ptp(y)  # the line from (0, 1) to (1, 0), times sqrt(2)
    best = int(np.argmax(below))
    return best if below[best] > 1e-12 else None  # rounding alone stays far below this


def frontier_table(
    store: Store,
    run: str | None = None,
    *,
    over: Cost = "bits",
    loss: Loss | None = None,
    stage: str | None = None,
    solver: str | None = None,
    data: str | None = None,
    dominated: bool = False,
) -> pd.DataFrame:
    """The frontier of a run's allocations.

    Args:
        store: where the results are.
        run: a run's id or the start of it; None for the newest run.
        over: the cost on one axis.
        loss: the loss on the other. By default `heldout_kl` if every allocation has it, else `kl`, for a front must not
            mix two measures. Asked for by name, allocations without it are off the front; if none has it, `kl` is used.
        stage: only allocations of this stage of the run; of all its instances, if it has `foreach`.
        solver: only allocations by this solver.
        data: held-out text by name; by default the one that most was measured on.
        dominated: also give the allocations that are not on the front.
    Returns:
        The columns `COLUMNS`, by rising cost. `ranked_by` names the loss that was used, `metric` what `kl` measured in
        the search. Held-out figures are those of the allocation itself, not of a model repaired afterwards.
    Raises:
        UsageError: no such run, or no such stage in it.
    """
    import pandas as pd

    run = find_run(store, run)
    stages = latest_stages(store, run)
    names = {row["stage_key"]: name for name, row in stages.items() if stage in (None, name, name.split("@")[0])}
    if not names and stage is not None:
        raise UsageError(f"run {run} has no stage {stage!r}", hint=f"it has {', '.join(stages)}")
    heldout = _Heldout(store, stages, data)
    records = [
        {
            **{column: row[column] for column in ("solver", "budget", "metric", "kl", "candidate", *_COSTS)},
            **{column: heldout.value(row, metric) for column, metric in HELDOUT.items()},
            "run": run,
            "stage": names[row["stage_key"]],
            "heldout_data": heldout.data,
        }
        for row in store.rows("allocations", stage_key=stage_keys(stages.values()))
        if row["stage_key"] in names and solver in (None, row["solver"])
    ]
    frame = pd.DataFrame(records, columns=COLUMNS).astype(_TYPES)
    ranked_by = _ranked_by(frame, loss)
    frame["ranked_by"] = ranked_by
    frame["on_front"] = non_dominated(frame[[over, ranked_by]].to_numpy(dtype=np.float64, na_value=np.nan))
    front = frame[frame["on_front"]]
    bend = knee(front[over], front[ranked_by])
    frame["knee"] = False if bend is None else frame.index == front.index[bend]
    shown = frame if dominated else frame[frame["on_front"]]
    return shown.sort_values([over, ranked_by, "candidate"], ignore_index=True)


def dense_losses(store: Store, run: str | None = None, *, data: str | None = None) -> dict[str, float]:
    """What the dense model itself scores on the held-out text, to be drawn beside a frontier.

    Args:
        store: where the results are.
        run: a run's id or the start of it; None for the newest run.
        data: held-out text by name; by default as in `frontier_table`.
    Returns:
        By loss column (`heldout_perplexity`, ...); only what was measured.
    Raises:
        UsageError: no such run.
    """
    heldout = _Heldout(store, latest_stages(store, find_run(store, run)), data)
    values = {column: heldout.dense.get(metric) for column, metric in HELDOUT.items()}
    return {column: value for column, value in values.items() if value is not None}


def _ranked_by(frame: pd.DataFrame, loss: Loss | None) -> Loss:
    if loss is None:
        comparable = frame.loc[frame["kl"].notna(), "heldout_kl"]
        return "heldout_kl" if len(comparable) and comparable.notna().all() else "kl"
    if len(frame) and frame[loss].isna().all():
        raise UsageError(
            f"no allocation of this run has {loss}",
            hint="add an `evaluate` stage to the workflow, or say --loss kl",
        )
    return loss


class _Heldout:
    """Held-out figures of one run, on one text.

    A figure is found by the candidate's id. Two allocate stages may come to the same id from different databases, so a
    figure whose source is the very stage of the allocation is preferred.
    """

    def __init__(self, store: Store, stages: Mapping[str, dict[str, Any]], data: str | None) -> None:
        evaluations = [row for row in stages.values() if row["uses"] == "evaluate"]
        rows = [row for row in store.rows("metrics", stage_key=stage_keys(evaluations)) if row["value"] is not None]
        texts = Counter(row["data"] for row in rows)
        self.data = data if data is not None or not texts else texts.most_common(1)[0][0]
        self.dense: dict[str, float] = {}
        self._of_stage: dict[tuple[str, str, str], float] = {}
        self._of_candidate: dict[tuple[str, str], float] = {}
        # A source is named as in the run that measured it, which may be an earlier run with other names.
        sources = {run: latest_stages(store, run) for run in {row["run_id"] for row in rows}}
        for row in rows:
            if row["data"] != self.data:
                continue
            candidate, metric, value = row["candidate"], row["metric"], row["value"]
            source = sources[row["run_id"]].get(row["source"])
            if candidate == "dense":
                self.dense[metric] = value
            elif source is None or source["uses"] in _UNREPAIRED:
                self._of_candidate[candidate, metric] = value
                if source is not None:
                    self._of_stage[source["stage_key"], candidate, metric] = value

    def value(self, allocation: Mapping[str, Any], metric: str) -> float | None:
        """The figure of an allocation, None if it was not measured."""
        candidate = allocation["candidate"]
        exact = self._of_stage.get((allocation["stage_key"], candidate, metric))
        return self._of_candidate.get((candidate, metric)) if exact is None else exact
