"""A small world of stages that do nothing, a way to write workflow files for them, and a cluster that is none."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
from pydantic import AliasChoices, BeforeValidator, Field, field_validator

from layerwise.pipeline.workflow import Workflow, load_workflow
from layerwise.stages.contract import Params, Port, Stage


class GptqEntry(Params):
    """Quantize column by column."""

    method: Literal["gptq"]
    bits: Annotated[list[int], BeforeValidator(lambda value: [value] if isinstance(value, int) else value)]
    damp_percent: float = Field(0.01, gt=0, lt=1, validation_alias=AliasChoices("damp_percent", "percdamp"))


class SparseEntry(Params):
    """Keep N of every M weights."""

    method: Literal["sparsegpt", "wanda"]
    patterns: tuple[str, ...] = ()


class StatsParams(Params):
    """Which text to take statistics of."""

    data: str = "calibration"
    shards: int = Field(1, ge=1)


class MenuParams(Params):
    """The levels of every unit."""

    menu: list[Annotated[GptqEntry | SparseEntry, Field(discriminator="method")]] = Field(min_length=1)
    first: GptqEntry | SparseEntry | None = None


class SearchParams(Params):
    """The solver and its budgets."""

    solver: Literal["evolve", "ilp", "dp"] = Field("evolve", description="how to choose")
    budgets: dict[str, float | list[float]] = Field(default_factory=dict)
    population: int = Field(64, gt=0)
    seed: int = 0
    workers: int | Literal["auto"] = "auto"

    @field_validator("seed")
    @classmethod
    def _lucky(cls, seed: int) -> int:
        if seed == 13:
            raise ValueError("13 brings bad luck")
        return seed


class ScoreParams(Params):
    """What to report."""

    data: str = "heldout"
    also: tuple[str, ...] = ()


class PickParams(Params):
    """Which allocation."""

    pick: str = "knee"


class PairParams(Params):
    """Nothing."""


def _nothing(context: Any, params: Any) -> None: ...


STAGES = {
    stage.name: stage
    for stage in (
        Stage("calibrate", StatsParams, _nothing, "statistics", data=("data",)),
        Stage("compress", MenuParams, _nothing, "database", {"statistics": Port("statistics")}),
        Stage(
            "allocate",
            SearchParams,
            _nothing,
            "allocations",
            {"database": Port("database"), "statistics": Port("statistics", optional=True)},
        ),
        Stage("pick", PickParams, _nothing, "model", {"allocations": Port("allocations")}),
        Stage("merge", PairParams, _nothing, "model", {"left": Port("model"), "right": Port("model")}),
        Stage(
            "evaluate",
            ScoreParams,
            _nothing,
            "metrics",
            {"allocations": Port("allocations", many=True, optional=True), "models": Port("model", many=True)},
            data=("data", "also"),
            reports=True,
        ),
    )
}

HEAD = """\
version: 1
model: model
data:
  calibration: {text: calibration.txt, tokens: 2Ki, sequence_length: 128}
  heldout: {text: heldout.txt}
"""


class Desk:
    """A folder with a model and two texts, and workflow files that are written into it."""

    head, stages = HEAD, STAGES

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "model").mkdir()
        for name in ("calibration.txt", "heldout.txt"):
            (folder / name).write_text("once upon a time")

    def write(self, text: str, name: str = "flow.yaml") -> Path:
        """Write a file; its text may be indented like the test around it."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    def load(self, body: str, name: str = "flow.yaml", **options: Any) -> Workflow:
        """Load a workflow made of the head (5 lines) and the rest of the file."""
        return load_workflow(self.write(HEAD + textwrap.dedent(body), name), find_stage=STAGES, **options)

    def mistakes(self, body: str, *, head: str = HEAD, **options: Any) -> list[str]:
        """What is wrong with a workflow, as `line:column: text`, without the name of the file."""
        from layerwise.errors import WorkflowError

        path = self.write(head + textwrap.dedent(body))
        with pytest.raises(WorkflowError) as caught:
            load_workflow(path, find_stage=STAGES, **options)
        return [str(mistake).removeprefix(f"{path}:") for mistake in caught.value.mistakes]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def fakes() -> SimpleNamespace:
    """The classes above, for tests of single modules."""
    return SimpleNamespace(MenuParams=MenuParams, SearchParams=SearchParams, StatsParams=StatsParams, stages=STAGES)


