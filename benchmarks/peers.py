"""`learned_rounding` beside AutoRound's own program: same model, tokens, groups and steps.

    python benchmarks/peers.py --work FOLDER [--bits 2 3 4]      # writes benchmarks/results/peers.md

Each peer runs in a virtual environment of its own, made in FOLDER from the pins in `benchmarks/peers/`, and writes the
weights that its quantized model computes with; all are scored by our evaluator on the same held-out text. What is done
already stands in FOLDER as JSON and is not done again. Every block layer gets the same bits; the rest stays as it is.

Effective bits count codes, a float16 scale for each group and, if asymmetric, a zero point of as many bits as a weight.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
from machine import header
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerwise.stages.compress import Task
from layerwise.stages.compress.block_run import BlockRun
from layerwise.stages.compress.learned_rounding import Params, learned_rounding
from layerwise.stages.contract import ModelSource, TextSource
from layerwise.stages.data.text import cut, encode
from layerwise.stages.evaluate.evaluator import Evaluator
from layerwise.stages.evaluate.scoring import Request
from layerwise.stages.models.causal_lm import CausalLM

HERE = Path(__file__).parent
DEMO = HERE.parent / "workflows" / "demo"
GROUP_SIZE, STEPS, LENGTH = 64, 200, 128
CALIBRATION, HELDOUT = 16 << 10, 16 << 10
Made = tuple[dict[str, Tensor], float]
"""Weights by unit, and the seconds that it took."""


@dataclass
class Candidate:
    """Weights to be scored, a `LevelSource` with one level beside the dense one."""

    weights: Mapping[str, Tensor]

    @property
    def unit_names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def weight(self, unit: str, level: int, device: torch.device | str = "cpu") -> Tensor | None:
        return self.weights[unit].to(device) if level else None

    def drops(self, unit: str, level: int) -> bool:
        return False

    def narrows(self, unit: str, level: int) -> dict[str, int]:
        return {}


def sequences(text: str, tokens: int) -> Tensor:
    """(sequences, LENGTH) int64, spread over a text of the demo."""
    source = TextSource(text, (DEMO / f"{text}.txt",), LENGTH, tokens)
    return torch.from_numpy(cut(encode(source, DEMO / "model"), source)).long()


def ours(network: CausalLM, ids: Tensor, bits: int, sym: bool, *, dense_inputs: bool) -> Made:
    """`learned_rounding`, block by block, with dense inputs or those that the compressed blocks before leave."""
    params = Params(bits=bits, group_size=GROUP_SIZE, sym=sym, steps=STEPS)
    dense = torch.cat([network.begin(part).hidden for part in ids.split(8)])
    inputs, found = dense, {}
    started = time.perf_counter()
    for index in range(network.n_blocks):
        units = {unit.name: unit for unit in network.units if unit.block == index}
        dense_run = BlockRun(network, index, list(units.values()), ids, dense, dense)
        answers = dense_run.run({})
        run = BlockRun(network, index, list(units.values()), ids, dense if dense_inputs else inputs, answers)
        weights = {name: network.weight(unit).clone() for name, unit in units.items()}
        made = learned_rounding(Task(weights, lambda unit, kind: torch.empty(0), units, block=run), params)
        decoded = {name: level.decode() for name, (level,) in made.items()}
        inputs, dense = run.run(decoded), answers
        found |= decoded
    return found, time.perf_counter() - started


def environment(work: Path, peer: str) -> Path:
    """The Python of a peer's virtual environment; made if it is not there. Torch comes first, by its own pin."""
    python = work / "environments" / peer / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        install = [str(python), "-m", "pip", "install", "-q", "--no-deps"]
        requirements = (HERE / "peers" / f"{peer}.txt").read_text(encoding="utf-8").split("\n")
        for packages in (["torch==2.13.0"], [line for line in requirements if "==" in line and line[0] != "#"]):
            subprocess.run([*install, *packages], check=True)
    return python


def auto_round(
    work: Path,
    network: CausalLM,
    bits: int,
    sym: bool,
    *,
    dense_inputs: bool,
    folder: Path = DEMO / "model",
    ids: Tensor | None = None,
) -> Made:
    """AutoRound's own program, on the model in a folder; `ids` are written first, if they are given."""
    flags = ["--steps", str(STEPS), *(["--dense-inputs"] if dense_inputs else [])]
    return _program("auto_round", f"{bits}-{sym}-{dense_inputs}", work, network, bits, sym, flags, folder, ids)


def llm_compressor(work: Path, network: CausalLM, bits: int, sym: bool, *, folder: Path, ids: Tensor) -> Made:
    """GPTQ as llm-compressor's own program does it, in static order, on the inputs that the layers before leave."""
    return _program("llm_compressor", f"{bits}-{sym}", work, network, bits, sym, [], folder, ids)


