"""Held-out KL and perplexity of every way to quantize at the bytes that are written, uniform, after `branch` and made
again, beside other people's own programs.

    python benchmarks/quantization.py --work FOLDER [--small FOLDER] [--peers FOLDER] [--methods gptq rtn]

Writes benchmarks/results/quantization.md. What was measured before stands in the folder `--work`, so that it can be
stopped at any time. `--small` is a third model, made by `small_llama.py`; with `--peers` AutoRound and llm-compressor
are run, too, in environments of their own in that folder. A method joins with a line in ENTRIES. The last table is the
time of several bit-widths together beside that of one, side by side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibrated import Calibrated, Levels, Scored, effective_bits
from machine import header
from peers import auto_round, llm_compressor, measured

from layerwise.errors import InfeasibleBudget
from layerwise.stages.compress import MenuEntry, find_compressor
from layerwise.stages.compress.gptq import Params, quantized

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
DEMO = HERE.parent / "workflows" / "demo"
LENGTH, TOKENS = 128, 16 << 10
ALONE = 2 << 10
"""Calibration tokens that the loss of one level alone is measured on."""
BUDGETS = (2.25, 2.5, 3.0, 4.0)
STEPS = 50
"""Of `apply` with `remake` and `steps`."""
TUNED = (2.25,)
"""Budgets whose allocations are also made again with steps."""
GROUP = {"group_size": 64}


@dataclass(frozen=True)
class Entry:
    """One way to quantize.

    Args:
        label: in the table.
        method: as in a menu.
        params: without bits.
        bits: one row for each.
    """

    label: str
    method: str
    params: Mapping[str, Any]
    bits: tuple[float, ...] = (2, 3, 4)

    @property
    def menu(self) -> MenuEntry:
        """As the parameters of its method."""
        params = {"method": self.method, "bits": list(self.bits), **self.params}
        return find_compressor(self.method).params.model_validate(params)


PUBLISHED = {"desc_act": False, "grid": "minmax"}
ASYMMETRIC = Entry("static, hessian, asymmetric", "gptq", {**GROUP, "sym": False})
LEARNED = Entry("200 steps, asymmetric, dense inputs", "learned_rounding", {**GROUP, "sym": False})
TRELLIS = Entry("bitshift trellis", "trellis", {}, bits=(1.5, 2, 2.5, 3, 4))
SMALL_GROUPS = Entry("groups of 16, 4-bit scales", "gptq", {"group_size": 16, "scale_bits": 4})
DEFAULT = Entry("static, hessian (the default)", "gptq", GROUP)
ENTRIES = [
    Entry("nearest, min-max", "rtn", GROUP),
    Entry("nearest, mse", "rtn", {**GROUP, "grid": "mse"}),
    Entry("in order, min-max (as published)", "gptq", {**GROUP, **PUBLISHED}),
    Entry("in order, min-max, asymmetric", "gptq", {**GROUP, **PUBLISHED, "sym": False}),
    Entry("in order, hessian", "gptq", {**GROUP, "desc_act": False}),
    Entry("activation order, hessian", "gptq", {**GROUP, "desc_act": True}),
    Entry("static, min-max", "gptq", {**GROUP, "grid": "minmax"}),
    Entry("static, mse", "gptq", {**GROUP, "grid": "mse"}),
    DEFAULT,
    Entry("static, min-max, asymmetric", "gptq", {**GROUP, "grid": "minmax", "sym": False}),
    Entry("static, mse, asymmetric", "gptq", {**GROUP, "grid": "mse", "sym": False}),
    ASYMMETRIC,
    SMALL_GROUPS,
    Entry("groups of 32, 6-bit scales, asymmetric", "gptq", {"group_size": 32, "scale_bits": 6, "sym": False}),
    Entry("along outputs, groups of 32", "gptq", {"group_size": 32, "group_along": "outputs"}),
    Entry("sequential within blocks, asymmetric", "gptq_sequential", {**GROUP, "sym": False}),
    Entry("scale search, asymmetric", "awq", {**GROUP, "sym": False}),
    LEARNED,
    TRELLIS,
]
MENUS = {"gptq": [DEFAULT, SMALL_GROUPS], "trellis": [TRELLIS], "both": [DEFAULT, SMALL_GROUPS, TRELLIS]}
SHARED_WORK = (
    "Multiplications and additions for n x n weights: all bit-widths share the factorisation, 4/3 n³ (Cholesky 1/3 n³, "
    "triangular solve n³); each has a pass of its own, n³ (column j corrects n - j columns of n rows), for each passes "
    "on errors of its own. Six over one: (4/3 + 6) / (4/3 + 1) = 3.1. For 2.0 the shared part would have to be 4 n³. "
    "All widths go through the columns in one pass already, stacked, which makes products faster but not fewer.",
    "",
)
"""What bounds the last table."""


class Made:
    """The levels of entries, each made once, and the lines that were measured before.

    Args:
        model: of it.
        work: a folder with the lines of earlier calls, in which those of this one are kept.
        kept_only: measure nothing.
    """

    def __init__(self, model: Calibrated, work: Path, kept_only: bool = False) -> None:
        self.model, self.kept_only = model, kept_only
        self._file = work / f"{model.name.replace(' ', '-')}.json"
        self._lines: dict[str, str] = json.loads(self._file.read_text("utf-8")) if self._file.is_file() else {}
        self._levels: dict[str, tuple[dict[str, Levels], float]] = {}

    def __call__(self, entry: Entry) -> tuple[dict[str, Levels], float]:
        """Levels by name, and seconds of this processor."""
        key = repr(entry.menu)
        if key not in self._levels:
            started = time.process_time()
            self._levels[key] = self.model.levels(entry.menu), time.process_time() - started
        return self._levels[key]

    def line(self, key: str, measure: Callable[[], str]) -> str:
        """A line of a table, read if it was measured before; empty for what cannot be, or was not."""
        if key not in self._lines and not self.kept_only:
            self._lines[key] = measure()
            self._file.write_text(json.dumps(self._lines, indent=1), encoding="utf-8")
            print(self.model.name, self._lines[key], flush=True)
        return self._lines.get(key, "")


def _figures(scored: Scored) -> str:
    return f"{scored.kl:.4f} ± {scored.stderr:.4f} | {scored.perplexity:.2f}"


def uniform(made: Made, entries: Sequence[Entry]) -> Iterator[str]:
    """One line of a table for each level."""
    model = made.model
    for entry in entries:
        for bits, name in zip(entry.bits, entry.menu.level_names(), strict=True):

            def measure(entry: Entry = entry, bits: float = bits, name: str = name) -> str:
                levels, seconds = made(entry)
                each = 1e6 * seconds / len(levels) / model.n_weights
                figures, size = _figures(model.score(levels[name])), effective_bits(levels[name])
                return f"| {entry.method} | {entry.label} | {bits:g} | {size:.2f} | {figures} | {each:.1f} |"

            line = made.line(f"uniform {name}", measure)
            if line:
                yield line


def searched(made: Made, menus: Mapping[str, Sequence[Entry]]) -> Iterator[str]:
    """One line for each menu and budget: what `branch` chooses, as it is and made again."""
    losses: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {}

    def alone(entry: Entry) -> np.ndarray[Any, np.dtype[np.float64]]:
        if entry.label not in losses:
            losses[entry.label] = made.model.alone(list(made(entry)[0].values()), ALONE)
        return losses[entry.label]

    for name, menu in menus.items():
        for budget in BUDGETS:

            def measure(name: str = name, menu: Sequence[Entry] = menu, budget: float = budget) -> str:
                model = made.model
                levels = [choice for entry in menu for choice in made(entry)[0].values()]
                try:
                    chosen = model.best(levels, np.hstack([alone(entry) for entry in menu]), budget)
                except InfeasibleBudget:
                    return ""
                entries = [entry.menu for entry in menu]
                again = [model.remade(chosen, entries, steps) for steps in ((0, STEPS) if budget in TUNED else (0,))]
                figures = [_figures(model.score(choice)) for choice in (chosen, *again)]
                figures += [" | "] * (3 - len(figures))
                return f"| {name} | {budget:g} | {effective_bits(chosen):.2f} | {' | '.join(figures)} |"

            line = made.line(f"searched {name} {budget}", measure)
            if line:
                yield line


def beside(made: Made, work: Path) -> Iterator[str]:
    """Other people's own programs on the same tokens: uniform, asymmetric, every layer with compressed inputs."""
    model = made.model

    def by_auto_round(bits: int) -> Any:
        return auto_round(work, model.network, bits, False, dense_inputs=False, folder=model.folder, ids=model.ids)

    def by_llm_compressor(bits: int) -> Any:
        return llm_compressor(work, model.network, bits, False, folder=model.folder, ids=model.ids)

    groups = sum(unit.shape[0] * -(-unit.shape[1] // 64) for unit in model.network.units if unit.block is not None)
    for label, what, make in (
        ("AutoRound", "200 steps, asymmetric, compressed inputs", by_auto_round),
        ("llm-compressor", "GPTQ, static, asymmetric", by_llm_compressor),
    ):
        for bits in (2, 3, 4):
            key = f"{model.name.replace(' ', '-')}-{make.__name__[3:]}-{bits}"
            if made.kept_only and not (work / f"{key}.json").is_file():
                continue
            row = measured(work, key, model.network, model.heldout, partial(make, bits))
            size = bits + (16 + bits) * groups / model.n_weights
            figures = _figures(Scored(row["kl"], row["stderr"], row["perplexity"]))
            seconds = 1e6 * row["seconds"] / model.n_weights
            yield f"| {label} | {what} | {bits} | {size:.2f} | {figures} | {seconds:.1f} |"


def together(size: int, repeats: int) -> list[str]:
    """Processor seconds of six bit-widths of one layer, and of one alone, side by side."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((size, size), generator=generator) * 0.02
    X = torch.randn((size, size + 256), generator=generator)
    hessian = X @ X.T
    lines = []
    for grid in ("minmax", "hessian"):
        for alone in (2, 4, 8):
            ratios, singles = [], []
            for _ in range(repeats):
                started = time.process_time()
                quantized(weight, hessian, Params(bits=(alone,), grid=grid))
                singles.append(time.process_time() - started)
                started = time.process_time()
                quantized(weight, hessian, Params(bits=(2, 3, 4, 5, 6, 8), grid=grid))
                ratios.append((time.process_time() - started) / singles[-1])
            lines.append(
                f"| {grid} | {alone} | {statistics.median(singles):.1f} | {statistics.median(ratios):.2f} | "
                f"{min(ratios):.2f} to {max(ratios):.2f} |"
            )
            print(lines[-1], flush=True)
    return lines


def _sections(made: Made, entries: Sequence[Entry], peers: Path | None) -> Iterator[str]:
    model = made.model
    yield from (f"## {model.name[0].upper()}{model.name[1:]}", "")
    yield from ("| method | what | bits | effective bits | KL | ppl | s/M |", "|---|---|---|---|---|---|---|")
    yield from uniform(made, entries)
    if peers is not None and all(unit.shape[1] % 32 == 0 for unit in model.network.units if unit.block is not None):
        yield from beside(made, peers)
    methods = {entry.method for entry in entries}
    menus = {name: menu for name, menu in MENUS.items() if {entry.method for entry in menu} <= methods}
    found = list(searched(made, menus))
    if found:
        yield from ("", f"After `branch`, from the KL of each level alone on {ALONE} calibration tokens:", "")
        yield (
            "| menu | budget | effective bits | KL | ppl | KL, made again | ppl, made again | KL, with steps | "
            "ppl, with steps |"
        )
        yield "|---|---|---|---|---|---|---|---|---|"
        yield from found
    yield ""


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--work", type=Path, required=True, help="lines that stand in this folder are not measured again"
    )
    parser.add_argument("--kept-only", action="store_true", help="write the page of what stands there; measure nothing")
    parser.add_argument("--small", type=Path, help="a model of `small_llama.py`")
    parser.add_argument("--peers", type=Path, help="run peers, too; environments and results stand in this folder")
    parser.add_argument("--methods", nargs="*", default=sorted({entry.method for entry in ENTRIES}))
    parser.add_argument("--shared", type=Path, default=SHARED, help="where models and texts stand that are not ours")
    parser.add_argument("--size", type=int, default=4096, help="of the layer that is timed; 0 for none")
    parser.add_argument("--repeats", type=int, default=3, help="of each timing of that layer")
    given = parser.parse_args()
    for folder in (given.work, given.peers):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    models = [("the demo model", DEMO / "model", (DEMO / "calibration.txt", DEMO / "heldout.txt"))]
    tiny = given.shared / "data" / "tinystories_calibration.txt", given.shared / "data" / "tinystories_heldout.txt"
    if given.shared.is_dir():
        models.append(("stories260k", given.shared / "models" / "stories260k", tiny))
    if given.small:
        models.append(("a Llama of 128 x 4", given.small, tiny))
    entries = [entry for entry in ENTRIES if entry.method in given.methods]
    lines = [
        "# Ways to quantize",
        "",
        *header("quantization.py", ["layerwise", "torch", "transformers"]),
        f"- all layers of the blocks; levels made from dense inputs of {TOKENS} calibration tokens in sequences of "
        f"{LENGTH}; held-out KL to the dense model over as many tokens, with its standard error over sequences",
        "- effective bits: all bytes that are written for the levels, padding included; s/M: processor seconds of one "
        "thread for a million weights, of all bit-widths of the entry together over their number",
        "- made again: the same allocation at the same bytes with `apply: {remake: true}`; seven of eight calibration "
        f"sequences make levels, the eighth chooses; with steps: and `steps: {STEPS}`",
        "- AutoRound 0.16.1, llm-compressor 0.14.0.1: their own programs in environments of their own, same tokens, "
        "wall seconds; AutoRound leaves layers as they are whose inputs are no multiple of 32, so there are no rows of "
        "them for stories260k",
        "- AutoRound's own default takes inputs behind the compressed blocks before, which a database of levels that "
        "can be mixed cannot; at equal inputs `learned_rounding` stands beside it in peers.md",
        "",
    ]
    if given.kept_only:
        lines.insert(-1, "- written with `--kept-only`: what has no row, or no s/M, was not measured")
    page = HERE / "results" / "quantization.md"
    for name, folder, texts in models:
        model = Calibrated(name, folder, texts, length=LENGTH, tokens=TOKENS)
        lines += _sections(Made(model, given.work, given.kept_only), entries, given.peers)
        page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    lines += ["## 2, 3, 4, 5, 6 and 8 bits of one layer, over one of them alone", "", *SHARED_WORK]
    if given.size:
        lines += [f"Measured on {given.size} x {given.size}:", ""]
        lines += ["| grid | alone | s alone | together / alone | least to greatest |", "|---|---|---|---|---|"]
        lines += together(given.size, given.repeats)
    else:
        lines.append("Not measured in this run.")
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
