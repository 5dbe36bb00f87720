"""Tiny random models of every family as folders on the disk, a text for them, and a bench that runs stages on both."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from layerwise.pipeline.executors.inline import InlineExecutor
from layerwise.pipeline.executors.journal import JournaledExecutor
from layerwise.results.store import Store
from layerwise.stages import find_stage
from layerwise.stages.contract import Context, ModelSource, TextSource

settings.register_profile("stages", deadline=None, derandomize=True)  # no clock, and the same cases every time
settings.load_profile("stages")

BLOCKS, WIDTH, INNER, VOCABULARY, LENGTH = 3, 32, 40, 256, 16
"""An inner width of 40 leaves ragged groups of 16 and 32."""

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_inner": INNER, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64}
_OPT = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "ffn_dim": INNER, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": WIDTH,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", _COMMON | {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", _COMMON | {"sliding_window": 8}),
    "gemma2": ("Gemma2Config", _COMMON | {"head_dim": 16, "sliding_window": 8}),  # window and full, block by block
    "opt": ("OPTConfig", _OPT | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 1}),
    "gpt2": ("GPT2Config", _GPT2 | {"bos_token_id": None, "eos_token_id": None}),  # Conv1D: weights are (in, out)
    "phi3": ("Phi3Config", _COMMON),  # q, k and v are one layer, gate and up another
}

_EXPERTS = 4
"""Of each block, two for every token."""

MOE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", _COMMON | {"num_local_experts": _EXPERTS, "num_experts_per_tok": 2}),
    "qwen3moe": (
        "Qwen3MoeConfig",
        _COMMON | {"head_dim": 16, "num_experts": _EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "olmoe": ("OlmoeConfig", _COMMON | {"num_experts": _EXPERTS, "num_experts_per_tok": 2}),
    "granitemoe": (
        "GraniteMoeConfig",
        _COMMON | {"num_local_experts": _EXPERTS, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    ),
}
"""Mixtures of experts: the experts are matrices of stacked parameters, in the files of most families single tensors."""

OTHER_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": (  # its blocks answer with tuples, attention and feed-forward stand side by side; the head has a bias
        "GPTJConfig",
        {
            "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_inner": INNER, "n_layer": BLOCKS, "n_head": 4,
            "n_positions": 64, "rotary_dim": 4, "bos_token_id": None, "eos_token_id": None,
        },
    ),
    "bloom": (  # one piece: its half-blocks get the residual handed in and add it themselves; its head is tied
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": BLOCKS, "n_head": 4},
    ),
}  # fmt: skip

ALL_FAMILIES = {**FAMILIES, **MOE_FAMILIES, **OTHER_FAMILIES}


def _save_tokenizer(folder: Path) -> None:
    """One token per byte of UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def _save_model(folder: Path, family: str) -> None:
    """Random weights, large enough that quantizing them changes what the model says."""
    import torch
    import transformers

    name, settings = ALL_FAMILIES[family]
    generator = torch.Generator().manual_seed([*sorted(FAMILIES), *MOE_FAMILIES, *OTHER_FAMILIES].index(family))
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2, generator=generator)
            else:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.05, generator=generator))
    model.save_pretrained(folder)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only get slower from a second thread, and much slower on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model; made once, never to be changed."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(family: str) -> Path:
        if family not in made:
            _save_model(root / family, family)
            _save_tokenizer(root / family)
            made[family] = root / family
        return made[family]

    return get


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every plain family in turn."""
    name: str = request.param
    return name


@pytest.fixture(params=MOE_FAMILIES)
def moe_family(request: pytest.FixtureRequest) -> str:
    """Every mixture of experts in turn."""
    name: str = request.param
    return name


@pytest.fixture(params=ALL_FAMILIES)
def any_family(request: pytest.FixtureRequest) -> str:
    """Every family in turn: plain ones, mixtures of experts, and those of another build."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def load_model(model_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """A family's `CausalLM`, loaded once; whoever changes its weights puts them back."""
    from layerwise.stages.models.causal_lm import CausalLM

    loaded: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in loaded:
            loaded[family] = CausalLM.load(ModelSource(model_folder(family)))
        return loaded[family]

    return get


