"""Runs a search on a pool of model replicas: asks, scores, tells, and makes every candidate a row of the store.

The search itself is the solver library's and knows nothing of models. It is deterministic, and every scored request is
kept in the stage's journal, so an interrupted search is simply run again: it asks the same questions and finds the
answers that it already has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from layerwise.solvers import Ask, Problem, Search
from layerwise.stages.allocate.costs import CostTable
from layerwise.stages.contract import Context, Row
from layerwise.stages.evaluate.scoring import Genome, Measurement, Pool, Request, Score, score

ROWS_PER_FILE = 256
"""Candidates are written in batches: reading a Parquet table costs per file, not per row."""


class CandidateSearch:
    """Searches that run one after the other on the same replicas.

    Args:
        context: the stage's.
        table: costs and ids of candidates.
        pool: the replicas.
        solver: the name to record.
        metric: what is minimised, `kl` or `nll`.
        searches: how many there will be, for the progress display.
    """

    def __init__(
        self, context: Context, table: CostTable, pool: Pool, *, solver: str, metric: str, searches: int
    ) -> None:
        self.context, self.table, self.pool = context, table, pool
        self.solver, self.metric, self.searches = solver, metric, searches
        self._finished = 0
        self._rows: list[Row] = []
        self._measured: dict[Genome, tuple[int, float]] = {}

    def run(self, search: Search, budget: str) -> int:
        """Bring a search to its end.

        Args:
            search: fresh; it holds the result afterwards.
            budget: its budget as text, for the records.
        Returns:
            the tokens that its candidates were evaluated on, added up.
        """
        spent = 0
        self._measured = {}
        while not search.done:
            ask = search.ask()
            genomes = tuple(tuple(self.table.canonical(candidate.tolist())) for candidate in ask.candidates)
            request = Request(genomes, (self.metric,), ask.tokens, ask.draw)
            scores = score(self.pool, request, workers=self.context.executor.workers)
            search.tell([_fitness(measured[self.metric]["mean"]) for measured in scores])
            for candidate, measured in zip(ask.candidates, scores, strict=True):
                self._note(tuple(candidate.tolist()), measured[self.metric])
            spent += sum(measured[self.metric]["n_tokens"] for measured in scores)
            self._rows += [
                self._row(budget, ask, genome, measured) for genome, measured in zip(genomes, scores, strict=True)
            ]
            if len(self._rows) >= ROWS_PER_FILE:
                self.flush()
            self._report(search, ask, budget)
        self._finished += 1
        return spent

    def best(self, problem: Problem, count: int) -> list[Genome]:
        """The best candidates of the last search that are within its budgets: of those that were measured on the most
        tokens the ones with the least loss, then of those on fewer.

        Args:
            problem: of that search.
            count: how many at most.
        """
        order = sorted(self._measured, key=lambda genome: (-self._measured[genome][0], self._measured[genome][1]))
        found: list[Genome] = []
        for genome in order:
            canonical = tuple(self.table.canonical(genome))
            if canonical not in found and problem.feasible(genome):
                found.append(canonical)
            if len(found) == count:
                break
        return found

    def _note(self, genome: Genome, measured: Measurement) -> None:
        """Keep of a candidate what was measured on the most tokens."""
        known = self._measured.get(genome)
        if measured["mean"] is not None and (known is None or measured["n_tokens"] >= known[0]):
            self._measured[genome] = (measured["n_tokens"], measured["mean"])

    def flush(self) -> None:
        """Make the rows that were not written yet durable."""
        if self._rows:
            self.context.record("candidates", self._rows)
        self._rows = []

    def _row(self, budget: str, ask: Ask, genome: Sequence[int], measured: Score) -> Row:
        fitness = measured[self.metric]["mean"]
        return {
            "candidate": self.table.candidate(genome),
            "solver": self.solver,
            "budget": budget,
            "generation": ask.generation,
            "round": ask.round,
            "draw": ask.draw,
            "genome": list(genome),
            "n_tokens": measured[self.metric]["n_tokens"],
            "metric": self.metric,
            "fitness": fitness,
            "status": "nan" if fitness is None else "ok",
            **self.table.describe(genome),
        }

    def _report(self, search: Search, ask: Ask, budget: str) -> None:
        best = "" if search.best.loss is None else f", {budget}, best at {self.metric} {search.best.loss:.4g}"
        if search.generations is None:
            self.context.progress(self._finished, self.searches, f"searches{best}")
            return
        generations = max(1, search.generations)
        done = self._finished * generations + min(ask.generation, generations)
        self.context.progress(done, self.searches * generations, f"generations{best}")


def _fitness(mean: float | None) -> float:
    return math.nan if mean is None else mean
