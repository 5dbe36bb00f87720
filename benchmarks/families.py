"""Every causal family of the installed transformers, from the loader to the loss of a quantized model.

    python benchmarks/families.py [FAMILY ...]        # writes benchmarks/results/families.md; 10 minutes on one core

For each family a tiny model is made from random weights and saved. A child process loads it, calibrates, quantizes all
of its units, and measures each change alone and all together. The oracle is transformers: a model loaded from the same
folder, run in one piece, with the same weights put in by their names. A family is `whole` if all losses agree,
`refused` if it was turned away with a reason before anything ran; whatever else happens is a defect.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from machine import header
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from layerwise.errors import LayerwiseError, UnsupportedModel
from layerwise.pipeline.executors.inline import InlineExecutor
from layerwise.pipeline.executors.journal import JournaledExecutor
from layerwise.stages import find_stage
from layerwise.stages.contract import Context, ModelSource, TextSource

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).parent
LENGTH, SEQUENCES = 16, 6
SECONDS = 120
"""That a family may take."""

AGREE = 1e-3
"""Relative difference allowed between a loss and the oracle's: both are float32 means over 96 tokens."""


@dataclass(frozen=True)
class Outcome:
    """What became of a family.

    Args:
        result: `whole`, `refused`, `defect`, or `no tiny model` where transformers itself cannot make or run one.
        told: the reason.
        units: how many.
        covered: share of the weights of two and more dimensions that are in units.
        worst: largest relative difference to a loss of the oracle.
    """

    result: str
    told: str = ""
    units: int = 0
    covered: float = 0.0
    worst: float = 0.0


class _NoModel(Exception):
    """Transformers cannot make or run a tiny model of a family."""


def try_family(family: str, folder: Path) -> Outcome:
    """Make a tiny model and take it through everything."""
    try:
        _make_model(family, folder / "model")
        return _whole(folder)
    except _NoModel as error:
        return Outcome("no tiny model", str(error))
    except LayerwiseError as error:
        reason = error.message.replace(str(folder / "model"), "its folder")
        return Outcome("refused" if isinstance(error, UnsupportedModel) else "defect", reason)
    except Exception as error:
        traceback.print_exc()
        return Outcome("defect", f"{type(error).__name__}: {error}")


def _make_model(family: str, folder: Path) -> None:
    """Random weights, large enough that quantizing them changes what the model says."""
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(tiny_config(family)).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
                else:
                    parameter.add_(torch.empty_like(parameter).normal_(0, 0.05))
            model.save_pretrained(folder)
            AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.arange(24).reshape(2, 12))
    except Exception as error:
        traceback.print_exc()
        raise _NoModel(f"{type(error).__name__}: {error}") from error


def _whole(folder: Path) -> Outcome:
    """Calibrate, quantize, measure, and compare with the oracle."""
    from layerwise.stages.calibrate.statistics import Statistics
    from layerwise.stages.data.text import Tokens, load_sequences
    from layerwise.stages.evaluate.evaluator import Evaluator
    from layerwise.stages.evaluate.scoring import Request
    from layerwise.stages.levels.database import Database
    from layerwise.stages.models.causal_lm import CausalLM

    source = ModelSource(folder / "model")
    network = CausalLM.load(source)
    roles = {unit.role for unit in network.units if unit.block is None}
    targets = ["blocks", *(["head", "embedding"] if "head" in roles else [])]
    text = folder / "text.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 123, LENGTH * SEQUENCES).astype(np.uint8).tobytes())
    _save_tokenizer(folder / "model")
    calibration = _context(folder, "calibrate", source, text)
    _run("calibrate", {"targets": targets}, calibration)
    compression = _context(folder, "compress", source, text, statistics=calibration.out)
    menu = [{"method": "gptq", "bits": 3, "group_size": 16}]
    _run("compress", {"menu": menu, "targets": targets}, compression)

    ids = load_sequences(Tokens(calibration.items / "tokens-calibration.npy", LENGTH * SEQUENCES))
    oracle = _Oracle(folder / "model", ids)
    _check(oracle.dense, network.logits(ids), "logits")
    statistics, database = Statistics(calibration.out), Database(compression.out, source)
    units = [entry.unit for entry in database.units]
    for unit in units:
        expected = oracle.hessian(unit.name)
        if expected is not None and unit.multiplied:
            _check(expected, statistics.tensor(unit, "hessian"), f"Hessian of {unit.name}")
    weights = {unit.name: database.weight(unit.name, 1) for unit in units}
    changes = [[unit.name] for unit in units] + [list(weights)]
    genomes = tuple(tuple(int(name in change) for name in weights) for change in changes)
    scores = Evaluator(network, ids, database)(Request(genomes, ("kl", "nll")))
    worst = 0.0
    for change, score in zip(changes, scores, strict=True):
        for metric, expected in oracle.losses({name: weights[name] for name in change}).items():
            off = abs(score[metric]["mean"] - expected) / max(abs(expected), 0.1)
            worst = max(worst, off)
            if not off <= AGREE:
                what = change[0] if len(change) == 1 else "all units"
                raise _Wrong(f"{metric} with {what} changed is {score[metric]['mean']:.6g}, right is {expected:.6g}")
    matrices = sum(parameter.numel() for parameter in network.model.parameters() if parameter.dim() >= 2)
    return Outcome("whole", "", len(units), sum(unit.n_weights for unit in network.units) / matrices, worst)