@pytest.fixture
def edited_model(tmp_path: Path) -> Callable[[Path, Callable[[dict[str, Any]], None]], Path]:
    """A copy of a model folder after `edit` has changed its tensors, a dict, in place."""

    def edited(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
        from safetensors.torch import load_file, save_file

        copy = tmp_path / f"edited-{len(list(tmp_path.glob('edited-*')))}"
        shutil.copytree(folder, copy)
        tensors = load_file(copy / "model.safetensors")
        edit(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return edited


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextSource]:
    """Two texts of random words: 12 and 6 sequences."""
    folder = tmp_path_factory.mktemp("texts")
    words = ["the", "one", "cat", "dog", "who", "sat", "saw", "ran", "and", "but", "on", "a", "red", "café", "tree"]
    generator = np.random.default_rng(0)
    sources = {}
    for name, sequences in (("calibration", 12), ("heldout", 6)):
        text = " ".join(generator.choice(words, 400))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        sources[name] = TextSource(name, (folder / f"{name}.txt",), LENGTH, sequences * LENGTH)
    return sources


@pytest.fixture(scope="session")
def make_levels() -> Callable[..., list[Any]]:
    """Levels of one weight, by a method of scope `unit`.

    Takes the method, the weight (out, in), its statistics by name, `keep` of an earlier pruning, and the menu's keys.
    """

    def make(
        method: str, weight: Any, statistics: Mapping[str, Any] | None = None, *, keep: Any = None, **menu: Any
    ) -> list[Any]:
        from layerwise.stages.compress import Task, find_compressor
        from layerwise.stages.models.network import Unit, View

        known = statistics or {}
        unit = Unit("unit", "unit", "linear", 0, tuple(weight.shape), (0,), View("unit.weight"))
        task = Task(
            {"unit": weight}, lambda _, name: known[name], {"unit": unit}, {} if keep is None else {"unit": keep}
        )
        compressor = find_compressor(method)
        (made,) = compressor.run(task, compressor.params.model_validate({"method": method, **menu})).values()
        return made

    return make


@dataclass(frozen=True)
class Result:
    """What a stage left behind.

    Args:
        out: its artifact.
        rows: by table, what it recorded, as the results store gives it back.
        progress: every `(done, total, note)` that it reported.
    """

    out: Path
    rows: dict[str, list[dict[str, Any]]]
    progress: list[tuple[int, int, str]]


@dataclass
class Bench:
    """Runs stages as the pipeline does: a journaled executor, picklable work, rows into a real results store."""

    folder: Path
    model: ModelSource
    data: Mapping[str, TextSource]
    runs: int = field(default=0, init=False)

    def run(
        self,
        stage: str,
        params: Mapping[str, Any] | None = None,
        *,
        again: bool = False,
        **inputs: Path | Sequence[Path],
    ) -> Result:
        """Run a stage.

        Args:
            stage: its name.
            params: its `with:`.
            again: go on with the last run of this stage, which was interrupted.
            inputs: artifact folders by port.
        """
        found = find_stage(stage)
        self.runs += not again
        place = self.folder / f"{self.runs:02}-{stage}"
        key = hashlib.sha256(place.name.encode()).hexdigest()
        if again:
            shutil.rmtree(place / "out")
        for name in ("out", "items"):
            (place / name).mkdir(parents=True, exist_ok=again)
        store = Store.open(self.folder / "results", create=True)
        seqs: dict[str, int] = {}
        progress: list[tuple[int, int, str]] = []

        def record(table: str, rows: Sequence[Mapping[str, Any]]) -> None:
            first = seqs.get(table, 0)
            seqs[table] = first + len(rows)
            store.append(table, rows, run_id="bench", stage=stage, stage_key=key, attempt=1, first_seq=first)

        def report(done: int, total: int, note: str) -> None:
            progress.append((done, total, note))

        context = Context(
            out=place / "out",
            items=place / "items",
            model=self.model,
            data=self.data,
            inputs={port: _folders(inputs.get(port, ())) for port in found.takes},
            executor=JournaledExecutor(
                InlineExecutor(check_pickle=True), place / "journal", tmp=self.folder / "tmp", progress=report
            ),
            record=record,
            progress=report,
        )
        found.run(context, found.params.model_validate(params or {}))
        return Result(place / "out", {table: store.rows(table, stage_key=key) for table in seqs}, progress)


def _folders(given: Path | Sequence[Path]) -> tuple[Path, ...]:
    return (given,) if isinstance(given, Path) else tuple(given)


@pytest.fixture
def new_bench(tmp_path: Path, texts: dict[str, TextSource]) -> Callable[..., Bench]:
    """A bench for a model folder; `data` replaces texts, `dtype` is what the model is computed in."""

    def new(model: Path, *, data: Mapping[str, TextSource] | None = None, dtype: str = "float32") -> Bench:
        folder = tmp_path / f"bench-{len(list(tmp_path.glob('bench-*')))}"
        folder.mkdir()
        return Bench(folder, ModelSource(model, dtype), {**texts, **(data or {})})

    return new


@pytest.fixture(scope="session")
def make_bench(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, TextSource]) -> Callable[[Path], Bench]:
    """The same for several tests: a bench for a model folder that outlives the test that made it."""
    return lambda model: Bench(tmp_path_factory.mktemp(f"bench-{model.name}"), ModelSource(model), texts)


