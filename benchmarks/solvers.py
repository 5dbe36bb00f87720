"""How fast and how near: our solvers beside PuLP with CBC and scipy's HiGHS, on the same tables in one run.

    python benchmarks/solvers.py      # writes benchmarks/results/solvers.md; about a quarter of an hour

Everything runs on one core. Our times are whole calls from a `Problem` to a `Solution`; those of CBC and HiGHS count
the solver alone, without building its model. Both are asked for the exact optimum and stopped at a time limit. Times
are medians of several runs, except where one run took long. The searches are judged by what they find, not by time.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import header

from layerwise import solvers
from layerwise.solvers import Problem, Solution
from layerwise.solvers.problem import BUDGET_TOLERANCE

TIME_LIMIT = 60.0
RUNS = 5
BLOCK = [4096 * 4096, 1024 * 4096, 1024 * 4096, 4096 * 4096, 14336 * 4096, 14336 * 4096, 14336 * 4096]
"""Weights of the seven linear layers in a block of an 8 B model."""


class Outcome(NamedTuple):
    """What one solver did: median seconds, loss (inf for no answer), relative gap (None without a bound), runs.

    `over` is by how much the answer exceeds its budgets, relative to them; solvers with tolerances do so a little.
    """

    seconds: float
    loss: float
    gap: float | None
    runs: int
    over: float = 0.0


class Answer(NamedTuple):
    """One run of a peer."""

    seconds: float
    choice: np.ndarray | None
    gap: float | None
    finished: bool


def table(n_units: int, n_levels: int, kind: str, *, seed: int = 0, n_budgets: int = 1, share: float = 0.4) -> Problem:
    """Costs in bytes and losses like a quantized model's; a budget at `share` of the way from least to most bytes.

    Args:
        n_units: layers.
        n_levels: 6 (bits at one group size), 8 or 16 (bits and group sizes).
        kind: "convex": losses fall fourfold with every effective bit. "not convex": each is off by a factor from 0.5
            to 2, so that many levels lie above their unit's hull. "irregular": the same, and every layer has a size of
            its own. "rounded": as not convex, with level costs rounded to bytes from a grid that does not divide them.
        seed: of everything random.
        n_budgets: 2 adds a resource, time, that is only loosely tied to the bytes.
        share: where the budget lies between the least and the most bytes.
    """
    rng = np.random.default_rng(seed)
    weights = np.resize(BLOCK, n_units) * rng.choice([1.0, 0.5, 0.25], n_units)
    if kind == "irregular":
        weights = rng.integers(10**5, 6 * 10**7, n_units).astype(float)
    groups = {6: [128], 8: [32, 128], 16: [32, 64, 128, 256]}[n_levels]
    bits = [2, 3, 4, 5, 6, 8] if n_levels == 6 else [2, 3, 4, 8]
    effective = np.sort([b + 16 / group for b in bits for group in groups])
    if kind == "rounded":
        effective = np.linspace(2.25, 8.25, n_levels)
    costs = {"bytes": np.round(weights[:, None] * effective / 8)}
    if n_budgets > 1:
        costs["ms"] = costs["bytes"] / 2e9 * rng.uniform(0.3, 1.7, (n_units, n_levels)) + 1e-3
    losses = rng.lognormal(0, 1, n_units)[:, None] * 4.0 ** (2 - effective)
    if kind != "convex":
        losses = losses * rng.uniform(0.5, 2.0, losses.shape)
    free = Problem(costs=costs, losses=losses)
    shares = dict(zip(costs, [share, share * 0.6], strict=False))
    ends = {resource: free.reachable(resource) for resource in costs}
    budgets = {resource: low + shares[resource] * (high - low) for resource, (low, high) in ends.items()}
    return Problem(costs=costs, losses=losses, budgets=budgets)


def ours(solve: Callable[[Problem], Solution], problem: Problem, runs: int = RUNS) -> Outcome:
    """A solver of the library."""
    times, solution = [], None
    for _ in range(runs):
        started = time.perf_counter()
        solution = solve(problem)
        times.append(time.perf_counter() - started)
    assert solution is not None and solution.loss is not None and problem.feasible(solution.choice)
    return Outcome(statistics.median(times), solution.loss, solution.gap, runs)


def scipy_milp(problem: Problem) -> Outcome:
    """HiGHS through `scipy.optimize.milp`."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, kron

    n_units, n_levels = problem.shape
    rows = [LinearConstraint(kron(eye_array(n_units), np.ones((1, n_levels)), format="csr"), 1, 1)]
    for resource, budget in problem.budgets.items():
        costs = problem.costs[resource].reshape(1, -1) / budget  # scaled, as HiGHS would have it
        rows.append(LinearConstraint(csr_array(costs), -np.inf, 1))
    losses = problem.losses.ravel()
    options = {"time_limit": TIME_LIMIT, "mip_rel_gap": 0.0}

    def once() -> Answer:
        started = time.perf_counter()
        answer = milp(losses, constraints=rows, integrality=np.ones(losses.size), bounds=Bounds(0, 1), options=options)
        seconds = time.perf_counter() - started
        if answer.x is None:
            return Answer(seconds, None, None, False)
        gap = max(0.0, answer.fun - answer.mip_dual_bound) / abs(answer.fun)
        return Answer(seconds, answer.x.reshape(problem.shape).argmax(axis=1), gap, answer.status == 0)

    return repeated(problem, once)