@pytest.fixture(scope="session")
def fake_stages() -> ModuleType:
    """Stages that count, for tests that really run something: the module `fake_stages.py`."""
    spec = importlib.util.spec_from_file_location("fake_stages", Path(__file__).with_name("fake_stages.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def workshop(fake_stages: ModuleType, tmp_path: Path) -> Any:
    """A folder with a workflow of fake stages that can be run."""
    return fake_stages.Workshop(tmp_path)


TINY_WORKFLOW = """\
version: 1
model: model
data:
  calibration: {text: calibration.txt, tokens: 512, sequence_length: 64}
  heldout: {text: heldout.txt, tokens: 512, sequence_length: 64}
params:
  bits: [2, 4, 8]
  budgets: [3, 4, 5]
stages:
  statistics: {uses: calibrate, with: {shards: 3}}
  levels:
    uses: compress
    needs: [statistics]
    with: {menu: [{method: gptq, bits: "${{ params.bits }}", group_size: 16}]}
  profile: {uses: profile, needs: [levels], with: {tokens: 256}}
  search:
    uses: allocate
    needs: [levels, profile]
    foreach: [ilp, evolve]
    with:
      solver: ${{ item }}
      budgets: {bits: "${{ params.budgets }}"}
      preset: quick
      generations: 3
      tokens_per_selection: [128, 512]
  score: {uses: evaluate, needs: [levels, search]}
  best: {uses: apply, needs: [levels, search@evolve]}
  model: {uses: export, needs: [best]}
profiles:
  short: {params: {budgets: [4]}}
"""


@pytest.fixture(scope="session")
def tiny_workflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a workflow with everything from statistics to a checkpoint, on a random Llama of 14 units.

    Its tokens are bytes, its weights ten times as large as usual, so that levels differ in what they cost in quality.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=64, initializer_range=0.2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for seed, name in enumerate(("calibration.txt", "heldout.txt")):
        letters = random.Random(seed)
        (folder / name).write_text("".join(letters.choice("abcdefgh ") for _ in range(1000)))
    path = folder / "flow.yaml"
    path.write_text(TINY_WORKFLOW)
    return path


@pytest.fixture
def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home folder without a token, and no variable of Ray or of a proxy, whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("RAY_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


@dataclass
class FakeCluster:
    """A dashboard as Ray 2.60 guards it: 401 without a token, 403 with a wrong one."""

    token: str | None = "5ecret" * 8
    version: Any = "2.60.0"
    status: int | None = None  # answers this whatever is asked
    location: str | None = None  # and leads there
    status_for_token: int | None = None  # answers this once a token came
    address: str = ""
    seen: list[tuple[str, str | None]] = field(default_factory=list)

    def answer(self, path: str, given: str | None) -> tuple[int, str]:
        self.seen.append((path, given))
        if given is not None and self.status_for_token:
            return self.status_for_token, ""
        if self.status is not None:
            return self.status, ""
        if self.token is not None and given is None:
            return 401, "Unauthorized: Missing authentication token"
        if self.token is not None and given != f"Bearer {self.token}":
            return 403, "Forbidden: Invalid authentication token"
        return 200, json.dumps({"version": "4", "ray_version": self.version}) if path == "/api/version" else "[]"

    @property
    def sent(self) -> set[str | None]:
        return {given for _, given in self.seen}


@pytest.fixture
def fake_cluster() -> Iterator[FakeCluster]:
    """A cluster's door on loopback."""
    fake = FakeCluster()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = fake.answer(self.path, self.headers["Authorization"])
            self.send_response(status)
            if fake.location:
                self.send_header("Location", fake.location)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield fake
        server.shutdown()
