"""Stages on a processor and on a GPU, side by side: seconds, peak memory, and how far their results agree.

    python benchmarks/gpu_pipeline.py --size 1B --devices cpu,cuda --out benchmarks/results/gpu_pipeline-<device>.md

Random Llamas, real stages, one after the other in this process, without Ray. Every part is the same job on both
devices: a few units and few tokens, because a processor takes its time; behind it the GPU does the job on a larger
scale, by itself. The compressors of both devices are given the same statistics, so that what differs is their own.

A part that fails, or takes longer than its limit, is a row with the reason, and the parts that need it have one, too.
The page is written anew after every part. Needed beside torch and transformers: pydantic, tokenizers, safetensors,
scipy, pandas, pyarrow.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import header

from layerwise.stages.contract import ModelSource, TextSource
from layerwise.stages.levels.database import Database, DatabaseIndex
from layerwise.testing.stages import Bench

SIZES = {
    "1M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4},
    "20M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
}
"""1B is TinyLlama's shape: 1.1 billion weights with its vocabulary."""
VOCABULARY = {"1M": 256, "20M": 8192, "1B": 32000}
LENGTH = 512
SMALL, LARGE = 4096, 65536
"""Tokens of the job that both devices do, and of the one that only a GPU does."""
PROCESS = Path("/proc/self")

GRID = {"group_size": 128}
MENUS: dict[str, dict[str, Any]] = {
    "rtn 2, 3, 4 bits": {"method": "rtn", "bits": [2, 3, 4], **GRID},
    "gptq 2, 3, 4 bits": {"method": "gptq", "bits": [2, 3, 4], **GRID},
    "awq 3 bits": {"method": "awq", "bits": 3, "grid_points": 5, **GRID},
    "gptq_sequential 3 bits": {"method": "gptq_sequential", "bits": 3, **GRID},
    "learned_rounding 3 bits, 10 steps": {"method": "learned_rounding", "bits": 3, "steps": 10, **GRID},
    "trellis 2 bits, 2^10 states, tiles of 16 columns": {
        "method": "trellis", "bits": 2, "state_bits": 10, "columns": 16,
    },
}  # fmt: skip
SEARCHED = "gptq 2, 3, 4 bits"
SEARCH = {
    "solver": "evolve", "start": "uniform", "budgets": {"bits": 3}, "generations": 2, "offspring": 8,
    "survivors_per_selection": [2, 1], "tokens_per_selection": [1024, 2048],
}  # fmt: skip


class OutOfTime(BaseException):
    """A part took longer than it may; nothing on the way may take it for a mistake of its own."""


@dataclass(frozen=True)
class Measured:
    """What a job took.

    Args:
        seconds: of the wall.
        rss_bytes: most memory that the process had resident in the meantime.
        gpu_bytes: most that torch had allocated on the GPU; None on a processor.
        answer: of the job; None if it failed.
        failure: why.
    """

    seconds: float
    rss_bytes: int
    gpu_bytes: int | None
    answer: Any = None
    failure: str = ""

    def __str__(self) -> str:
        memory = f"{self.rss_bytes / 2**30:.1f} GiB"
        if self.gpu_bytes is not None:
            memory += f", GPU {self.gpu_bytes / 2**30:.1f}"
        return self.failure or f"{self.seconds:.2f} s ({memory})"


@dataclass
class Row:
    """A line of the table.

    Args:
        job: what is done.
        by: what it took on each device.
        agreement: how far the results are the same.
    """

    job: str
    by: dict[str, Measured] = field(default_factory=dict)
    agreement: str = ""

    def line(self, devices: list[str]) -> str:
        cells = [str(self.by.get(device, "")) for device in devices]
        ratio = ""
        if len(devices) == 2 and all(device in self.by and not self.by[device].failure for device in devices):
            ratio = f"{self.by[devices[0]].seconds / self.by[devices[1]].seconds:.2g}"
        return "| " + " | ".join([self.job, *cells, ratio, self.agreement]) + " |"