def pulp_cbc(problem: Problem) -> Outcome:
    """CBC through PuLP, as people write it."""
    import pulp

    n_units, n_levels = problem.shape

    def once() -> Answer:
        model = pulp.LpProblem("allocation", pulp.LpMinimize)
        x = [[pulp.LpVariable(f"x_{u}_{k}", cat=pulp.LpBinary) for k in range(n_levels)] for u in range(n_units)]
        flat = [(x[u][k], u, k) for u in range(n_units) for k in range(n_levels)]
        model += pulp.LpAffineExpression([(v, float(problem.losses[u, k])) for v, u, k in flat])
        for row in x:
            model += pulp.LpAffineExpression([(v, 1) for v in row]) == 1
        for resource, budget in problem.budgets.items():
            costs = problem.costs[resource] / budget
            model += pulp.LpAffineExpression([(v, float(costs[u, k])) for v, u, k in flat]) <= 1
        solver = pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=0.0, timeLimit=TIME_LIMIT)
        model.solve(solver)
        finished = model.sol_status == pulp.LpSolutionOptimal
        if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return Answer(model.solutionTime, None, None, finished)
        choice = np.array([max(range(n_levels), key=lambda k, row=row: row[k].varValue or 0.0) for row in x])
        return Answer(model.solutionTime, choice, None, finished)

    return repeated(problem, once)


def repeated(problem: Problem, once: Callable[[], Answer]) -> Outcome:
    """Several runs of a peer, or one where that took long."""
    times = []
    for _ in range(RUNS):
        answer = once()
        times.append(answer.seconds)
        if not answer.finished or answer.seconds > TIME_LIMIT / RUNS:
            break
    if answer.choice is None:
        return Outcome(statistics.median(times), math.inf, None, len(times))
    spent, loss = problem.cost(answer.choice), problem.loss(answer.choice)
    over = max(spent[resource] / budget - 1 for resource, budget in problem.budgets.items())
    assert loss is not None
    return Outcome(statistics.median(times), loss, answer.gap, len(times), max(0.0, over))


