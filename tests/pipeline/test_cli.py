"""The command line: what it answers on stdout, what it tells on stderr, and how it ends."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from layerwise import __version__ as layerwise_version
from layerwise.pipeline import cli

COMMANDS = ["run", "submit", "manifest", "validate", "schema", "graph", "runs", "status", "logs", "stop", "resume"]
COMMANDS += ["frontier", "show", "bench", "doctor"]
STAGES = ["statistics", "levels", "profile", "search@ilp", "search@evolve", "score", "best", "model"]
HEAVY = {"torch", "ray", "transformers"}


Layerwise = Callable[..., Any]


@pytest.fixture(autouse=True)
def same_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in this process, so what they change in it is put back."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup` it is ignored
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    monkeypatch.setenv("COLUMNS", "200")
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def layerwise(in_process: Layerwise) -> Layerwise:
    """The `layerwise` command."""
    return in_process


@pytest.fixture(scope="module")
def finished(tiny_workflow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of a run that went through."""
    results, out, err = tmp_path_factory.mktemp("finished") / "results", io.StringIO(), io.StringIO()
    command = ["layerwise", "run", str(tiny_workflow), "--results", str(results), "--executor", "inline"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", command)
        cli.main()
    assert "search@evolve" in out.getvalue()
    assert "levels: done in" in err.getvalue()
    assert f"model: {results}" in err.getvalue()
    return results


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# --- answers ---


def test_help_lists_every_command(layerwise: Layerwise) -> None:
    outcome = layerwise("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in outcome.out
        assert layerwise(command, "--help").code == 0


def test_validate_answers_on_stdout(layerwise: Layerwise, tiny_workflow: Path) -> None:
    assert layerwise("validate", tiny_workflow) == (0, f"{tiny_workflow}: 8 stages, no errors\n", "")


def test_the_resolved_workflow_is_a_workflow_that_means_the_same(
    layerwise: Layerwise, tiny_workflow: Path, finished: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(layerwise("validate", tiny_workflow, "--resolved").out)
    second.write_text(layerwise("validate", first, "--resolved").out)
    assert layerwise("validate", second, "--resolved").out == second.read_text()
    dry = layerwise("run", first, "--results", finished, "--dry-run")
    assert dry.out.splitlines() == [f"{stage}: cached" for stage in STAGES]


def test_options_change_what_is_validated(layerwise: Layerwise, tiny_workflow: Path) -> None:
    def resolved(*options: str) -> str:
        return layerwise("validate", tiny_workflow, "--resolved", *options).out

    assert "seed: 7" in resolved("-s", "stages.search.with.seed=7")
    assert "bits: [3, 5]" in resolved("-p", "bits=[3, 5]")
    assert resolved("--profile", "short") == resolved("-p", "budgets=[4]")
    assert resolved("--profile", "short") != resolved()


def test_graph_draws_every_stage_as_text_and_as_mermaid(layerwise: Layerwise, tiny_workflow: Path) -> None:
    for options in ([], ["--format", "mermaid"]):
        outcome = layerwise("graph", tiny_workflow, *options)
        assert (outcome.code, outcome.err) == (0, "")
        assert all(stage.partition("@")[0] in outcome.out for stage in STAGES)
    assert "flowchart" in outcome.out or "graph" in outcome.out


def test_schema_is_json_for_all_or_one_stage(layerwise: Layerwise) -> None:
    assert "stages" in json.loads(layerwise("schema").out)["properties"]
    assert "budgets" in layerwise("schema", "--stage", "allocate").out
    assert "survivors_per_selection" in json.dumps(json.loads(layerwise("schema", "--stage", "allocate").out))


def test_a_dry_run_says_what_would_run_and_makes_nothing(
    layerwise: Layerwise, tiny_workflow: Path, tmp_path: Path
) -> None:
    outcome = layerwise("run", tiny_workflow, "--results", tmp_path / "results", "--dry-run")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "statistics: would run (not there yet)"
    assert lines[1].startswith("  note: 16,384 of 36,864 weights (44%) stay as they are: ")
    assert lines[2] == "levels: would run (waits for statistics)"
    assert len(lines) == 9
    assert not (tmp_path / "results" / "artifacts").exists()


def test_a_dry_run_names_what_changed(layerwise: Layerwise, tiny_workflow: Path, finished: Path) -> None:
    dry = ["run", tiny_workflow, "--results", finished, "--dry-run"]
    assert layerwise(*dry).out.splitlines() == [f"{stage}: cached" for stage in STAGES]
    lines = layerwise(*dry, "-p", "bits=[2, 8]").out.splitlines()
    assert lines[0] == "statistics: cached"
    assert lines[1].startswith("levels: would run (changed: with.menu")
    assert lines[2] == "profile: would run (waits for levels)"


def test_a_second_run_is_cached_loads_neither_torch_nor_ray_and_answers_the_same(
    tiny_workflow: Path, finished: Path
) -> None:
    script = f"""
import sys
from layerwise.pipeline.cli import main
try:
    main()
finally:
    print("heavy:", sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""
    command = [sys.executable, "-c", script, "run", str(tiny_workflow), "--results", str(finished)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stderr.count(": cached") == 8
    assert "heavy: []" in done.stderr
    assert "search@ilp" in done.stdout


def test_the_frontier_has_every_column_that_it_is_read_for(layerwise: Layerwise, finished: Path) -> None:
    outcome = layerwise("frontier", "--results", finished, "--format", "csv", "--all")
    assert (outcome.code, outcome.err) == (0, "")
    table = rows(outcome.out)
    assert len(table) == 6
    for column in ("run", "stage", "solver", "budget", "bits", "effective_bits", "bytes", "kl", "candidate"):
        assert all(row[column] for row in table)
    for row in table:
        assert float(row["heldout_kl"]) >= 0
        assert float(row["heldout_perplexity"]) > 1
        assert float(row["bits"]) <= float(row["budget"].removeprefix("bits="))
        assert float(row["bits"]) < float(row["effective_bits"])


def test_every_format_holds_the_same_candidates(layerwise: Layerwise, finished: Path) -> None:
    known = {row["candidate"] for row in rows(layerwise("frontier", "--results", finished, "--format", "csv").out)}
    assert known
    found = json.loads(layerwise("frontier", "--results", finished, "--format", "json").out)
    assert {row["candidate"] for row in found} == known
    for format_ in ("table", "markdown"):
        out = layerwise("frontier", "--results", finished, "--format", format_).out
        assert all(candidate in out for candidate in known)


def test_the_frontier_can_be_narrowed_and_drawn(layerwise: Layerwise, finished: Path, tmp_path: Path) -> None:
    ilp = layerwise("frontier", "--results", finished, "--format", "csv", "--all", "--solver", "ilp")
    assert {row["solver"] for row in rows(ilp.out)} == {"ilp"}
    over = layerwise("frontier", "flow", "--results", finished, "--over", "bytes", "--loss", "kl", "--format", "csv")
    assert {row["ranked_by"] for row in rows(over.out)} == {"kl"}
    drawn = layerwise("frontier", "--results", finished, "--plot", tmp_path / "frontier.png", "--format", "csv")
    assert drawn.err == f"wrote {tmp_path / 'frontier.png'}\n"
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert rows(drawn.out)


def test_runs_lists_the_run_and_show_gives_every_unit(layerwise: Layerwise, finished: Path) -> None:
    (listed,) = rows(layerwise("runs", "--results", finished, "--format", "csv").out)
    assert (listed["name"], listed["status"]) == ("flow", "ok")
    candidate = rows(layerwise("frontier", "--results", finished, "--format", "csv").out)[0]["candidate"]
    units = rows(layerwise("show", candidate[:6], "--results", finished, "--format", "csv").out)
    assert len(units) == 14
    assert all(row["level"].startswith("gptq-") for row in units)
    shown = layerwise("show", candidate, "--results", finished)
    assert shown.out.startswith(f"candidate: {candidate}\n")
    assert "heldout" in shown.out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", ["frontier", "runs", "status", "show", "graph", "validate"])
def test_no_output_ends_a_command_for_want_of_a_character(
    layerwise: Layerwise, finished: Path, tiny_workflow: Path, tmp_path: Path, encoding: str, command: str
) -> None:
    flow = tmp_path / "größe–→.yaml"
    flow.write_bytes(tiny_workflow.read_bytes())
    of_file = command in ("graph", "validate")
    arguments = [flow] if of_file else ["--results", finished]
    if command == "show":
        arguments.insert(0, rows(layerwise("frontier", "--format", "csv", "--results", finished).out)[0]["candidate"])
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    line = [sys.executable, "-m", "layerwise", command, *map(str, arguments)]
    done = subprocess.run(
        line, capture_output=True, env=environment, cwd=tiny_workflow.parent, timeout=120, check=False
    )
    wrong = of_file  # the model is not beside the copy: the message has the file's name
    assert done.returncode == (2 if wrong else 0), done.stderr
    text = (done.stderr if wrong else done.stdout).decode(encoding)
    assert "UnicodeEncodeError" not in text
    if command == "frontier":
        assert "------" in text
    if wrong:
        assert ("gr\\xf6\\xdfe->" if encoding == "ascii" else "größe->") in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_version_and_the_completion_of_each_shell_are_there(shell: str, layerwise: Layerwise) -> None:
    assert layerwise("--version").out == f"layerwise {layerwise_version}\n"
    program = "import sys; sys.argv = ['layerwise']; from layerwise.pipeline.cli import main; main()"

    def asked(**variables: str) -> str:
        environment = os.environ | {"_LAYERWISE_COMPLETE": f"complete_{shell}"} | variables
        command = [sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, env=environment, text=True, timeout=120, check=False).stdout

    assert "complete_" + shell in asked(_LAYERWISE_COMPLETE=f"source_{shell}")
    bash = {"COMP_WORDS": "layerwise re", "COMP_CWORD": "1"}
    others = {"_TYPER_COMPLETE_ARGS": "layerwise re", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert "resume" in asked(**(bash if shell == "bash" else others))


def test_a_closed_pipe_is_no_error(finished: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "layerwise", "frontier", "--results", str(finished)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


# --- mistakes ---


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("preset: quick", "presett: quick", "stages.search.with.presett: unknown key (did you mean 'preset'?)"),
        ("uses: calibrate", "uses: calibrat", "did you mean 'calibrate'?"),
        ("shards: 3", "shards: many", "stages.statistics.with.shards: must be a whole number, got text 'many'"),
        ("shards: 3", "shards: 0", "stages.statistics.with.shards: must be at least 1, got 0"),
        ("model: model", "model: nowhere", "model: folder not found: "),
        ("text: heldout.txt", "text: nowhere.txt", "data.heldout.text: file not found: "),
        ("text: heldout.txt", "text: calibration.txt", "held-out text must be separate"),
        ("{uses: calibrate,", "{uses: calibrate, needs: [score],", "stages need each other in a circle"),
        ("needs: [statistics]", "needs: [statistic]", "did you mean 'statistics'?"),
        ("solver: ${{ item }}", "solver: evlove", "did you mean 'evolve'?"),
        ("version: 1", "version: 2", "this layerwise reads version 1"),
        ("stages:", "stages: [", "expected"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place(
    layerwise: Layerwise, tiny_workflow: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    for name in ("model", "calibration.txt", "heldout.txt"):
        (tmp_path / name).symlink_to(tiny_workflow.parent / name)
    text, path = tiny_workflow.read_text(), tmp_path / "flow.yaml"
    assert old in text
    path.write_text(text.replace(old, new, 1))
    for command in (["validate"], ["run", "--results", tmp_path / "results"]):
        outcome = layerwise(command[0], path, *command[1:])
        assert outcome.code == 2
        assert outcome.out == ""
        assert message in outcome.err
        assert outcome.err.startswith(f"error: {path}:")
        assert re.search(r"^\d errors?$", outcome.err, re.MULTILINE)
        assert "Traceback" not in outcome.err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate", "nowhere.yaml"], "nowhere.yaml"),
        (["validate", "FLOW", "-p", "nothing"], "error: -p nothing: expected NAME=VALUE"),
        (["validate", "FLOW", "-p", "bit=3"], "did you mean 'bits'?"),
        (["validate", "FLOW", "-s", "stages.serch.with.seed=1"], "serch"),
        (["validate", "FLOW", "--profile", "shirt"], "did you mean 'short'?"),
        (["validate", "FLOW", "-p", "budgets=[3, 1.5]"], "1.5 bits per weight is out of reach: the menu has 2 or more"),
        (["schema", "--stage", "alocate"], "did you mean 'allocate'?"),
        (["frontier", "--results", "EMPTY"], "is not a results folder"),
        (["runs", "--results", "EMPTY"], "is not a results folder"),
        (["frontier", "nothing", "--results", "DONE"], "there is no run 'nothing'"),
        (["frontier", "--stage", "nothing", "--results", "DONE"], "has no stage 'nothing'"),
        (["frontier", "--over", "ms", "--results", "DONE"], "add a `latency` stage"),
        (["frontier", "--plot", "/nonexistent/front.png", "--results", "DONE"], "/nonexistent does not exist"),
        (["show", "ffffffffffffffff", "--results", "DONE"], "there is no allocation"),
        (["run", "FLOW", "--results", "EMPTY", "--executor", "rai"], "did you mean 'ray'?"),
        (["run"], "Missing argument"),
        (["run", "FLOW", "--executr", "ray"], "No such option"),
        (["rn"], "No such command"),
        (["frontier", "--over", "money", "--results", "DONE"], "'money'"),
    ],
)
def test_a_wrong_argument_ends_with_code_2_and_a_message(
    layerwise: Layerwise, tiny_workflow: Path, finished: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"FLOW": tiny_workflow, "EMPTY": tmp_path / "empty", "DONE": finished}
    outcome = layerwise(*(places.get(argument, argument) for argument in arguments))
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert message in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data.calibration.tokens=2000", "data.calibration: 2000 tokens asked for, but the text has 1000"),
        ("data.heldout.tokens=64k", "data.heldout: 64000 tokens asked for, but the text has 1000"),
        ("stages.search.with.budgets={bytes: 60000}", "below the least reachable"),
        ("stages.best.with.pick='00000'", "pick: '00000' fits no allocation"),
    ],
)
def test_what_only_running_shows_is_told_as_well_and_loses_nothing(
    layerwise: Layerwise, tiny_workflow: Path, finished: Path, option: str, message: str
) -> None:
    outcome = layerwise("run", tiny_workflow, "--results", finished, "--executor", "inline", "-s", option)
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert message in outcome.err
    assert "\nerror: stage " in outcome.err
    assert "\nhint: " in outcome.err
    assert "go on with: layerwise run" in outcome.err
    assert "Traceback" not in outcome.err
    again = layerwise("run", tiny_workflow, "--results", finished, "--dry-run")
    assert again.out.splitlines() == [f"{stage}: cached" for stage in STAGES]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_told_by_name(
    layerwise: Layerwise, tiny_workflow: Path, tmp_path: Path, value: float
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_workflow.parent, tmp_path / "broken")
    path = tmp_path / "broken" / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, path, metadata={"format": "pt"})
    flow = tmp_path / "broken" / "flow.yaml"
    outcome = layerwise("run", flow, "--results", tmp_path / "results", "--executor", "inline")
    assert outcome.code == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert "model.layers.1.mlp.up_proj.weight has 1 of 2048 values that are NaN or Inf" in outcome.err


def test_a_results_folder_of_a_newer_version_ends_with_code_4(
    layerwise: Layerwise, tiny_workflow: Path, tmp_path: Path
) -> None:
    (tmp_path / "layerwise-store.json").write_text('{"format": 2}\n')
    for command in (["run", tiny_workflow], ["frontier"], ["runs"]):
        outcome = layerwise(*command, "--results", tmp_path)
        assert outcome.code == 4
        assert outcome.out == ""
        assert "was written by a newer layerwise" in outcome.err
        assert "hint: upgrade layerwise" in outcome.err


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_stopped_before_it_began_says_how_to_go_on(
    layerwise: Layerwise,
    tiny_workflow: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    signum: signal.Signals,
) -> None:
    def fetch(*arguments: object) -> None:
        os.kill(os.getpid(), signum)
        time.sleep(60)

    monkeypatch.setattr("layerwise.pipeline.runs.run.fetch", fetch)
    outcome = layerwise("run", tiny_workflow, "--results", tmp_path, *options)
    assert outcome.code == 3
    assert outcome.out == ""
    assert f"stopped; to go on: layerwise run {tiny_workflow}" in outcome.err


def test_a_mistake_of_ours_keeps_its_traceback(
    layerwise: Layerwise, tiny_workflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.pipeline.workflow.load_workflow", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layerwise("validate", tiny_workflow)