def _program(
    peer: str,
    key: str,
    work: Path,
    network: CausalLM,
    bits: int,
    sym: bool,
    flags: Sequence[str],
    folder: Path,
    ids: Tensor | None,
) -> Made:
    if ids is not None:
        save_file({"ids": ids.contiguous()}, work / "tokens.safetensors")
    out = work / f"{peer}-{key}"
    script = HERE / "peers" / f"{peer}_quantize.py"
    sizes = ["--bits", str(bits), "--group-size", str(GROUP_SIZE), *(["--sym"] if sym else [])]
    places = [str(folder), str(work / "tokens.safetensors"), str(out)]
    program = [str(environment(work, peer)), str(script), *places, *sizes, *flags]
    subprocess.run(program, check=True, cwd=work, env={"OMP_NUM_THREADS": "1"})
    tensors = load_file(out / "model.safetensors")
    weights = {
        unit.name: unit.view.read(tensors[unit.view.tensor])
        for unit in network.units
        if unit.view is not None and unit.block is not None
    }
    return weights, json.loads((out / "about.json").read_text(encoding="utf-8"))["seconds"]


def effective_bits(network: CausalLM, bits: int, sym: bool) -> float:
    """Over all weights of the blocks."""
    shapes = [unit.shape for unit in network.units if unit.block is not None]
    groups = sum(rows * -(-columns // GROUP_SIZE) for rows, columns in shapes)
    return bits + groups * (16 + (0 if sym else bits)) / sum(rows * columns for rows, columns in shapes)


def measured(work: Path, key: str, network: CausalLM, heldout: Tensor, make: Callable[[], Made]) -> dict[str, Any]:
    """KL, perplexity and seconds of one row; read, if it was made before."""
    file = work / f"{key}.json"
    if not file.exists():
        weights, seconds = make()
        changed = [n for n, w in weights.items() if not torch.equal(w, network.weight(_unit(network, n)))]
        assert len(changed) == len(weights), f"{key}: {len(weights) - len(changed)} layers were left as they are"
        evaluator = Evaluator(network, heldout, Candidate(weights))
        (score,) = evaluator(Request(((1,) * len(weights),), ("kl", "nll")))
        kl, nll = score["kl"], score["nll"]
        row = {"kl": kl["mean"], "stderr": kl["stderr"], "perplexity": exp(nll["mean"]), "seconds": seconds}
        file.write_text(json.dumps(row), encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    print(key, found, flush=True)
    return found


def _unit(network: CausalLM, name: str) -> Any:
    return next(unit for unit in network.units if unit.name == name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--only", choices=["ours", "auto_round"], help="measure these, and write no table")
    given = parser.parse_args(arguments)
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    network = CausalLM.load(ModelSource(DEMO / "model"))
    ids, heldout = sequences("calibration", CALIBRATION), sequences("heldout", HELDOUT)
    save_file({"ids": ids}, work / "tokens.safetensors")
    millions = sum(unit.n_weights for unit in network.units if unit.block is not None) / 1e6
    lines, own_seconds = [], []
    for bits in given.bits:
        for sym in (False, True):
            for dense_inputs in (False, True):
                rows = {}
                for name in ("auto_round", "ours"):
                    if given.only in (None, name):
                        make = {
                            "auto_round": lambda b=bits, s=sym, d=dense_inputs: auto_round(
                                work, network, b, s, dense_inputs=d
                            ),
                            "ours": lambda b=bits, s=sym, d=dense_inputs: ours(network, ids, b, s, dense_inputs=d),
                        }[name]
                        rows[name] = measured(work, f"{name}-{bits}-{sym}-{dense_inputs}", network, heldout, make)
                if given.only is None:
                    kind = f"{'sym' if sym else 'asym'}, {'dense' if dense_inputs else 'compressed'} inputs"
                    peer, own = rows["auto_round"], rows["ours"]
                    own_seconds.append(own["seconds"])
                    lines.append(
                        f"| {effective_bits(network, bits, sym):.2f} | {bits} | {kind} | {peer['kl']:.4f} | "
                        f"{own['kl']:.4f} ± {own['stderr']:.4f} | {own['kl'] / peer['kl']:.3f} | "
                        f"{peer['perplexity']:.2f} | {own['perplexity']:.2f} | {peer['seconds'] / millions:.0f} | "
                        f"{own['seconds'] / millions:.0f} |"
                    )
    if given.only is None:
        _write(lines, 6980 * statistics.median(own_seconds) / millions / 3600)


def _write(lines: Sequence[str], hours: float) -> None:
    text = "\n".join(
        [
            "# Learned rounding beside AutoRound",
            "",
            *header("peers.py", ["layerwise", "torch", "transformers"]),
            "- auto-round 0.16.1 by its own program, float32 on the CPU; one thread each",
            f"- the demo model, all block layers, groups of {GROUP_SIZE}, {STEPS} steps of 8 sequences of {LENGTH} "
            f"tokens out of {CALIBRATION // LENGTH}; KL to the dense model over {HELDOUT} held-out tokens",
            "- dense inputs are what a database of levels needs; compressed inputs are those that the blocks before "
            "leave, AutoRound's default",
            "- s/M: seconds of one thread for a million weights of one bit-width, with this many tokens a step; "
            f"the 6,980 million weights of the blocks of an 8 B model would take a core {hours:.0f} hours at ours",
            "- not run yet: AutoScheme, llm-compressor, GPTQModel, GGUF types; on stories260k AutoRound leaves the MLP "
            "as it is, because 172 columns are no multiple of 32, so that no equal comparison can be had there",
            "",
            "| effective bits | bits | grid, inputs | AutoRound KL | ours KL | ratio | AutoRound ppl | ours ppl "
            "| AutoRound s/M | ours s/M |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )
    (HERE / "results" / "peers.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