def side_by_side() -> list[str]:
    """One budget: `branch` beside its peers."""
    lines = [
        "| table | losses | solver | seconds | runs | loss above `branch` | own gap | times `branch` | remarks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in [(224, 6), (1120, 8), (20_000, 16)]:
        large = shape[0] > 10_000
        for kind in ("convex", "irregular") if large else ("convex", "not convex", "irregular"):
            problem = table(*shape, kind)
            best = ours(solvers.branch, problem)
            outcomes = {
                "branch": best,
                "lagrange": ours(solvers.lagrange, problem),
                "lp": ours(solvers.lp, problem, 1 if large else RUNS),
                "PuLP + CBC": pulp_cbc(problem),
                "scipy milp (HiGHS)": scipy_milp(problem),
            }
            for name, outcome in outcomes.items():
                lines.append(f"| {shape[0]:,} x {shape[1]} | {kind} | {name} | {row(outcome, best)} |")
                print(lines[-1], flush=True)
    return lines


def row(outcome: Outcome, best: Outcome) -> str:
    """The figures of one solver beside `branch`."""
    remarks = [
        *(["stopped at the time limit"] if outcome.seconds >= TIME_LIMIT * 0.98 else []),
        *([f"{outcome.over:.0e} over the budget"] if outcome.over > BUDGET_TOLERANCE else []),
        *(["no allocation found"] if math.isinf(outcome.loss) else []),
    ]
    above = "" if math.isinf(outcome.loss) else f"{outcome.loss / best.loss - 1:.1e}"
    gap = "" if outcome.gap is None else f"{outcome.gap:.1e}"
    faster = outcome.seconds / best.seconds
    return f"{outcome.seconds:.4f} | {outcome.runs} | {above} | {gap} | {faster:.1f} | {', '.join(remarks)}"


def other_questions() -> list[str]:
    """The whole frontier, two budgets, and the reverse form."""
    lines = ["| question | seconds | bound | result |", "|---|---|---|---|"]
    problem = table(20_000, 16, "irregular")
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        curve = solvers.frontier(problem, over="bytes")
        times.append(time.perf_counter() - started)
    lines.append(f"| hull frontier, 20,000 x 16 | {statistics.median(times):.3f} | 1.0 | {len(curve):,} points |")
    for seed in range(3):
        two = table(2_000, 8, "irregular", n_budgets=2, seed=seed)
        outcome = ours(lambda p: solvers.branch(p, time_limit=2.0), two, 3)
        lines.append(f"| two budgets, 2,000 x 8, seed {seed} | {outcome.seconds:.2f} | 5 | gap {outcome.gap:.1e} |")
        milp = scipy_milp(two)
        lines.append(
            f"| the same by scipy milp (HiGHS) | {milp.seconds:.2f} | | gap "
            f"{'' if milp.gap is None else f'{milp.gap:.1e}'}, loss {milp.loss / outcome.loss - 1:.1e} above `branch` |"
        )
    allocated = solvers.branch(problem)
    reverse = Problem(costs=problem.costs, losses=problem.losses, minimize="bytes", max_loss=allocated.loss)
    started = time.perf_counter()
    solution = solvers.branch(reverse)
    seconds = time.perf_counter() - started
    lines.append(f"| least bytes within a loss, 20,000 x 16 | {seconds:.3f} | | gap {solution.gap:.1e} |")
    start = [sys.executable, "-c", "pass"]
    imported = [sys.executable, "-c", "import layerwise.solvers"]
    took = statistics.median(wall(imported) for _ in range(9)) - statistics.median(wall(start) for _ in range(9))
    lines.append(f"| `import layerwise.solvers`, above an empty Python | {took:.2f} | 0.4 | |")
    print("\n".join(lines), flush=True)
    return lines


def wall(command: list[str]) -> float:
    """Seconds of one process."""
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def growth() -> list[str]:
    """`branch` from a hundred to a hundred thousand units."""
    lines = ["| losses | units x 8 | seconds | microseconds per unit | gap |", "|---|---|---|---|---|"]
    exponents = []
    for kind in ("not convex", "irregular"):
        sizes, seconds = [100, 1_000, 10_000, 100_000], []
        for n_units in sizes:
            outcome = ours(solvers.branch, table(n_units, 8, kind))
            seconds.append(outcome.seconds)
            per_unit = outcome.seconds / n_units * 1e6
            lines.append(f"| {kind} | {n_units:,} | {outcome.seconds:.4f} | {per_unit:.1f} | {outcome.gap:.1e} |")
        exponent = float(np.polyfit(np.log(sizes[1:]), np.log(seconds[1:]), 1)[0])
        exponents.append(f"{exponent:.2f} ({kind})")
    lines += ["", f"From 1,000 units on, seconds grow as the number of units to the power {' and '.join(exponents)}."]
    print("\n".join(lines), flush=True)
    return lines


def hard_tables() -> list[str]:
    """Tables that are not like a model's, on which the search of `branch` has much to do."""
    rng = np.random.default_rng(0)
    cost = rng.uniform(1, 10, (500, 8))
    whole = rng.integers(1, 1000, (500, 8)).astype(float)
    tables = {
        "levels rounded off a common grid, 10,000 x 8": table(10_000, 8, "rounded"),
        "loss = constant - cost (subset sum), whole numbers, 500 x 8": proportional(whole, 1000 - whole),
        "loss = constant - cost (subset sum), real numbers, 500 x 8": proportional(cost, 10 - cost),
        "500 equal units, 8 levels": proportional(
            np.tile(np.arange(2.0, 10.0), (500, 1)), np.tile(4.0 ** -np.arange(8), (500, 1))
        ),
    }
    lines = ["| table | seconds | gap |", "|---|---|---|"]
    for name, problem in tables.items():
        outcome = ours(lambda p: solvers.branch(p, time_limit=10.0), problem, 1)
        lines.append(f"| {name} | {outcome.seconds:.2f} | {outcome.gap:.1e} |")
    print("\n".join(lines), flush=True)
    return lines


def proportional(costs: np.ndarray, losses: np.ndarray) -> Problem:
    """A problem of these tables with a budget two fifths up its range."""
    least, most = costs.min(axis=1).sum(), costs.max(axis=1).sum()
    return Problem(costs={"bytes": costs}, losses=losses, budgets={"bytes": least + 0.40123 * (most - least)})


def evolution() -> list[str]:
    """`Evolve` with the published numbers of evaluations, beside optima that are known."""
    lines = ["| problem | problems | found within | mean above the optimum | most |", "|---|---|---|---|---|"]
    for n_units, equal, seeds in [(56, True, 10), (56, False, 20), (224, True, 3), (224, False, 3)]:
        above = np.array([evolved(n_units, equal, seed) for seed in range(seeds)])
        name = f"additive, {n_units} units of {'equal' if equal else 'three'} size{'' if equal else 's'}, 6 levels"
        lines.append(
            f"| {name} | {seeds} | {(above <= 0.01).sum()} within 1 % | {above.mean():.2%} | {above.max():.2%} |"
        )
        print(lines[-1], flush=True)
    found = sum(best_blocks_found(seed) for seed in range(20))
    lines.append(f"| rugged, choose 8 of 16 blocks | 20 | {found} at the optimum of 12,870 | | |")
    print(lines[-1], flush=True)
    return lines


def evolved(n_units: int, equal: bool, seed: int) -> float:
    """How far above the optimum the preset for quantization ends on an additive problem, relative to it."""
    rng = np.random.default_rng(seed)
    sizes = np.ones(n_units) if equal else rng.choice([1.0, 3.0, 3.5], n_units)
    bits = np.arange(2, 8)
    losses = rng.lognormal(0, 1, n_units)[:, None] * 4.0**-bits * rng.uniform(0.7, 1.3, (n_units, 6))
    problem = Problem(costs={"bits": sizes[:, None] * bits}, budgets={"bits": 4.0 * sizes.sum()}, losses=losses)
    search = solvers.Evolve(problem, seed=seed, preset="evopress-quantization", total_tokens=2048)
    while not search.done:
        search.tell(losses[np.arange(n_units), np.array(search.ask().candidates)].sum(axis=1))
    return search.best.loss / solvers.branch(problem).loss - 1


def best_blocks_found(seed: int) -> bool:
    """True if the preset for depth finds the best 8 of 16 blocks: harms add up, pairs interact, neighbours more so."""
    rng = np.random.default_rng(seed)
    harm, together = rng.random(16), rng.normal(0, 0.3, (16, 16))

    def loss(choices: np.ndarray) -> np.ndarray:
        dropped = (choices == 0).astype(float)
        neighbours = (dropped[:, 1:] * dropped[:, :-1]).sum(axis=1)
        return dropped @ harm + np.einsum("ci,ij,cj->c", dropped, together, dropped) + 0.5 * neighbours

    every = np.array([np.isin(np.arange(16), kept).astype(int) for kept in itertools.combinations(range(16), 8)])
    problem = Problem(costs={"blocks": np.tile([0.0, 1.0], (16, 1))}, budgets={"blocks": 8})
    generations = solvers.depth_generations(16, 8)
    search = solvers.Evolve(problem, seed=seed, preset="evopress-depth", generations=generations, total_tokens=2048)
    while not search.done:
        search.tell(loss(np.array(search.ask().candidates)))
    return math.isclose(search.best.loss, loss(every).min(), rel_tol=1e-12)


def main() -> None:
    """Measure and write the tables."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    solvers.ilp(table(5, 6, "convex"))  # imports of peers are not what is measured
    text = "\n".join(
        [
            "# Separable solvers: time and certainty",
            "",
            *header("solvers.py", ["layerwise", "numpy", "scipy", "pulp", "highspy"]),
            f"- one core; time limit of the peers {TIME_LIMIT:g} s; one budget at 40 % of the range",
            "",
            "## One budget",
            "",
            *side_by_side(),
            "",
            "## Other questions",
            "",
            *other_questions(),
            "",
            "## Growth of `branch` with the number of units",
            "",
            *growth(),
            "",
            "## Tables that are not like a model's, `branch` with a time limit of 10 s",
            "",
            *hard_tables(),
            "",
            "## Evolution with the published numbers of evaluations",
            "",
            *evolution(),
            "",
        ]
    )
    (Path(__file__).parent / "results" / "solvers.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
