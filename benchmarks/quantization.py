"""Held-out KL and perplexity of every way to quantize at the bytes that are written, uniform, after `branch` and made
again, beside AutoRound's own program.

    python benchmarks/quantization.py [--small FOLDER] [--peers FOLDER] [--methods gptq rtn]

Writes benchmarks/results/quantization.md. `--small` is a third model, made by `small_llama.py`; with `--peers` also
AutoRound is run, in an environment of its own there. A method joins with a line in ENTRIES. The last table is the
time of several bit-widths together beside that of one, side by side.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from calibrated import Calibrated, Levels, Scored, effective_bits
from machine import header
from peers import auto_round, measured

from layerwise.errors import LayerwiseError
from layerwise.stages.compress import MenuEntry, find_compressor
from layerwise.stages.compress.gptq import Params, quantized

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
DEMO = HERE.parent / "workflows" / "demo"
LENGTH, TOKENS = 128, 16 << 10
ALONE = 2 << 10
"""Calibration tokens that the loss of one level alone is measured on."""
BUDGETS = (2.1, 2.25, 2.3, 2.5, 2.62, 3.0, 4.0)
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
LEARNED = Entry("200 steps, asymmetric", "learned_rounding", {**GROUP, "sym": False})
TRELLIS = Entry("bitshift trellis", "trellis", {}, bits=(1.5, 2, 2.5, 3, 3.5, 4))
ENTRIES = [
    Entry("nearest, min-max", "rtn", GROUP),
    Entry("nearest, mse", "rtn", {**GROUP, "grid": "mse"}),
    Entry("in order, min-max (as published)", "gptq", {**GROUP, **PUBLISHED}),
    Entry("in order, min-max, asymmetric", "gptq", {**GROUP, **PUBLISHED, "sym": False}),
    Entry("in order, hessian", "gptq", {**GROUP, "desc_act": False}),
    Entry("activation order, hessian", "gptq", {**GROUP, "desc_act": True}),
    Entry("static, min-max", "gptq", {**GROUP, "grid": "minmax"}),
    Entry("static, mse", "gptq", {**GROUP, "grid": "mse"}),
    Entry("static, hessian (the default)", "gptq", GROUP),
    Entry("static, min-max, asymmetric", "gptq", {**GROUP, "grid": "minmax", "sym": False}),
    Entry("static, mse, asymmetric", "gptq", {**GROUP, "grid": "mse", "sym": False}),
    ASYMMETRIC,
    Entry("groups of 16, 4-bit scales", "gptq", {"group_size": 16, "scale_bits": 4}),
    Entry("groups of 32, 6-bit scales, asymmetric", "gptq", {"group_size": 32, "scale_bits": 6, "sym": False}),
    Entry("along outputs, groups of 32", "gptq", {"group_size": 32, "group_along": "outputs"}),
    Entry("sequential within blocks, asymmetric", "gptq_sequential", {**GROUP, "sym": False}),
    Entry("scale search, asymmetric", "awq", {**GROUP, "sym": False}),
    LEARNED,
    TRELLIS,
]
MENUS = {"gptq": [ASYMMETRIC], "learned_rounding": [LEARNED], "trellis": [TRELLIS]}
MENUS["all three"] = [entry for menu in MENUS.values() for entry in menu]


class Made:
    """The levels of entries, each made once.

    Args:
        model: of it.
    """

    def __init__(self, model: Calibrated) -> None:
        self.model = model
        self._levels: dict[str, tuple[dict[str, Levels], float]] = {}

    def __call__(self, entry: Entry) -> tuple[dict[str, Levels], float]:
        """Levels by name, and seconds."""
        key = repr(entry.menu)
        if key not in self._levels:
            started = time.perf_counter()
            self._levels[key] = self.model.levels(entry.menu), time.perf_counter() - started
        return self._levels[key]


def _figures(scored: Scored) -> str:
    return f"{scored.kl:.4f} ± {scored.stderr:.4f} | {scored.perplexity:.2f}"


def uniform(made: Made, entries: Sequence[Entry]) -> Iterator[str]:
    """One line of a table for each level."""
    model = made.model
    for entry in entries:
        levels, seconds = made(entry)
        each = 1e6 * seconds / len(levels) / model.n_weights
        for bits, choice in zip(entry.bits, levels.values(), strict=True):
            figures = _figures(model.score(choice))
            line = (
                f"| {entry.method} | {entry.label} | {bits:g} | {effective_bits(choice):.2f} | {figures} | {each:.1f} |"
            )
            print(model.name, line, flush=True)
            yield line


def searched(made: Made, menus: Mapping[str, Sequence[Entry]]) -> Iterator[str]:
    """One line for each menu and budget: what `branch` chooses, as it is and made again."""
    model = made.model
    losses = {
        entry.label: model.alone(list(made(entry)[0].values()), ALONE) for menu in menus.values() for entry in menu
    }
    for name, menu in menus.items():
        levels = [choice for entry in menu for choice in made(entry)[0].values()]
        table = torch.cat([torch.from_numpy(losses[entry.label]) for entry in menu], dim=1).numpy()
        for budget in BUDGETS:
            try:
                chosen = model.best(levels, table, budget)
            except LayerwiseError:
                continue
            again = model.remade(chosen, [entry.menu for entry in menu])
            figures = " | ".join(_figures(model.score(choice)) for choice in (chosen, again))
            line = f"| {name} | {budget:g} | {effective_bits(chosen):.2f} | {figures} |"
            print(model.name, line, flush=True)
            yield line


def beside(model: Calibrated, work: Path) -> Iterator[str]:
    """AutoRound's own program on the same tokens: uniform, asymmetric, every block with compressed inputs."""
    for bits in (2, 3, 4):

        def make(bits: int = bits) -> Any:
            return auto_round(work, model.network, bits, False, dense_inputs=False, folder=model.folder, ids=model.ids)

        row = measured(work, f"{model.name.replace(' ', '-')}-auto_round-{bits}", model.network, model.heldout, make)
        groups = sum(unit.shape[0] * -(-unit.shape[1] // 64) for unit in model.network.units if unit.block is not None)
        size = bits + (16 + bits) * groups / model.n_weights
        figures = _figures(Scored(row["kl"], row["stderr"], row["perplexity"]))
        seconds = 1e6 * row["seconds"] / model.n_weights
        yield f"| AutoRound | 200 steps, asymmetric | {bits} | {size:.2f} | {figures} | {seconds:.1f} |"


def together(size: int, repeats: int = 3) -> list[str]:
    """Seconds of six bit-widths of one layer, and of one alone, side by side."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((size, size), generator=generator) * 0.02
    X = torch.randn((size, size + 256), generator=generator)
    hessian = X @ X.T
    lines = []
    for grid in ("minmax", "hessian"):
        for alone in (2, 4, 8):
            ratios, singles = [], []
            for _ in range(repeats):
                started = time.perf_counter()
                quantized(weight, hessian, Params(bits=(alone,), grid=grid))
                singles.append(time.perf_counter() - started)
                started = time.perf_counter()
                quantized(weight, hessian, Params(bits=(2, 3, 4, 5, 6, 8), grid=grid))
                ratios.append((time.perf_counter() - started) / singles[-1])
            lines.append(
                f"| {grid} | {alone} | {statistics.median(singles):.1f} | {statistics.median(ratios):.2f} | "
                f"{min(ratios):.2f} to {max(ratios):.2f} |"
            )
    return lines


def _sections(model: Calibrated, entries: Sequence[Entry], peers: Path | None) -> Iterator[str]:
    made = Made(model)
    yield from (f"## {model.name[0].upper()}{model.name[1:]}", "")
    yield from ("| method | what | bits | effective bits | KL | ppl | s/M |", "|---|---|---|---|---|---|---|")
    yield from uniform(made, entries)
    if peers is not None and all(unit.shape[1] % 32 == 0 for unit in model.network.units if unit.block is not None):
        yield from beside(model, peers)
    methods = {entry.method for entry in entries}
    menus = {name: menu for name, menu in MENUS.items() if {entry.method for entry in menu} <= methods}
    if menus:
        yield from ("", f"After `branch`, from the KL of each level alone on {ALONE} calibration tokens:", "")
        yield "| menu | budget | effective bits | KL | ppl | KL, made again | ppl, made again |"
        yield "|---|---|---|---|---|---|---|"
        yield from searched(made, menus)
    yield ""


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", type=Path, help="a model of `small_llama.py`")
    parser.add_argument("--peers", type=Path, help="run AutoRound, too; environments and results stand in this folder")
    parser.add_argument("--methods", nargs="*", default=sorted({entry.method for entry in ENTRIES}))
    parser.add_argument("--shared", type=Path, default=SHARED, help="where models and texts stand that are not ours")
    parser.add_argument("--size", type=int, default=4096, help="of the layer that is timed; 0 for none")
    given = parser.parse_args()
    if given.peers is not None:
        given.peers.mkdir(parents=True, exist_ok=True)
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
        "- effective bits: all bytes that are written for the levels, padding included; s/M: seconds of one thread for "
        "a million weights, of all bit-widths of the entry together over their number",
        "- made again: the same allocation at the same bytes with `apply: {remake: true}`; seven of eight calibration "
        "sequences make levels, the eighth chooses",
        "- AutoRound: its own program in an environment of its own, same tokens; it leaves layers as they are whose "
        "inputs are no multiple of 32, so it has no rows for stories260k",
        "",
    ]
    for name, folder, texts in models:
        model = Calibrated(name, folder, texts, length=LENGTH, tokens=TOKENS)
        lines += _sections(model, entries, given.peers)
    if given.size:
        lines += [f"## 2, 3, 4, 5, 6 and 8 bits of one {given.size} x {given.size} layer, over one of them alone", ""]
        lines += ["| grid | alone | s alone | together / alone | least to greatest |", "|---|---|---|---|---|"]
        lines += together(given.size)
    text = "\n".join(lines).rstrip() + "\n"
    (HERE / "results" / "quantization.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
