"""A stranger's results folder and every command that reads one: nothing leaves this machine, and nothing of it runs.

The stranger listens on loopback, where a token needs no leave to travel in clear, and keeps whatever reaches him.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from layerwise.pipeline.cluster import handover
from layerwise.pipeline.cluster import jobs as cluster_jobs
from layerwise.pipeline.cluster.jobs import Jobs
from layerwise.pipeline.cluster.submission import Submission, publish_submission, read_submission
from layerwise.pipeline.consent import NotNamed, consent_file, consent_to, name_cluster
from layerwise.pipeline.display import SilentDisplay
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.workflow import load_workflow
from layerwise.pipeline.workflow.fileformat import StageName
from layerwise.results.durable import publish_file
from layerwise.results.store import Store, _parquet

Command = Callable[..., Any]

TOKEN, VARIABLE, VALUE = "5ecret" * 8, "CLOUD_ACCESS_KEY", "v4lue" * 8
HEAD = "http://head:8265"


@dataclass
class Stranger:
    """A server that asks for a token, and keeps all that it is sent."""

    address: str = ""
    status: str = "RUNNING"
    connections: int = 0
    heard: list[str] = field(default_factory=list)


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    kept = Stranger()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            kept.heard.append(f"{self.requestline}\n{self.headers}\n{body!r}")
            self.send_response(200 if self.headers["Authorization"] else 401)
            self.end_headers()
            self.wfile.write(json.dumps({"ray_version": "2.60.0", "status": kept.status}).encode())

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        def get_request(self) -> Any:
            kept.connections += 1
            return super().get_request()

    with Server(("127.0.0.1", 0), Handler) as server:
        kept.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield kept
        server.shutdown()


@pytest.fixture
def secrets(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has, and the stranger wants."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv(VARIABLE, VALUE)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a job was given, instead of being uploaded."""
    jobs: list[Any] = []

    def take(self: Jobs, job: str, entrypoint: str, runtime_env: Any, metadata: Any) -> None:
        jobs.append((self.address, runtime_env["env_vars"]))

    monkeypatch.setattr(Jobs, "submit", take)
    monkeypatch.setattr(handover, "SECONDS_TO_BEGIN", 0.0)
    monkeypatch.setattr(cluster_jobs, "installed_version", lambda _: "2.60.0")
    return jobs


def plant(workflow: Path, results: Path, address: str, **facts: Any) -> str:
    """A run that says it was submitted there; its id."""
    run = Run(load_workflow(workflow), results, SilentDisplay())
    run.keep_workflow()
    facts = {"in_clear": True, "pass_env": (VARIABLE, "RAY_AUTH_TOKEN"), **facts}
    publish_submission(run.folder, Submission(2, "lw-job", address, **facts), run.artifacts.tmp)
    return run.id


@pytest.fixture
def planted(stranger: Stranger, secrets: None, given: list[Any], tiny_workflow: Path, tmp_path: Path) -> Path:
    """The stranger's results folder."""
    plant(tiny_workflow, tmp_path / "results", stranger.address)
    return tmp_path / "results"