class Page:
    """The table, written anew after every part."""

    def __init__(self, out: Path, devices: list[str], size: str) -> None:
        self.out, self.devices = out, devices
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        self.top = [
            f"# Stages on {' and '.join(devices)}, a random Llama of {size} weights",
            "",
            *header("gpu_pipeline.py", ["torch", "transformers"], gpu),
            f"- sequences of {LENGTH} tokens, computed in float32; all {torch.get_num_threads()} threads of the CPU",
            "- seconds of the wall with loading, most memory resident and, of a GPU, allocated",
            "",
            "| job | " + " | ".join(devices) + " | times faster | results |",
            "|---" * (len(devices) + 3) + "|",
        ]
        self.rows: list[Row] = []

    def write(self) -> None:
        """All rows so far."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text("\n".join([*self.top, *(row.line(self.devices) for row in self.rows)]) + "\n")


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in what takes longer."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_rss_bytes() -> int:
    """Since `forget_peaks`, where Linux lets it be forgotten; else since the start."""
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peaks(device: str) -> None:
    """Begin to look for the most memory anew."""
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measured(job: Callable[[], Any], device: str, seconds: float) -> Measured:
    """Do a job, whatever happens in it."""
    answer, failure = None, ""
    try:
        forget_peaks(device)
        started = time.perf_counter()
        with limited(seconds):
            answer = job()
            if device == "cuda":
                torch.cuda.synchronize()
    except OutOfTime:
        failure = f"not done in {seconds:.0f} s"
    except Exception as error:  # one part must not take the others with it
        failure = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    taken = time.perf_counter() - started
    gpu_bytes = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return Measured(taken, peak_rss_bytes(), gpu_bytes, answer, failure)


def make_model(folder: Path, size: str) -> ModelSource:
    """A random Llama in bfloat16 on the disk, computed in float32; its tokens are bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    heads = SIZES[size]["num_attention_heads"]
    config = LlamaConfig(
        vocab_size=VOCABULARY[size], num_key_value_heads=max(2, heads // 8), max_position_embeddings=2 * LENGTH,
        initializer_range=SIZES[size]["hidden_size"] ** -0.5,
        **SIZES[size],
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    return ModelSource(folder)


def make_text(folder: Path, name: str, tokens: int) -> TextSource:
    """Random words: of bytes, so as many as there are tokens."""
    chosen, path = random.Random(0), folder / f"{name}.txt"
    words = ["the", "cat", "sat", "and", "ran", "red", "tree", "on", "a", "one", "dog", "saw"]
    path.write_text(" ".join(chosen.choice(words) for _ in range(tokens)))
    return TextSource(name, (path,), LENGTH, tokens)


class Comparison:
    """All parts, in their order.

    Args:
        model: on the disk.
        folder: for everything that is made.
        page: gets the rows.
        limit: seconds that a job may take.
        deadline: when no job begins any more, of `time.perf_counter`.
    """

    def __init__(self, model: ModelSource, folder: Path, page: Page, limit: float, deadline: float) -> None:
        self.model, self.folder, self.page, self.limit, self.deadline = model, folder, page, limit, deadline
        self.texts = {
            "small": make_text(folder, "small", SMALL),
            "large": make_text(folder, "large", LARGE),
            "calibration": make_text(folder, "calibration", LENGTH * 4),
        }
        last = json.loads((model.path / "config.json").read_text())["num_hidden_layers"] - 1
        self.block = f"re:model.layers.{last}[.]"
        self.unit = f"model.layers.{last}.self_attn.k_proj"
        self.large = "cuda" in page.devices

    def bench(self, device: str) -> Bench:
        """A place for stages on a device."""
        folder = Path(tempfile.mkdtemp(prefix=device, dir=self.folder))
        return Bench(folder, replace(self.model, device=device), self.texts)

    def row(self, text: str, job: Callable[[str], Any], devices: list[str] | None = None) -> dict[str, Any]:
        """Do a job on each device; gives the answers of those that did it."""
        row = Row(text)
        self.page.rows.append(row)
        for device in devices or self.page.devices:
            left = self.deadline - time.perf_counter()
            if left < 5:
                row.by[device] = Measured(0, 0, None, failure="no time was left")
            else:
                row.by[device] = measured(partial(job, device), device, min(self.limit, left))
            print(f"{device}: {text}: {row.by[device]}", flush=True)
            self.page.write()
        return {device: taken.answer for device, taken in row.by.items() if not taken.failure}

    def agree(self, answers: Mapping[str, Any], compare: Callable[[Any, Any], str]) -> None:
        """Say of the last row how far two answers are the same."""
        if len(answers) == 2:
            try:
                self.page.rows[-1].agreement = compare(*answers.values())
            except Exception as error:  # as above
                self.page.rows[-1].agreement = f"not compared: {type(error).__name__}: {error}"
            self.page.write()

    def run(self) -> None:
        """Every part."""
        for device in self.page.devices:
            self.row("first use of the device: a product and a factorisation", first_use, [device])
        statistics = self.calibrate()
        if not statistics:
            return
        shared = next(iter(statistics.values()))
        for name, entry in MENUS.items():
            self.compress(name, entry, dict.fromkeys(self.page.devices, shared))
        if self.large:
            self.at_scale()

    def calibrate(self) -> dict[str, Path]:
        """Statistics of one block, with the text through all of them."""
        params = {"data": "small", "targets": [self.block], "shards": 1, "batch_size": 4,
                  "statistics": ["hessian", "channels", "block_inputs"]}  # fmt: skip
        made = self.row(
            f"calibrate: {SMALL} tokens through all blocks, statistics of one",
            lambda device: self.bench(device).run("calibrate", params),
        )
        self.agree(made, compare_statistics)
        return made

    def compress(self, name: str, entry: dict[str, Any], statistics: Mapping[str, Path]) -> None:
        """One method on one block, then what it is worth."""
        targets = [self.unit] if entry["method"] == "trellis" else [self.block]
        params = {"menu": [entry], "targets": targets}
        what = "one unit" if len(targets[0]) == len(self.unit) else "one block"
        made = self.row(
            f"compress: {name}, {what}",
            lambda device: self.bench(device).run("compress", params, statistics=statistics[device]),
        )
        self.agree(made, compare_levels)
        if name == SEARCHED and made:
            self.score(next(iter(made.values())))

    def score(self, database: Path) -> None:
        """The same database, profiled and searched on each device."""
        units = len(DatabaseIndex(database).units)
        profiled = self.row(
            f"profile: KL of 3 levels of {units} units on 1024 tokens",
            lambda device: self.bench(device).run(
                "profile", {"metrics": ["kl"], "tokens": 1024, "data": "small"}, database=database
            ),
        )
        self.agree(profiled, compare_profiles)
        found = self.row(
            "allocate: 2 generations of 8 candidates, on 1024 and 2048 tokens",
            lambda device: self.bench(device).run("allocate", {**SEARCH, "data": "small"}, database=database),
        )
        self.agree(found, compare_allocations)

    def at_scale(self) -> None:
        """What a processor is not asked to do."""
        params = {"data": "large", "shards": 1, "batch_size": 16, "statistics": ["hessian"]}
        made = self.row(
            f"calibrate: {LARGE} tokens, Hessians of all units",
            lambda device: self.bench(device).run("calibrate", params),
            ["cuda"],
        )
        if made:
            self.compress_at_scale(made["cuda"])

    def compress_at_scale(self, statistics: Path) -> None:
        """Three blocks, and what their levels are worth."""
        menu = {"menu": [MENUS[SEARCHED]], "targets": ["re:model.layers.[0-2][.]"]}
        levels = self.row(
            f"compress: {SEARCHED}, three blocks",
            lambda device: self.bench(device).run("compress", menu, statistics=statistics),
            ["cuda"],
        )
        if levels:
            kl = {"metrics": ["kl"], "tokens": SMALL, "data": "large", "batch_tokens": SMALL}
            self.row(
                f"profile: KL of 3 levels of {len(DatabaseIndex(levels['cuda']).units)} units on {SMALL} tokens",
                lambda device: self.bench(device).run("profile", kl, database=levels["cuda"]),
                ["cuda"],
            )


def first_use(device: str) -> None:
    """Load what torch loads at its first product and its first factorisation on a device."""
    a = torch.randn(256, 256, device=device, dtype=torch.float64)
    torch.linalg.cholesky_ex(a @ a.T + torch.eye(256, device=device, dtype=torch.float64))
    (a.float() @ a.float()).sum().item()


def compare_statistics(one: Path, other: Path) -> str:
    """The greatest relative difference of a Hessian."""
    from safetensors.torch import load_file

    differences = []
    for file in sorted((one / "hessian").glob("*.safetensors")):
        found = load_file(other / "hessian" / file.name)
        for name, H in load_file(file).items():
            differences.append(float((H - found[name]).norm() / H.norm()))
    return f"Hessians differ by up to {max(differences):.1e} of their norm"


def compare_levels(one: Path, other: Path) -> str:
    """Equal weights, and the greatest difference of errors, over all levels."""
    databases = [Database(folder, ModelSource(folder)) for folder in (one, other)]
    equal, total, worst = 0, 0, 0.0
    for first, second in zip(*(database.units for database in databases), strict=True):
        if first.is_parent:
            continue
        for a, b in zip(first.levels[1:], second.levels[1:], strict=True):
            if not (a.usable and b.usable):
                return f"{first.name}, {a.name}: {a.error or b.error}"
            weights = [database.level(first.name, a.name).decode() for database in databases]
            equal += int((weights[0] == weights[1]).sum())
            total += weights[0].numel()
            if a.output_error and b.output_error is not None:
                worst = max(worst, abs(b.output_error / a.output_error - 1))
    return f"{100 * equal / total:.4f} % of the weights equal; output errors differ by up to {100 * worst:.2g} %"


def compare_profiles(one: Path, other: Path) -> str:
    """The greatest difference of a loss, beside the greatest loss."""
    a, b = (json.loads((folder / "profile.json").read_text())["metrics"]["kl"] for folder in (one, other))
    pairs = [(x, y) for first, second in zip(a, b, strict=True) for x, y in zip(first, second, strict=True)]
    return (
        f"KL differs by up to {max(abs(x - y) for x, y in pairs):.1e}, the greatest is {max(x for x, _ in pairs):.1e}"
    )


def compare_allocations(one: Path, other: Path) -> str:
    """Whether both searches end with the same candidate."""
    a, b = ((folder / "allocations.json").read_text() for folder in (one, other))
    first, second = (json.loads(text) for text in (a, b))
    same = sum(x["genome"] == y["genome"] for x, y in zip(first, second, strict=True))
    return f"{same} of {len(first)} allocations are the same"


def main() -> None:
    """Make the model, then every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="20M")
    parser.add_argument("--devices", default="cpu,cuda", help="separated by commas; the first is compared with")
    parser.add_argument("--out", type=Path, required=True, help="the page, in Markdown")
    parser.add_argument("--limit", type=float, default=45, help="seconds that a job may take")
    parser.add_argument("--seconds", type=float, default=280, help="after which no job begins")
    given = parser.parse_args()
    deadline = time.perf_counter() + given.seconds
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="gpu-pipeline-") as place:
        page = Page(given.out, given.devices.split(","), given.size)
        model = make_model(Path(place) / "model", given.size)
        Comparison(model, Path(place), page, given.limit, deadline).run()
    print(given.out.read_text())


if __name__ == "__main__":
    main()
