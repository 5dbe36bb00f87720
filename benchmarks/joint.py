"""Whether one search over all kinds of compression is better than the best of one kind, and than one after another.

    python benchmarks/joint.py [bytes] [pairs] [--models demo stories260k] [--seeds 3]
                                            # writes benchmarks/results/joint-<part>-<model>.md, and a picture

`bytes`: at six budgets between a twentieth and a third of the dense model, the held-out KL of each kind alone and of
all together, by the integer program over measured losses and, with seeds, by evolutionary search from there.

`pairs`: under a budget of bytes and one of FLOPs at once. Bits alone save no operation, and pruning alone saves too few
bytes; so the joint search is compared with chains: first one kind to the FLOPs, then, on the model that this gives and
calibrated anew, bits to the bytes, each step with a search of its own.

Operations are those of the weights that are kept, whatever kernel there is for their pattern.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from machine import header, table
from real_models import OVERRIDES, at_hand

from layerwise.errors import InfeasibleBudget
from layerwise.pipeline.display import open_display
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.workflow import load_workflow
from layerwise.results.frontier import frontier_table
from layerwise.results.runs import latest_stages
from layerwise.stages.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    import pandas as pd

HERE = Path(__file__).parent
WORKFLOWS = HERE.parent / "workflows"

GROUP = 32
DENSE = {"method": "dense"}
BITS = {"method": "gptq", "bits": [2, 3, 4, 5, 6, 8], "group_size": GROUP}
SPARSE = {"method": "sparsegpt", "sparsity": [0.3, 0.5, 0.6, 0.7, 0.8, 0.9]}
FACTORS = {"method": "low_rank", "parameters": [0.1, 0.2, 0.3, 0.5, 0.7]}
NARROW = [{"method": "width", "keep": [0.5]}, {"method": "width", "units": "mlp", "keep": [0.25, 0.75]}]
DROP = {"method": "drop", "units": ["attention", "mlp", "block"]}
THEN = {"then": {"bits": [2, 3, 4, 6], "group_size": GROUP}}
KINDS: dict[str, list[dict[str, Any]]] = {
    "bits": [BITS, DENSE],
    "sparsity": [SPARSE, DENSE],
    "rank": [FACTORS, DENSE],
    "width": [*NARROW, DENSE],
    "depth": [DROP, DENSE],
    "joint": [
        BITS,
        SPARSE | THEN,
        FACTORS | {"then": {"bits": [4, 8], "group_size": GROUP}},
        *(entry | THEN for entry in NARROW),
        DROP,
        DENSE,
    ],
}
"""A kind alone keeps what it leaves in 16 bits; the joint menu rounds it, too."""
AND_BITS = ("sparsegpt", "low_rank", "width")
"""Methods whose levels in the joint menu are rounded, too."""
SHARES = (0.05, 0.08, 0.12, 0.18, 0.25, 0.33)
"""Budgets, as shares of the dense model's bytes."""

PAIRS = ((0.10, 0.5), (0.10, 0.75), (0.15, 0.5), (0.15, 0.75))
"""Budgets of bytes, of the dense model's, and of FLOPs, of what the dense units take."""

PROFILE_TOKENS = 2048

TITLES = {"bytes": "One search over all kinds, beside each kind alone", "pairs": "Two budgets at once, beside chains"}


