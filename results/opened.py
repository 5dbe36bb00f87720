"""The results of one run as DataFrames: what `layerwise.open_results` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerwise.results.frontier import frontier_table
from layerwise.results.runs import find_run, latest_runs, latest_stages, stage_keys

if TYPE_CHECKING:
    import pandas as pd

    from layerwise.results.store import Store


@dataclass(frozen=True)
class Results:
    """One run of a results folder; get it from `layerwise.open_results`.

    The tables hold the rows of all stages of the run, also of those that an earlier run computed. Their columns are
    those of `layerwise.results.schema`.

    Args:
        store: the results folder.
        run: the id of the run.
    """

    store: Store
    run: str

    @classmethod
    def of(cls, store: Store, run: str | None = None) -> Results:
        """The results of a run.

        Args:
            store: where to look.
            run: its id, the start of it, or the name of a workflow; None for the newest run.
        Raises:
            UsageError: there is no such run, or several start like this.
        """
        return cls(store, find_run(store, run))

    def frontier(self, **how: Any) -> pd.DataFrame:
        """What `layerwise frontier` prints.

        Args:
            how: `over`, `loss`, `stage`, `solver`, `data`, `dominated` of `layerwise.results.frontier.frontier_table`.
        Raises:
            UsageError: no such cost or stage, or no allocation yet.
        """
        return frontier_table(self.store, self.run, **how)

    def candidates(self) -> pd.DataFrame:
        """Every allocation that a search evaluated."""
        return self._table("candidates")

    def profile(self) -> pd.DataFrame:
        """What each level of each unit costs the network, alone."""
        return self._table("profile")

    def levels(self) -> pd.DataFrame:
        """Every level of every unit, with its costs and errors."""
        return self._table("levels")

    def _table(self, name: str) -> pd.DataFrame:
        keys = stage_keys(latest_stages(self.store, self.run).values())
        return self.store.read(name, stage_key=keys)

    def _title(self) -> str:
        (row,) = (row for row in latest_runs(self.store) if row["run_id"] == self.run)
        return f"run {self.run} in {self.store.root}: {row['status']}"

    def _stages(self) -> pd.DataFrame:
        import pandas as pd

        rows = latest_stages(self.store, self.run)
        return pd.DataFrame(
            [[name, row["uses"], row["cache"], row["status"]] for name, row in rows.items()],
            columns=["stage", "uses", "cache", "status"],
        )

    def __repr__(self) -> str:
        from layerwise.results.format import format_table

        return f"{self._title()}\n\n{format_table(self._stages())}".rstrip()

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(self._title())}</p>{self._stages().to_html(index=False)}"