COMMANDS = [
    ["runs"],
    ["status"],
    ["status", "flow"],
    ["status", "flow", "--format", "json"],
    ["logs", "flow"],
    ["logs", "-f", "flow"],
    ["stop", "flow", "--timeout", "0"],
    ["resume", "flow"],
    ["resume", "flow", "--wait", "--allow-insecure-http"],
    ["resume", "flow", "--pass-env", VARIABLE],
    ["frontier", "flow"],
    ["show", "0"],
    ["doctor"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_results_folder_alone_makes_no_command_send_anything(
    planted: Path,
    stranger: Stranger,
    given: list[Any],
    in_process: Command,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if command == ["doctor"]:
        monkeypatch.setattr("layerwise.pipeline.doctor.examination.CHECK_SECONDS", 30.0)
    outcome = in_process(*command, "--results", planted)
    assert (stranger.connections, stranger.heard, given) == (0, [], [])
    assert TOKEN not in outcome.out + outcome.err
    assert VALUE not in outcome.out + outcome.err
    if command[0] in ("resume", "stop", "logs"):
        assert outcome.code == 5
        assert f"{stranger.address}, and you have not; nothing was sent there" in outcome.err
        assert f"--address {stranger.address}" in outcome.err
    assert not consent_file().exists()


def test_submitting_the_same_workflow_elsewhere_asks_nobody_but_that_cluster(
    planted: Path, stranger: Stranger, given: list[Any], in_process: Command, tiny_workflow: Path, fake_cluster: Any
) -> None:
    outcome = in_process("submit", tiny_workflow, "--address", fake_cluster.address, "--results", planted)
    assert outcome.code == 0, outcome.err
    assert stranger.connections == 0
    ((address, variables),) = given
    assert address == fake_cluster.address
    assert VARIABLE not in variables


def test_a_cluster_that_is_named_is_asked_and_gets_the_token_from_then_on(
    planted: Path, stranger: Stranger, in_process: Command
) -> None:
    assert in_process("status", "flow", "--results", planted, "--address", stranger.address + "/").code == 0
    assert any(f"Bearer {TOKEN}" in request for request in stranger.heard)
    stranger.heard.clear()
    assert in_process("status", "flow", "--results", planted).code == 0
    assert any(f"Bearer {TOKEN}" in request for request in stranger.heard)
    assert not any(VALUE in request for request in stranger.heard)


@pytest.mark.parametrize("named", [[], ["--pass-env", VARIABLE]])
def test_a_variable_goes_to_a_named_cluster_only_if_it_is_named_too(
    planted: Path, stranger: Stranger, given: list[Any], in_process: Command, named: list[str]
) -> None:
    name_cluster(stranger.address, pass_env=["OTHER"])
    stranger.status = "STOPPED"
    outcome = in_process("resume", "flow", "--results", planted, "--address", stranger.address, *named)
    assert outcome.code == 0, outcome.err
    ((_, variables),) = given
    assert variables.get(VARIABLE) == (VALUE if named else None)
    told = f"warning: {VARIABLE} is not handed on, for only the results folder asks for it; --pass-env {VARIABLE}"
    assert (told in outcome.err) == (not named)
    assert TOKEN not in json.dumps(variables)
    assert consent_to(stranger.address).pass_env == {"OTHER", *named[1:]}


def test_the_environment_names_a_cluster(
    planted: Path, stranger: Stranger, in_process: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", stranger.address)
    in_process("status", "flow", "--results", planted)
    assert any(f"Bearer {TOKEN}" in request for request in stranger.heard)
    assert consent_to(stranger.address).pass_env == frozenset()


@pytest.mark.parametrize(
    "facts",
    [
        {"address": "file:///etc/passwd"},
        {"address": "http://user@{address}"},
        {"address": "http://head\x1b[31m:8265"},
        {"job": "../../stop"},
        {"job": "lw\n\x1b[2J"},
        {"pass_env": ("A\nB",)},
    ],
    ids=str,
)
def test_a_record_that_no_layerwise_writes_is_none(tmp_path: Path, facts: dict[str, Any]) -> None:
    submission = Submission(**{"number": 1, "job": "lw-a", "address": HEAD, **facts})
    assert publish_submission(tmp_path, submission, tmp_path / "tmp")
    assert read_submission(tmp_path, 1) is None


@pytest.mark.parametrize(
    ("agreed", "recorded", "sent"), [(False, True, False), (True, False, False), (True, True, True)]
)
def test_a_token_travels_in_clear_where_the_user_and_the_record_say_so(
    secrets: None, monkeypatch: pytest.MonkeyPatch, agreed: bool, recorded: bool, sent: bool
) -> None:
    visits: list[bool] = []
    monkeypatch.setattr(Jobs, "at", lambda address, *, in_clear: visits.append(in_clear))
    name_cluster(HEAD, in_clear=agreed)
    name_cluster(HEAD)  # takes nothing back
    Jobs.recorded(HEAD, in_clear=recorded)
    assert visits == [sent]
    with pytest.raises(NotNamed):
        Jobs.recorded("https://head:8265", in_clear=recorded)


@pytest.mark.parametrize("text", ["", "[]", '{"clusters": [1]}', '{"clusters": {"http://head:8265": true}}', "\xff"])
def test_settings_that_cannot_be_read_are_no_consent(secrets: None, text: str) -> None:
    consent_file().parent.mkdir(parents=True)
    consent_file().write_text(text, encoding="latin-1")
    with pytest.raises(NotNamed):
        consent_to(HEAD)
    name_cluster(HEAD)
    assert not consent_to(HEAD).in_clear


# --- code of a model ---


@pytest.fixture
def hostile(tiny_workflow: Path, tmp_path: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workflow whose model is code that leaves a mark; standard input says yes to everything."""
    folder = tmp_path / "stranger"
    shutil.copytree(tiny_workflow.parent, folder)
    model = folder / "model"
    (model / "code.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return folder / "flow.yaml"


def test_a_run_refuses_a_model_that_is_code(hostile: Path, tmp_path: Path, in_process: Command) -> None:
    outcome = in_process("run", hostile, "--executor", "inline", "--results", tmp_path / "results")
    assert outcome.code == 2
    assert "cannot be loaded without code of its own (code.py), which is not run" in outcome.err
    assert not (tmp_path / "it-ran").exists()


def test_trust_that_only_a_results_folder_speaks_of_is_none(
    hostile: Path, tmp_path: Path, in_process: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    hostile.write_text(hostile.read_text().replace("model: model", "model: {path: model, trust: true}"))
    Run(load_workflow(hostile), tmp_path / "results", SilentDisplay()).keep_workflow()
    resume = ["resume", "flow", "--results", tmp_path / "results", "--executor", "inline"]
    refused = in_process(*resume)
    assert refused.code == 2
    assert "lets the model" in refused.err
    assert "--trust" in refused.err
    assert not (tmp_path / "it-ran").exists()
    failed = in_process(*resume, "--trust")
    assert "cannot be loaded with its own code: AttributeError" in failed.err
    assert (tmp_path / "it-ran").exists()


# --- names that lead elsewhere ---


@pytest.mark.parametrize("run_id", ["../../outside", "/outside", "..", "a\x1b[2J", "a\nb"])
def test_a_foreign_table_names_no_run_elsewhere(tmp_path: Path, in_process: Command, run_id: str) -> None:
    store = Store.open(tmp_path / "results", create=True)
    now = datetime.now(UTC)
    row = {"run_id": run_id, "attempt": 1, "seq": 0, "name": "flow", "status": "running", "resolved": '{"stages": {}}'}
    data = _parquet("runs", [{**row, "schema_version": 1, "started_at": now, "written_at": now, "executor": "ray"}])
    publish_file(store.root / "tables" / "runs" / "run=a" / "run.parquet", data, store.root / "tmp")
    (tmp_path / "outside" / "log").mkdir(parents=True)
    (tmp_path / "outside" / "log" / "0001.log").write_text("2026 - mine\n")
    for command in ("status", "logs", "stop", "resume"):
        outcome = in_process(command, "flow", "--results", store.root)
        assert outcome.code == 2
        assert "mine" not in outcome.out
    for command in ("status", "runs"):
        assert run_id not in in_process(command, "--results", store.root).out


@pytest.mark.parametrize("name", ["..", "/a", "a/b", "a@../b", "a@/b", "a\0", "a@\0", "a@b\nc", "a@\x1b[2J", "a@b@c"])
def test_a_stage_cannot_be_called_like_a_way_out(name: str) -> None:
    with pytest.raises(ValidationError, match="cannot name a stage"):
        TypeAdapter(StageName).validate_python(name)