class _Wrong(Exception):
    """A number is not the oracle's."""


def _check(expected: Tensor, found: Tensor, what: str) -> None:
    scale = expected.abs().max()
    if expected.shape != found.shape or not (found - expected).abs().max() <= AGREE * scale:
        off = (found - expected).abs().max() / scale if expected.shape == found.shape else math.inf
        raise _Wrong(f"{what} is off by {off:.2g} of the largest value")


def _context(folder: Path, stage: str, source: ModelSource, text: Path, **inputs: Path) -> Context:
    for name in ("out", "items", "tmp"):
        (folder / stage / name).mkdir(parents=True)
    here = folder / stage
    executor = JournaledExecutor(InlineExecutor(), here / "journal", tmp=here / "tmp")
    texts = {"calibration": TextSource("calibration", (text,), LENGTH, LENGTH * SEQUENCES)}
    ports = {port: (inputs[port],) if port in inputs else () for port in find_stage(stage).takes}
    return Context(here / "out", here / "items", source, texts, ports, executor, _nothing, _nothing)


def _nothing(*_: Any) -> None:
    """Neither rows nor progress are kept."""


def _run(stage: str, params: Mapping[str, Any], context: Context) -> None:
    found = find_stage(stage)
    found.run(context, found.params.model_validate(params))


