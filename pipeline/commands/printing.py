"""Tables as several commands print them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from layerwise.pipeline.commands.options import TO_READ, Format
from layerwise.results.resources import RESOURCES

if TYPE_CHECKING:
    import pandas as pd

    from layerwise.results.store import Store


def print_table(frame: pd.DataFrame, format_: Format) -> None:
    """A table on stdout."""
    from layerwise.results.format import format_table

    print(format_table(frame, format_), end="")


def print_frontier(frame: pd.DataFrame, format_: Format, over: str | None = None) -> None:
    """A frontier; for people without the columns that say the same in every row.

    Perplexity is that of language models, accuracy that of classifiers. Of the costs they see the three figures of size
    that always stand side by side, the milliseconds if there are any, and the one that was asked for.
    """
    if format_ in TO_READ and len(frame):
        same = frame.iloc[0]
        text = "" if same["ranked_by"] == "kl" else f" on {same['heldout_data']}"
        print(f"run {same['run']}, Pareto frontier by {same['ranked_by']}{text}\n")
        frame = frame.drop(columns=["run", "metric", "heldout_data", "ranked_by"])
        frame = frame.drop(columns=[name for name in ("on_front",) if frame[name].all()])
        if frame["heldout_accuracy"].isna().all():
            frame = frame.drop(columns="heldout_accuracy")
        elif frame["heldout_perplexity"].isna().all():
            frame = frame.drop(columns="heldout_perplexity")
        shown = {"bits", "effective_bits", "bytes", over, None if frame["ms"].isna().all() else "ms"}
        frame = frame.drop(columns=[name for name in RESOURCES if name not in shown])
        from layerwise.results.frontier import RECOVERED

        before_and_after = () if frame["repair"].isna().all() else ("repair", "recovered_kl", "recovered_bytes")
        frame = frame.drop(columns=[name for name in RECOVERED if name not in before_and_after])
    print_table(frame, format_)


def print_after_repair(frame: pd.DataFrame) -> None:
    """For people: what comparing after a repair has changed, if there was one.

    Args:
        frame: a frontier with its dominated allocations.
    """
    from layerwise.results.frontier import after_repair

    repairs = ", ".join(sorted(frame["repair"].dropna().unique()))
    if repairs:
        kept, sizes = after_repair(frame)
        print(
            f"\nafter {repairs}, on the search data: at or below the frontier before at {kept} of {sizes} sizes, at "
            f"equal bytes; {frame['ranks_changed'].sum()} of {frame['finalists'].sum()} finalists changed their rank "
            "(--plot FILE --loss kl draws both)"
        )


def print_outcome(store: Store, run: str) -> None:
    """What a finished run is for: its frontier, and where its checkpoints are."""
    from layerwise.results.frontier import frontier_table
    from layerwise.results.runs import latest_stages

    stages = latest_stages(store, run)
    if any(row["uses"] == "allocate" for row in stages.values()):
        print_frontier(frontier_table(store, run), "table")
        print_after_repair(frontier_table(store, run, dominated=True))
    for stage, row in stages.items():
        if row["uses"] == "export":
            print(f"{stage}: {store.root / 'runs' / run / 'stages' / stage}", file=sys.stderr)