MENU = [
    {"method": "gptq", "bits": [2, 4], "group_size": 16},
    {"method": "rtn", "bits": 3, "group_size": 32, "sym": False},
]


@dataclass(frozen=True)
class Chain:
    """The first three stages of a tiny model, to be used by many tests, and a bench for more on top of them."""

    bench: Bench
    stats: Result
    levels: Result
    profile: Result

    def allocate(self, params: Mapping[str, Any], *, profile: bool = True) -> Result:
        """Run `allocate` on the chain's database, and on its profile unless told otherwise."""
        inputs = {"profile": self.profile.out} if profile else {}
        return self.bench.run("allocate", params, database=self.levels.out, **inputs)


@pytest.fixture(scope="session")
def chain(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path], texts: dict[str, TextSource]
) -> Callable[[str], Chain]:
    """calibrate, compress and profile of a family, run once."""
    made: dict[str, Chain] = {}

    def get(family: str) -> Chain:
        if family not in made:
            bench = Bench(tmp_path_factory.mktemp(f"chain-{family}"), ModelSource(model_folder(family)), texts)
            stats = bench.run("calibrate")
            levels = bench.run("compress", {"menu": MENU}, statistics=stats.out)
            made[family] = Chain(bench, stats, levels, bench.run("profile", database=levels.out))
        return made[family]

    return get


_LAST = ("o_proj", "out_proj", "c_proj", "down_proj", "fc2", "fc_out", "dense", "dense_4h_to_h")
"""The last weight of every half-block, as families call it: with it and its bias at zero the half adds nothing."""


