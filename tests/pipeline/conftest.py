"""A small world of stages that do nothing, a way to write workflow files for them, and a cluster that is none."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple

import pytest
from pydantic import AliasChoices, BeforeValidator, Field, field_validator

from layerwise.pipeline import cli
from layerwise.pipeline.workflow import Workflow, load_workflow
from layerwise.stages.contract import Params, Port, Stage


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """The `layerwise` command, in this process."""
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["layerwise", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code or 0
        return Outcome(code, *capsys.readouterr())

    return call


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
            on_gpu=lambda params: params.solver != "dp",
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


@dataclass(frozen=True)
class Head:
    """A head node on loopback that asks for a token.

    Args:
        address: of Ray itself, as `--address` of `run` takes it.
        dashboard: as `--address` of `submit` takes it.
        token: that it asks for.
    """

    address: str
    dashboard: str
    token: str

    def env(self, token: str | None = None, **more: str) -> dict[str, str]:
        """The environment of someone who has a token, by default the right one."""
        return {**plain_environment(), "RAY_AUTH_TOKEN": token or self.token, "RAY_USAGE_STATS_ENABLED": "0", **more}


PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"


def page_blocks(kind: str) -> list[str]:
    """The fenced blocks of docs/cluster.md of one kind: `bash`, `bash head`, `bash illustrative`."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def cluster_page() -> SimpleNamespace:
    """What docs/cluster.md says, for tests."""
    return SimpleNamespace(text=PAGE.read_text(encoding="utf-8"), blocks=page_blocks)


def plain_environment() -> dict[str, str]:
    """Ours without what concerns Ray or a proxy."""
    hidden = ("ray_", "http_proxy", "https_proxy", "all_proxy")
    return {name: value for name, value in os.environ.items() if not name.lower().startswith(hidden)}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, above those that Ray gives to its workers."""
    taken = []
    for port in range(20_000 + os.getpid() % 10_000, 60_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                taken.append(port)
        if len(taken) == count:
            return taken
    raise AssertionError("no free ports")


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """The one head node of the test session, two cores, with its dashboard; mark tests that ask for it `ray`.

    It is started by the commands of docs/cluster.md, on other ports and with an empty home folder. The `python` on its
    PATH knows no Ray. Only processes that were started here are ended.
    """
    import psutil

    gcs, dashboard, agent, client = free_ports(4)
    folder = Path(f"/tmp/lw-head-{os.getpid()}")  # socket paths end at 107 bytes
    folder.mkdir()
    home, wrong = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("bin")
    for name in ("python", "python3"):
        (wrong / name).write_text("#!/bin/sh\necho \"No module named 'ray'\" >&2\nexit 1\n")
        (wrong / name).chmod(0o755)
    env = plain_environment() | {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    env["PATH"] = f"{wrong}:{Path(sys.executable).parent}:{env['PATH']}"
    ports = f"--port {gcs} --dashboard-port {dashboard} --dashboard-agent-listen-port {agent}"
    ports += f" --ray-client-server-port {client} --num-cpus 2 --object-store-memory 100000000 --temp-dir {folder}"
    (script,) = page_blocks("bash head")
    assert "ray start --head --block" in script
    script = script.replace("ray start --head --block", f"exec ray start --head --block {ports}")
    log = (home / "log").open("w")
    process = subprocess.Popen(["bash", "-e", "-c", script], stdout=log, stderr=log, env=env)
    try:
        for _ in range(1200):
            assert process.poll() is None, Path(log.name).read_text()
            with socket.socket() as probe:
                if "block forever" in Path(log.name).read_text() and probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            time.sleep(0.1)
        token = (home / ".ray" / "auth_token").read_text()
        yield Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", token)
        assert process.poll() is None, "nobody may take the cluster down"
    finally:
        if process.poll() is None:
            started = psutil.Process(process.pid).children(recursive=True)
            for child in [*started, process]:
                child.kill()  # an orderly end takes Ray half a minute
            psutil.wait_procs(started)
            process.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home folder without a token or settings, and no variable of Ray or of a proxy, whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("RAY_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME")
    return home


@dataclass
class FakeCluster:
    """A dashboard as Ray 2.60 guards it: 401 without a token, 403 with a wrong one."""

    token: str | None = "5ecret" * 8
    version: Any = "2.60.0"
    status: int | None = None  # answers this whatever is asked
    location: str | None = None  # and leads there
    status_for_token: int | None = None  # answers this once a token came
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)  # by id, as Ray tells of them
    logs: dict[str, str] = field(default_factory=dict)
    address: str = ""
    seen: list[tuple[str, str | None]] = field(default_factory=list)

    def answer(self, path: str, given: str | None, body: bytes = b"") -> tuple[int, str]:
        self.seen.append((path, given))
        if given is not None and self.status_for_token:
            return self.status_for_token, ""
        if self.status is not None:
            return self.status, ""
        if self.token is not None and given is None:
            return 401, "Unauthorized: Missing authentication token"
        if self.token is not None and given != f"Bearer {self.token}":
            return 403, "Forbidden: Invalid authentication token"
        if path == "/api/version":
            return 200, json.dumps({"version": "4", "ray_version": self.version})
        if body and path == "/api/jobs/":
            job = json.loads(body)
            self.jobs[job["submission_id"]] = {"status": "PENDING", **job}
            return 200, json.dumps({"job_id": job["submission_id"], "submission_id": job["submission_id"]})
        return self.job(*path.removeprefix("/api/jobs/").split("/"))

    def job(self, job: str, verb: str = "") -> tuple[int, str]:
        if job and job not in self.jobs:
            return 404, "does not exist"
        if verb == "stop":
            self.jobs[job]["status"] = "STOPPED"
        return 200, json.dumps({"logs": self.logs.get(job, "")} if verb == "logs" else self.jobs.get(job, []))

    @property
    def sent(self) -> set[str | None]:
        return {given for _, given in self.seen}


@pytest.fixture
def fake_cluster() -> Iterator[FakeCluster]:
    """A cluster's door on loopback."""
    fake = FakeCluster()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            status, text = fake.answer(self.path, self.headers["Authorization"], body)
            self.send_response(status)
            if fake.location:
                self.send_header("Location", fake.location)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield fake
        server.shutdown()
