"""Held-out KL and perplexity of every way to quantize, all layers of the blocks at one level, beside the bytes written.

    python benchmarks/quantization.py [--small FOLDER] [--methods gptq rtn]

Writes benchmarks/results/quantization.md.
FOLDER is a third model, made by `small_llama.py`. A method joins with a line in ENTRIES. Effective bits are all bytes
of the level's tensors as they stand in a file, scales, zero points and padding included, over the weights. The second
table is the time of several bit-widths together beside that of one, side by side.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import header
from torch import Tensor

from layerwise.stages.calibrate import find_statistic
from layerwise.stages.compress import Compressor, Task, find_compressor
from layerwise.stages.compress.block_run import BlockRun
from layerwise.stages.compress.gptq import Params, quantized
from layerwise.stages.contract import ModelSource, TextSource
from layerwise.stages.data.text import cut, encode
from layerwise.stages.evaluate.evaluator import Evaluator
from layerwise.stages.evaluate.scoring import Request
from layerwise.stages.levels.level import Level
from layerwise.stages.models.causal_lm import CausalLM

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
DEMO = HERE.parent / "workflows" / "demo"
LENGTH, TOKENS = 128, 32 << 10


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


PUBLISHED = {"desc_act": False, "grid": "minmax"}
ENTRIES = [
    Entry("nearest, min-max", "rtn", {"group_size": 64}),
    Entry("nearest, mse", "rtn", {"group_size": 64, "grid": "mse"}),
    Entry("in order, min-max (the default before)", "gptq", {"group_size": 64, **PUBLISHED}),
    Entry("in order, hessian", "gptq", {"group_size": 64, "desc_act": False}),
    Entry("activation order, hessian", "gptq", {"group_size": 64, "desc_act": True}),
    Entry("static, min-max", "gptq", {"group_size": 64, "grid": "minmax"}),
    Entry("static, mse", "gptq", {"group_size": 64, "grid": "mse"}),
    Entry("static, hessian (the default)", "gptq", {"group_size": 64}),
    Entry("static, min-max, asymmetric", "gptq", {"group_size": 64, "grid": "minmax", "sym": False}),
    Entry("static, hessian, asymmetric", "gptq", {"group_size": 64, "sym": False}),
    Entry("the default, groups of 32", "gptq", {"group_size": 32}),
    Entry("groups of 32, 6-bit scales", "gptq", {"group_size": 32, "scale_bits": 6}),
    Entry("groups of 16, 6-bit scales", "gptq", {"group_size": 16, "scale_bits": 6}),
    Entry("groups of 16, 4-bit scales", "gptq", {"group_size": 16, "scale_bits": 4}),
    Entry("along outputs, groups of 32", "gptq", {"group_size": 32, "group_along": "outputs"}),
    Entry("damping 0.05", "gptq", {"group_size": 64, "damp_percent": 0.05}),
    Entry("sequential within blocks", "gptq_sequential", {"group_size": 64}),
    Entry("scale search", "awq", {"group_size": 64}),
    Entry("200 steps", "learned_rounding", {"group_size": 64, "steps": 200}),
    Entry("bitshift trellis", "trellis", {}, bits=(2, 2.5, 3, 4)),
]


class Calibrated:
    """A model with its calibration and held-out sequences.

    Args:
        name, folder: of the model.
        texts: for calibration, and held out.
    """

    def __init__(self, name: str, folder: Path, texts: tuple[Path, Path]) -> None:
        self.name, self.folder = name, folder
        self.network = CausalLM.load(ModelSource(folder))
        self.ids, self.heldout = (self._sequences(text) for text in texts)
        self._tasks: list[dict[str, Any]] = []

    def _sequences(self, text: Path) -> Tensor:
        source = TextSource(text.stem, (text,), LENGTH, TOKENS)
        return torch.from_numpy(cut(encode(source, self.folder), source)).long()

    def levels(self, entry: Entry, bits: float) -> dict[str, Level]:
        """Every unit's level, made from dense inputs."""
        found: dict[str, Level] = {}
        compressor = find_compressor(entry.method)
        params = compressor.params.model_validate({"method": entry.method, "bits": bits, **entry.params})
        for block in range(self.network.n_blocks):
            found |= self._of_block(block, compressor, params)
        return found

    def _of_block(self, block: int, compressor: Compressor, params: Any) -> dict[str, Level]:
        run, statistics_ = self._task(block)
        units = {unit.name: unit for unit in run.units}
        weights = {name: self.network.weight(unit).clone() for name, unit in units.items()}

        def statistic(unit: str, kind: str) -> Tensor:
            if (unit, kind) not in statistics_:
                inputs: list[Tensor] = []
                run.watch({}, [unit], lambda _, X: inputs.append(X))
                statistics_[unit, kind] = find_statistic(kind).measure(torch.cat(inputs))
            found: Tensor = statistics_[unit, kind]
            return found

        if compressor.params.scope == "block":
            made = compressor.run(Task(weights, statistic, units, block=run), params)
            return {name: level for name, (level,) in made.items()}
        made = {}
        for name, unit in units.items():
            made |= compressor.run(Task({name: weights[name]}, statistic, {name: unit}), params)
        return {name: level for name, (level,) in made.items()}

    def _task(self, block: int) -> Any:
        while len(self._tasks) <= block:
            index = len(self._tasks)
            inputs = self._tasks[-1][0].outputs if self._tasks else None
            if inputs is None:
                inputs = torch.cat([self.network.begin(part).hidden for part in self.ids.split(8)])
            units = [unit for unit in self.network.units if unit.block == index]
            run = BlockRun(self.network, index, units, self.ids, inputs, inputs)
            run.outputs = run.run({})
            self._tasks.append((run, {}))  # type: ignore[arg-type]
        return self._tasks[block]

    def score(self, levels: Mapping[str, Level]) -> tuple[float, float, float]:
        """Held-out KL, its standard error, and perplexity."""
        weights = {name: level.decode() for name, level in levels.items()}
        evaluator = Evaluator(self.network, self.heldout, _Candidate(weights))
        (score,) = evaluator(Request(((1,) * len(weights),), ("kl", "nll")))
        return score["kl"]["mean"], score["kl"]["stderr"], math.exp(score["nll"]["mean"])