def _save_tokenizer(folder: Path) -> None:
    """One token per byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


class _Oracle:
    """Transformers' own model, run in one piece; weights are put in by the names of units.

    Args:
        folder: the model.
        ids: (sequences, length), that everything is measured on.
    """

    def __init__(self, folder: Path, ids: Tensor) -> None:
        self.model, self.ids = AutoModelForCausalLM.from_pretrained(folder).eval(), ids
        self.modules: dict[str, Any] = dict(self.model.named_modules())
        self.hessians: dict[str, Tensor] = {}
        handles = [
            module.register_forward_pre_hook(self._add(name))
            for name, module in self.modules.items()
            if isinstance(module, torch.nn.Linear | Conv1D)
        ]
        self.dense = self._logits()
        for handle in handles:
            handle.remove()

    def _add(self, name: str) -> Any:
        def add(module: Any, args: tuple[Tensor, ...]) -> None:
            X = args[0].flatten(0, -2).float()
            self.hessians[name] = self.hessians.get(name, 0) + X.T @ X

        return add

    @torch.no_grad()
    def _logits(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self.ids, use_cache=False).logits
        return logits

    def hessian(self, name: str) -> Tensor | None:
        """Of the inputs of a linear layer that runs; None for anything else."""
        return self.hessians.get(name)

    def losses(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """KL(dense || changed) and negative log-likelihood, means over tokens, in float64."""
        places = [(self._place(name, weight.shape), weight) for name, weight in weights.items()]
        before = [(place, place.clone()) for place, _ in places]
        with torch.no_grad():
            for place, weight in places:
                place.copy_(weight.reshape(place.shape))
            logits = self._logits().double()
            for place, weight in before:
                place.copy_(weight)
        told, changed = self.dense.double().log_softmax(-1), logits.log_softmax(-1)
        chosen = changed[:, :-1].gather(-1, self.ids[:, 1:, None])
        return {"kl": (told.exp() * (told - changed)).sum(-1).mean().item(), "nll": -chosen.mean().item()}

    def _place(self, name: str, shape: Sequence[int]) -> Tensor:
        """Where a weight (out, in) stands in the model, as (out, in)."""
        if name in self.modules and hasattr(self.modules[name], "weight"):
            place = self.modules[name].weight.data
            return place.T if isinstance(self.modules[name], Conv1D) else place
        path, _, parameter = name.rpartition(".")
        if path in self.modules:
            place = getattr(self.modules[path], parameter).data
        else:
            path, _, number = path.rpartition(".")
            place = getattr(self.modules[path], parameter).data
            at = int(number)
            place = place[at] if place.dim() == 3 else place[at * shape[0] : (at + 1) * shape[0]]
        return place if tuple(place.shape) == tuple(shape) else place.T


# --- all of them ------------------------------------------------------------------------------------------------------


def _child(family: str, folder: Path, log: Path) -> None:
    with log.open("w", encoding="utf-8") as stream, redirect_stderr(stream):
        outcome = try_family(family, folder)
    (folder / "outcome.json").write_text(json.dumps(asdict(outcome)), encoding="utf-8")


def _in_a_child(family: str, logs: Path) -> Outcome:
    """A family in a process of its own, so that no other is touched by a crash or by one that does not end."""
    folder = Path(tempfile.mkdtemp(prefix=f"{family}-"))
    process = multiprocessing.get_context("fork").Process(target=_child, args=(family, folder, logs / f"{family}.log"))
    try:
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            return Outcome("defect", f"not done after {SECONDS} s")
        if not (folder / "outcome.json").is_file():
            return Outcome("defect", f"its process ended with {process.exitcode}")
        return Outcome(**json.loads((folder / "outcome.json").read_text(encoding="utf-8")))
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Try the families that are named, or all, and write the table."""
    parser = argparse.ArgumentParser(description="Try every causal family of the installed transformers.")
    parser.add_argument("families", nargs="*", help="default: all, and the table is written")
    parser.add_argument("--logs", type=Path, help="folder for what each family's process says")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logs = given.logs or Path(tempfile.mkdtemp(prefix="families-"))
    logs.mkdir(exist_ok=True)
    found = {}
    for family in given.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        started = time.perf_counter()
        found[family] = outcome = _in_a_child(family, logs)
        told = f"{outcome.told[:200]!r}" if outcome.told else f"{outcome.units} units, {outcome.worst:.1g}"
        print(f"{family}: {outcome.result} ({told}), {time.perf_counter() - started:.1f} s", flush=True)
    if not given.families:
        (HERE / "results" / "families.md").write_text("\n".join(_page(found)), encoding="utf-8")
    sys.exit(any(outcome.result == "defect" for outcome in found.values()))


def _page(found: Mapping[str, Outcome]) -> list[str]:
    counts = Counter(outcome.result for outcome in found.values())
    lines = [
        "# Every causal family of transformers",
        "",
        *header("families.py", ["layerwise", "torch", "transformers"]),
        "",
        f"{len(found)} families: " + ", ".join(f"{number} {result}" for result, number in counts.most_common()) + ".",
        "",
        "| family | result | units | weights in units | largest difference to the oracle | reason |",
        "|---|---|---|---|---|---|",
    ]
    for family, outcome in found.items():
        whole = outcome.result == "whole"
        numbers = [str(outcome.units), f"{outcome.covered:.1%}", f"{outcome.worst:.1e}"] if whole else ["", "", ""]
        told = re.sub(r"\s+", " ", outcome.told).replace("|", "\\|")[:300]
        lines.append(f"| {family} | {outcome.result} | {' | '.join(numbers)} | {told} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