def main() -> None:
    """Run and report what is named on the command line."""
    parser = argparse.ArgumentParser(description="Compare one search over all kinds with single kinds and chains.")
    parser.add_argument("parts", nargs="*", choices=list(TITLES), help="default: both")
    parser.add_argument("--models", nargs="*", choices=list(OVERRIDES), default=list(OVERRIDES))
    parser.add_argument(
        "--seeds", type=int, default=3, help="of the evolutionary search; 0 for the integer program only"
    )
    parser.add_argument("--results", type=Path, default=HERE.parent / "layerwise-results")
    arguments = parser.parse_args()
    for model in at_hand(arguments.models):
        bench = Bench(model, arguments.results, arguments.seeds)
        for part in arguments.parts or list(TITLES):
            text = bench.bytes() if part == "bytes" else bench.pairs()
            lines = [
                f"# {TITLES[part]}: {model}",
                "",
                *header("joint.py", ["layerwise", "torch", "transformers"]),
                "",
                *text,
            ]
            (HERE / "results" / f"joint-{part}-{model}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print("\n".join(lines))


class Bench:
    """The runs of one model.

    Args:
        model: a key of OVERRIDES.
        results: the results folder, where what was made before is found.
        seeds: of the evolutionary search.
    """

    def __init__(self, model: str, results: Path, seeds: int) -> None:
        self.model, self._results, self._seeds = model, results, seeds
        folder = load_workflow(WORKFLOWS / "joint.yaml", sets=OVERRIDES[model]).model.path
        assert folder is not None
        self._dense_bytes = Checkpoint(folder).size_bytes

    # --- one budget ---

    def bytes(self) -> list[str]:
        """Each kind at each budget of bytes."""
        budgets = [round(share * self._dense_bytes) for share in SHARES]
        found = {kind: self._searched(kind, {"bytes": budgets}) for kind in KINDS}
        singles = [kind for kind in KINDS if kind != "joint"]
        lines = [
            f"Held-out KL to the dense model of {self._dense_bytes:,} bytes. The integer program (`ilp`) minimises the "
            "sum of the units' own losses. A kind alone keeps what it leaves in 16 bits, so that at small budgets few "
            "or none of them are within reach, and the last column says little.",
            "",
        ]
        rows = []
        for share, budget in zip(SHARES, budgets, strict=True):
            losses = {kind: found[kind].get((budget, "ilp"), []) for kind in KINDS}
            ratio = _ratio(losses["joint"], [losses[kind] for kind in singles])
            rows.append([f"{budget:,}", f"{share:.0%}", *map(_number, losses.values()), ratio])
        lines += table(["bytes", "share", *(f"{kind} ilp" for kind in KINDS), "joint / best single"], rows)
        if self._seeds:
            rows = []
            for budget in budgets:
                bits, joint = (found[kind].get((budget, "evolve"), []) for kind in ("bits", "joint"))
                rows.append([f"{budget:,}", _number(bits), _number(joint), _paired(joint, bits)])
            lines += [
                "",
                f"By evolutionary search from there, mean over {self._seeds} seeds with the standard error; the last "
                "column is that of the differences of one seed.",
                "",
                *table(["bytes", "bits evolve", "joint evolve", "joint - bits"], rows),
            ]
        lines += ["", "What the joint allocations are made of (`ilp`):", "", *self._made_of, ""]
        self._plot(found, budgets)
        return [*lines, f"![held-out KL over bytes](joint-bytes-{self.model}.png)"]

    def _searched(self, kind: str, budgets: Mapping[str, Sequence[int]]) -> dict[tuple[int, str], list[float]]:
        """Held-out KL by budget and solver, one for each seed."""
        found: dict[tuple[int, str], list[float]] = {}
        seeds = range(self._seeds) if kind in ("bits", "joint") else range(0)
        for seed, solvers in [(0, ["ilp"]), *((seed, ["evolve"]) for seed in seeds)]:
            run = self._run("joint", kind, KINDS[kind], budgets, solvers, seed)
            if run is None:
                continue
            frame = frontier_table(run.store, run.id, over="bytes", dominated=True)
            for _, row in frame.iterrows():
                key = (int(str(row["budget"]).split("=")[1]), str(row["solver"]))
                found.setdefault(key, []).append(float(row["heldout_kl"]))
            if kind == "joint" and solvers == ["ilp"]:
                self._made_of = _levels(run, frame)
        return found

    # --- two budgets ---

    def pairs(self) -> list[str]:
        """The joint search and each chain at each pair."""
        whole = self._run("joint", "bits", KINDS["bits"], {"bytes": [self._dense_bytes]}, ["ilp"])
        assert whole is not None, "the dense model's bytes are enough"
        flops = float(frontier_table(whole.store, whole.id, over="bytes", dominated=True)["flops"].max())
        chains = ("depth", "width", "sparsity")
        rows, menu = [], KINDS["joint"]
        for of_bytes, of_flops in PAIRS:
            budget = {"bytes": [round(of_bytes * self._dense_bytes)]}
            both = budget | {"flops": [round(of_flops * flops)]}
            losses = {"joint": _best(self._run("joint", "joint", menu, both, ["ilp"]))}
            for kind in chains:
                sets = [f"params.first={json.dumps(KINDS[kind])}", f"params.flops={both['flops'][0]}"]
                losses[kind] = _best(self._run("chain", kind, KINDS["bits"], budget, ["ilp"], sets=sets))
            ratio = _ratio(losses["joint"], [losses[kind] for kind in chains])
            rows.append([f"{of_bytes:.0%}", f"{of_flops:.0%}", *map(_number, losses.values()), ratio])
        names = ["joint", *(f"{kind}, then bits" for kind in chains)]
        return [
            f"Shares of the dense model's {self._dense_bytes:,} bytes, and of its {flops:,.0f} FLOPs a token. Held-out "
            "KL, by the integer program over measured losses in every step.",
            "",
            *table(["bytes", "FLOPs", *names, "joint / best chain"], rows),
        ]

    # --- runs ---

    def _run(
        self,
        workflow: str,
        kind: str,
        menu: Sequence[Mapping[str, Any]],
        budgets: Mapping[str, Sequence[int]],
        solvers: Sequence[str],
        seed: int = 0,
        sets: Sequence[str] = (),
    ) -> Run | None:
        """A workflow with that menu; None if it reaches none of the budgets. What it cannot reach is left out."""
        path = WORKFLOWS / "joint.yaml" if workflow == "joint" else HERE / "joint_chain.yaml"
        last = [f"stages.best.needs=[levels, search@{solvers[0]}]"] if workflow == "joint" else []
        while all(budgets.values()):
            given = {"menu": menu, "budgets": budgets, "solvers": list(solvers), "seed": seed}
            chosen = [f"params.{key}={json.dumps(value)}" for key, value in given.items()]
            name = [f"name={workflow}-{kind}-{self.model}", f"stages.profile.with.tokens={PROFILE_TOKENS}"]
            run = Run(
                load_workflow(path, sets=[*OVERRIDES[self.model], *name, *chosen, *sets, *last]),
                self._results,
                open_display(),
            )
            try:
                run.execute("inline", sys.argv)
                return run
            except InfeasibleBudget as error:
                print(f"{kind}: {error.message}", file=sys.stderr)
                reached = [budget for budget in budgets[error.resource] if budget >= error.reachable]
                if reached == budgets[error.resource]:  # of the first step of a chain, or only of all budgets together
                    return None
                budgets = {**budgets, error.resource: reached}
        return None

    def _plot(self, found: Mapping[str, Mapping[tuple[int, str], Sequence[float]]], budgets: Sequence[int]) -> None:
        """Every kind's losses over bytes, the better of its two searches at each."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for kind, losses in found.items():
            points = [
                (b, min(mean(v) for (c, _), v in losses.items() if c == b)) for b in budgets if (b, "ilp") in losses
            ]
            below: dict[str, Any] = {"color": "black", "linewidth": 6, "alpha": 0.3, "zorder": 1}  # others stay visible
            style = below if kind == "joint" else {"linewidth": 1.2}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=kind, **style)
        axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="held-out KL to the dense model", title=self.model)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(HERE / "results" / f"joint-bytes-{self.model}.png", dpi=120)


def _best(run: Run | None) -> list[float]:
    """The least held-out KL of a run; none of none."""
    if run is None:
        return []
    return [float(frontier_table(run.store, run.id, over="bytes", dominated=True)["heldout_kl"].min())]


def _ratio(joint: Sequence[float], singles: Sequence[Sequence[float]]) -> str:
    """The joint loss over that of the best single kind."""
    known = [mean(losses) for losses in singles if losses]
    return f"{mean(joint) / min(known):.2f}" if joint and known else ""


def _number(losses: Sequence[float]) -> str:
    """Their mean, with its standard error if there are several."""
    if not losses:
        return "out of reach"
    error = f" ± {stdev(losses) / len(losses) ** 0.5:.1g}" if len(losses) > 1 else ""
    return f"{mean(losses):.4g}{error}"


def _paired(some: Sequence[float], others: Sequence[float]) -> str:
    """The mean of the differences, with its standard error."""
    if not some or len(some) != len(others):
        return ""
    return _number([one - other for one, other in zip(some, others, strict=True)])


def _levels(run: Run, frame: pd.DataFrame) -> list[str]:
    """How many units of each allocation have a level of which method."""
    from collections import Counter

    keys = [row["stage_key"] for row in latest_stages(run.store, run.id).values() if row["uses"] == "allocate"]
    found = {row["candidate"]: row for row in run.store.rows("allocations", stage_key=keys)}
    lines = []
    for _, row in frame.iterrows():
        methods = Counter(_kind(level) for level in found[row["candidate"]]["levels"])
        lines.append(f"- {row['bytes']:,} bytes: " + ", ".join(f"{n} {kind}" for kind, n in methods.most_common()))
    return lines


def _kind(level: str) -> str:
    """What a level's name says of its method; `kept` of a parent that is as it was."""
    method = {"keep": "kept"}.get(level, level.split("-", maxsplit=1)[0])
    return f"{method} and bits" if method in AND_BITS else method


if __name__ == "__main__":
    main()