@pytest.fixture(scope="session")
def rebuilt() -> Callable[..., Any]:
    """Another model made of a Hugging Face model by hand: an oracle that knows no views and no levels.

    Takes the model, (out, in) weights by unit, and the half-blocks and blocks to be left out. A weight's place is told
    by the unit's name alone; a part is left out by putting zeros where it adds to the hidden state.
    """
    import copy

    import torch
    from transformers.pytorch_utils import Conv1D

    def rebuild(model: Any, weights: Mapping[str, Any], dropped: Sequence[str] = ()) -> Any:
        changed = copy.deepcopy(model)
        modules = dict(changed.named_modules())
        with torch.no_grad():
            for name, weight in weights.items():
                if name in modules:
                    module = modules[name]
                    module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight.reshape(module.weight.shape))
                else:
                    path, number, parameter = name.rsplit(".", 2)
                    getattr(modules[path], parameter)[int(number)].copy_(weight)
            for name in dropped:
                inside = (
                    f"{name}." if name in modules else f"{name.rpartition('.')[0]}.fc2."
                )  # OPT has no module for it
                ends = [
                    parameter
                    for path, parameter in changed.named_parameters()
                    if path.startswith(inside) and set(path.split(".")) & set(_LAST)
                ]
                assert ends, f"{name}: nothing known to be its last weight"
                for parameter in ends:
                    parameter.zero_()
        return changed

    return rebuild


@dataclass(frozen=True)
class InTurn:
    """An allocation that was made by hand, and what it takes to apply it.

    Args:
        levels: what `compress` left.
        inputs: artifact folders by port, as `apply` and `evaluate` want them.
        shapes: (out, in) by unit.
        gone: what the names of everything that is dropped begin with.
    """

    bench: Bench
    levels: Result
    allocation: Any
    inputs: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, int]]
    gone: tuple[str, ...]

    def is_dropped(self, name: str) -> bool:
        """Whether a tensor of the checkpoint belongs to a part that is dropped."""
        return name.startswith(self.gone)


@pytest.fixture(scope="session")
def in_turn(model_folder: Callable[[str], Path], make_bench: Callable[[Path], Bench]) -> Callable[..., InTurn]:
    """A family's weights, embedding and head included, at dense, 3 bits and half pruned in turn.

    With `dropped`, the last block is left out, and of the one before its attention where it has halves. `folder` is
    another checkpoint of the family. Each is made once.
    """
    made: dict[tuple[str, bool, Path], InTurn] = {}

    def get(family: str, *, dropped: bool = False, folder: Path | None = None) -> InTurn:
        key = family, dropped, folder or model_folder(family)
        if key not in made:
            made[key] = _in_turn(make_bench(key[2]), dropped, whole="bloom" in family)
        return made[key]

    return get


def _in_turn(bench: Bench, dropped: bool, *, whole: bool) -> InTurn:
    from layerwise.stages.allocate.allocation import make_allocation, save_allocations
    from layerwise.stages.allocate.costs import CostTable
    from layerwise.stages.levels.database import DatabaseIndex

    menu = [
        {"method": "rtn", "bits": 3, "group_size": 16, "sym": False},
        {"method": "magnitude", "sparsity": 0.5},
        {"method": "drop", "units": ["block"] if whole else ["attention", "block"]},
        {"method": "dense"},
    ]
    levels = bench.run("compress", {"menu": menu, "targets": ["blocks", "head", "embedding"]})
    table = CostTable(DatabaseIndex(levels.out))
    units = [entry.unit for entry in table.units]
    blocks = [unit for unit in units if unit.role == "block"]
    gone = [blocks[-1], *(unit for unit in units if unit.role == "attention" and unit.parent == blocks[-2].name)]
    numbers = [
        int(dropped and unit in gone) if unit.is_parent else (1 + number) % 3 for number, unit in enumerate(units)
    ]
    head = next(number for number, unit in enumerate(units) if unit.role == "head")
    numbers[head] = 1
    allocation = make_allocation(table, numbers, solver="hand", budget={"bits": 32.0})
    folder = bench.folder / f"allocations-{dropped}"
    folder.mkdir()
    save_allocations(folder, [allocation])
    return InTurn(
        bench,
        levels,
        allocation,
        {"allocations": folder, "database": levels.out},
        {unit.name: unit.shape for unit in units},
        tuple(f"{unit.name}." for unit in gone) if dropped else ("nothing is dropped",),
    )