@dataclass
class _Candidate:
    """One level beside the dense weight of every unit."""

    weights: Mapping[str, Tensor]

    @property
    def unit_names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def weight(self, unit: str, level: int, device: torch.device | str = "cpu") -> Tensor | None:
        return self.weights[unit] if level else None

    def drops(self, unit: str, level: int) -> bool:
        return False


def rows(model: Calibrated, entries: Sequence[Entry]) -> Iterator[str]:
    """One line of a table for each level."""
    for entry in entries:
        for bits in entry.bits:
            started = time.perf_counter()
            levels = model.levels(entry, bits)
            seconds = time.perf_counter() - started
            weights = sum(level.n_weights for level in levels.values())
            written = 8 * sum(level.size_bytes for level in levels.values()) / weights
            kl, stderr, perplexity = model.score(levels)
            line = f"| {entry.method} | {entry.label} | {bits:g} | {written:.3f} | {kl:.4f} ± {stderr:.4f} | "
            yield line + f"{perplexity:.2f} | {1e6 * seconds / weights:.1f} |"
            print(model.name, line, flush=True)


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


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", type=Path, help="a model of `small_llama.py`")
    parser.add_argument("--methods", nargs="*", default=sorted({entry.method for entry in ENTRIES}))
    parser.add_argument("--shared", type=Path, default=SHARED, help="where models and texts stand that are not ours")
    parser.add_argument("--size", type=int, default=4096, help="of the layer that is timed")
    given = parser.parse_args()
    models = [("the demo model", DEMO / "model", (DEMO / "calibration.txt", DEMO / "heldout.txt"))]
    tiny = given.shared / "data" / "tinystories_calibration.txt", given.shared / "data" / "tinystories_heldout.txt"
    if given.shared.is_dir():
        models.append(("stories260k", given.shared / "models" / "stories260k", tiny))
    if given.small:
        models.append(("a Llama of 128 x 4", given.small, tiny))
    lines = [
        "# Ways to quantize",
        "",
        *header("quantization.py", ["layerwise", "torch", "transformers"]),
        f"- all layers of the blocks at one level, made from dense inputs of {TOKENS} calibration tokens in sequences "
        f"of {LENGTH}; held-out KL to the dense model over as many tokens, with its standard error over sequences",
        "- effective bits: all bytes that are written for the levels; s/M: seconds for a million weights",
        "",
    ]
    for name, folder, texts in models:
        model = Calibrated(name, folder, texts)
        lines += [f"## {name[0].upper()}{name[1:]}", "", "| method | what | bits | effective bits | KL | ppl | s/M |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [*rows(model, [entry for entry in ENTRIES if entry.method in given.methods]), ""]
    lines += [f"## 2, 3, 4, 5, 6 and 8 bits of one {given.size} x {given.size} layer, over one of them alone", ""]
    lines += ["| grid | alone | s alone | together / alone | least to greatest |", "|---|---|---|---|---|"]
    lines += together(given.size)
    text = "\n".join(lines) + "\n"
    (HERE / "results" / "quantization.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
