"""What every repair wins back: held-out KL and perplexity before and after, at equal tokens, beside the bytes.

    python benchmarks/recovery.py [--model FOLDER --texts CALIBRATION HELDOUT] --work FOLDER
        [--steps 100] [--only 2-bits 60%-sparse] [--repairs perp qat] [--finalists]

Writes benchmarks/results/recovery-<model>.md; without a model, that of the demo. What stands in `rows.json` and
`finalists.json` of the folder `--work` already is not measured again. All layers of the blocks are at one level. The
models are scored by the stages themselves: what is reported is what was written.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import header

from layerwise.stages import find_stage
from layerwise.stages.allocate.stage import AllocateParams
from layerwise.stages.contract import ModelSource, TextSource
from layerwise.stages.models.causal_lm import CausalLM
from layerwise.stages.models.compressed import CompressedModel, source_of
from layerwise.testing import Bench

HERE = Path(__file__).parent
DEMO = HERE.parent / "workflows" / "demo"
LENGTH, BATCH = 128, 8

GRIDS = [
    "refit", "svd", "eora", "statistics", "step_size", "perp", "lora", "qat", "qat, text", "block_qat",
    "block_qat + step_size", "block_qat + qat",
]  # fmt: skip
SETTINGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "2-bits": ({"method": "gptq", "bits": 2, "group_size": 32}, GRIDS),
    "60%-sparse": (
        {"method": "magnitude", "sparsity": 0.6},
        [
            "refit",
            "eora",
            "statistics",
            "finetune",
            "finetune, text",
            "finetune, hidden states",
            "sparse_training",
            "perp",
            "lora",
        ],
    ),
    "3-bits": ({"method": "gptq", "bits": 3, "group_size": 32}, GRIDS),
    "quarter-dropped": (
        {"method": "rtn", "bits": 8, "group_size": 32},
        ["statistics", "perp", "perp, text", "qat", "lora"],
    ),
}
"""The level of all units, and what it is repaired by. In `quarter-dropped` half-blocks at even distances are left out
besides, as many as it takes for a quarter; the rest is at 8 bits, where repairs of levels can work."""

RANK = 4


def repairs(label: str, steps: int) -> list[dict[str, Any]]:
    """The entries of a workflow that a label stands for; several share the steps, and so the tokens."""
    methods, _, loss = label.partition(", ")
    names = methods.split(" + ")
    return [_repair(name, loss, steps // len(names)) for name in names]


def _repair(method: str, loss: str, steps: int) -> dict[str, Any]:
    if method in ("svd", "eora"):
        return {"method": method, "rank": RANK}
    if method in ("refit", "statistics"):
        return {"method": method}
    losses = {"": {"kl": 1.0}, "text": {"cross_entropy": 1.0}, "hidden states": {"squarehead": 1.0, "kl": 1.0}}
    entry = {"method": method, "steps": steps, "batch_size": BATCH, "check_every": max(1, steps // 4)}
    return entry | {"loss": losses[loss]} | ({"rank": RANK} if method == "lora" else {})


def compressed(bench: Bench, setting: str, statistics: Path) -> Path:
    """A model whose units are all at the level of a setting."""
    level, dropped = SETTINGS[setting][0], setting == "quarter-dropped"
    menu = [level, {"method": "drop"}] if dropped else [level]
    levels = bench.run("compress", {"menu": menu}, statistics=statistics)
    if dropped:
        given = {"solver": "even", "budgets": {"depth": "75%", "bits": level["bits"]}}
        chosen = bench.run("allocate", given, database=levels)
        return bench.run("apply", {"pick": "smallest"}, allocations=chosen, database=levels)
    budget = {"bits": level["bits"]} if "bits" in level else {"parameters": "100%"}
    profile = bench.run("profile", {"tokens": 1024, "metrics": ["output_error"]}, database=levels)
    chosen = bench.run("allocate", {"solver": "uniform", "budgets": budget}, database=levels, profile=profile)
    return bench.run("apply", {"pick": "smallest"}, allocations=chosen, database=levels)


def figures(bench: Bench, model: Path) -> dict[str, float]:
    """Held-out KL and perplexity of a model, bytes and effective bits of its units."""
    scores = json.loads((bench.run("evaluate", {}, models=[model]) / "metrics.json").read_text())
    (mine,) = (score for name, score in scores.items() if name != "dense")
    levels = CompressedModel(model)
    units = [levels.level(made.unit.name) for made in levels.document.units if not made.unit.is_parent]
    return {
        "kl": mine["kl"]["mean"],
        "perplexity": 2.718281828459045 ** mine["nll"]["mean"],
        "bytes": sum(level.size_bytes for level in units),
        "effective_bits": sum(level.stored_bits for level in units) / sum(level.n_weights for level in units),
    }


def measure(args: argparse.Namespace, model: ModelSource, data: Mapping[str, TextSource]) -> dict[str, Any]:
    """All rows, by setting and repair; those that are known are not measured again."""
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "rows.json"
    rows: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    folder = args.work / f"bench-{time.time_ns()}"
    folder.mkdir()
    bench = Bench(folder, model, data)
    statistics = bench.run("calibrate", {"statistics": ["hessian"]})
    for setting in args.only or SETTINGS:
        labels = SETTINGS[setting][1]
        wanted = [label for label in labels if args.repairs is None or label in args.repairs]
        missing = [label for label in ["none", *wanted] if f"{setting}/{label}/{args.steps}" not in rows]
        base = compressed(bench, setting, statistics) if missing else statistics
        for label in missing:
            began, made = time.perf_counter(), base
            if label != "none":
                given = {"repairs": repairs(label, args.steps)}
                made = bench.run("recover", given, model=base, statistics=statistics)
            seconds = time.perf_counter() - began
            rows[f"{setting}/{label}/{args.steps}"] = {**figures(bench, made), "seconds": seconds}
            kept.write_text(json.dumps(rows, indent=1))
            print(setting, label, rows[f"{setting}/{label}/{args.steps}"], flush=True)
    return rows


def table(rows: Mapping[str, Any], setting: str, steps: int) -> list[str]:
    """One setting as Markdown."""
    before = rows.get(f"{setting}/none/{steps}")
    if before is None:
        return [f"## {setting}", "", "Not run.", ""]
    lines = [
        f"## {setting}",
        "",
        "| repair | KL | gap closed | perplexity | effective bits | bytes of the units |",
        "|---|---|---|---|---|---|",
    ]
    for label in ["none", *SETTINGS[setting][1]]:
        row = rows.get(f"{setting}/{label}/{steps}")
        if row is None:
            lines.append(f"| {label} | not run | | | | |")
            continue
        closed = "" if label == "none" else f"{1 - row['kl'] / before['kl']:.0%}"
        lines.append(
            f"| {label} | {row['kl']:.4f} | {closed} | {row['perplexity']:.2f} | {row['effective_bits']:.3f} "
            f"| {row['bytes']:,} |"
        )
    return [*lines, ""]


def finalists(bench: Bench) -> list[str]:
    """Searches whose finalists are compared after a repair, as Markdown: the frontier before and after, by bytes."""
    statistics = bench.run("calibrate", {"statistics": ["hessian"]})
    menu = [{"method": "gptq", "bits": [2, 3, 4], "group_size": 32}]
    levels = bench.run("compress", {"menu": menu}, statistics=statistics)
    profile = bench.run("profile", {"tokens": 2048}, database=levels)
    search = {
        "solver": "evolve", "budgets": {"bits": [2.25, 2.75, 3.25]}, "generations": 4, "offspring": 6,
        "survivors_per_selection": [3, 1], "tokens_per_selection": [1024, 4096], "finalists": 4, "data": "search",
    }  # fmt: skip
    lines = [
        "## Finalists compared after a repair",
        "",
        "`allocate: {solver: evolve, finalists: 4, recover: ...}`; KL on 8,192 tokens of the search data, which are "
        "among those of the statistics; bytes of the whole model. Before: what the search chooses without. Rank "
        "changes: of the budget's finalists. At or below: the best repaired allocation no larger than this one "
        "against the best unrepaired one that is no larger.",
        "",
        "| repair | budget | KL before | bytes | KL after | bytes | rank changes | at or below |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in ({"method": "refit"}, {"method": "eora", "rank": RANK}):
        inputs = {"database": levels, "profile": profile, "statistics": statistics}
        attempt = bench.attempt(
            find_stage("allocate"), AllocateParams.model_validate({**search, "recover": entry}), inputs
        )
        attempt.run()
        rows = attempt.rows["allocations"]
        for row in rows:
            size = row["recovered_bytes"]
            best = [
                min((one[f"{which}_kl"] for one in rows if one[f"{which}_bytes"] <= size), default=float("inf"))
                for which in ("recovered", "unrepaired")
            ]
            lines.append(
                f"| {row['repair']} | {row['budget']} | {row['unrepaired_kl']:.4f} | {row['unrepaired_bytes']:,} "
                f"| {row['recovered_kl']:.4f} | {size:,} | {row['ranks_changed']} of {row['finalists']} "
                f"| {'yes' if best[0] <= best[1] else 'no'} |"
            )
    return [*lines, ""]


def loop_speed(model: ModelSource, base: Path, steps: int = 12) -> dict[str, float]:
    """Steps a second of the loop and of a bare PyTorch loop that does the same work, in turns, medians."""
    from layerwise.stages.recover.perp import Parameters
    from layerwise.stages.recover.training import Trainer
    from layerwise.stages.recover.training_params import TrainingParams

    student, teacher = CausalLM.load(source_of(base, model)), CausalLM.load(model)
    ids = torch.randint(0, 256, (16, LENGTH), generator=torch.Generator().manual_seed(0))
    given = {"method": "perp", "batch_size": BATCH, "steps": steps, "check_every": steps}
    params = TrainingParams.model_validate(given)
    trainer = Trainer(student, teacher, [Parameters(student)], ids, ids[:1], params, base)
    bare = CausalLM.load(source_of(base, model))
    leaves = [one.requires_grad_(True) for one in bare.model.parameters() if one.dim() == 1]
    optimizer = torch.optim.AdamW(leaves, lr=1e-3)
    known = [teacher.logits(ids[:BATCH]), teacher.logits(ids[BATCH:])]  # the loop keeps its teacher's answers, too

    def plain(step: int) -> None:
        p = known[step % 2].log_softmax(-1)
        q = bare.model(input_ids=ids[step % 2 * BATCH :][:BATCH], use_cache=False).logits.log_softmax(-1)
        (p.exp() * (p - q)).sum(-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    trainer._step(0)
    trainer._step(1)
    times: dict[str, list[float]] = {"loop": [], "bare": []}
    for step in range(2, 2 + steps):
        for name, work in (("loop", trainer._step), ("bare", plain)):
            began = time.process_time()
            work(step)
            times[name].append(time.process_time() - began)
    return {name: sorted(some)[len(some) // 2] for name, some in times.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--texts", type=Path, nargs=2, default=[DEMO / "calibration.txt", DEMO / "heldout.txt"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="*", choices=SETTINGS)
    parser.add_argument("--repairs", nargs="*", help="only these rows")
    parser.add_argument("--finalists", action="store_true", help="also the frontier before and after a repair")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    name = "demo" if args.model is None else args.model.name
    model = ModelSource(args.model or DEMO / "model")
    sizes = {"calibration": 64 << 10, "heldout": 16 << 10}
    data = {key: TextSource(key, (path,), LENGTH, sizes[key]) for key, path in zip(sizes, args.texts, strict=True)}
    data["search"] = TextSource("search", (args.texts[0],), LENGTH, 8 << 10)
    rows = measure(args, model, data)
    lines = [f"# Repairs, {name}", "", *header("recovery.py", ["torch", "transformers"])]
    lines += [
        f"- all layers of the blocks at one level; training: {args.steps} steps of {BATCH} sequences of {LENGTH} "
        f"tokens, the defaults else, by KL to the dense model; `text`: by cross-entropy; `hidden states`: squarehead "
        f"and KL; adapters of rank {RANK}; `a + b`: half of the steps each; `block_qat` takes its steps in every "
        "block, and so as many tokens of each block as the others",
        "- KL(dense || model) in nats per token on 16,384 held-out tokens",
        "",
    ]
    for setting in SETTINGS:
        lines += table(rows, setting, args.steps)
    bench = Bench(args.work / f"bench-{time.time_ns()}", model, data)
    bench.folder.mkdir()
    if args.finalists:
        known = args.work / "finalists.json"
        if not known.is_file():
            known.write_text(json.dumps(finalists(bench)))
        lines += json.loads(known.read_text())
    base = compressed(bench, "2-bits", bench.run("calibrate", {"statistics": ["hessian"]}))
    speed = loop_speed(model, base)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines += [
        "## The loop",
        "",
        f"A step of `perp` takes {1e3 * speed['loop']:.1f} ms of a processor, of a bare PyTorch loop that does the "
        f"same {1e3 * speed['bare']:.1f} ms (medians of steps in turns): {speed['bare'] / speed['loop']:.0%} of its "
        f"steps per second. Peak memory of the whole benchmark {peak:.0f} MiB.",
    ]
    (HERE / "results" / f"recovery-{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
