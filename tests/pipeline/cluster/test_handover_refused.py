"""The `submit` command against a cluster that is none: what it refuses, what it warns of, and what it leaves behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from layerwise.pipeline.cluster import handover, jobs, shipping
from layerwise.pipeline.cluster.jobs import Jobs
from layerwise.pipeline.cluster.submission import read_submission
from layerwise.pipeline.consent import name_cluster
from layerwise.pipeline.runs import lifecycle
from layerwise.results.sealed import sealed, unsealed
from layerwise.results.store import Store

SECRET = "5ecret" * 8
GONE = "http://127.0.0.1:9"


Command = Callable[..., Any]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def cluster(fake_cluster: Any, empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster that takes jobs, and leaves them pending; we have its token."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    monkeypatch.setattr(handover, "SECONDS_TO_BEGIN", 0.0)
    monkeypatch.setattr(jobs, "installed_version", lambda _: "2.60.0")
    fake_cluster.given = {}

    def take(self: Jobs, job: str, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Any) -> None:
        assert job not in fake_cluster.jobs, "Ray takes an id but once"
        files = sorted(path.name for path in Path(runtime_env["working_dir"]).rglob("*"))
        fake_cluster.given[job] = {"entrypoint": entrypoint, "files": files, "env": runtime_env["env_vars"]}
        fake_cluster.jobs[job] = {"status": "PENDING", "message": "it waits", "metadata": dict(metadata)}

    monkeypatch.setattr(Jobs, "submit", take)
    yield fake_cluster


@pytest.fixture
def layerwise(results: Path, in_process: Command) -> Command:
    """The `layerwise` command, on this test's results."""
    return lambda *arguments: in_process(*arguments, "--results", results)


@pytest.fixture
def pending(cluster: Any, layerwise: Command, tiny_workflow: Path) -> tuple[str, str]:
    """Run and job of a submission that has not begun."""
    outcome = layerwise("submit", tiny_workflow, "--address", cluster.address)
    assert outcome.code == 0, outcome.err
    assert re.search(r"run flow-\w+: pending, it begins when the cluster is ready", outcome.err)
    _, run, _, job = outcome.out.split()
    return run, job


# --- usage ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit"], "Missing option '--address'"),
        (["submit", "--address", "head:8265"], "expected http://HOST:PORT"),
        (["submit", "--address", GONE, "--pass-env", "NOT_SET_HERE"], "--pass-env NOT_SET_HERE: it is not set here"),
        (["submit", "--address", GONE, "--pass-env", "RAY_AUTH_TOKEN"], "RAY_AUTH_TOKEN: the job has its own"),
        (["manifest", "--image", ""], "--image is empty"),
        (["manifest", "-o", "/nonexistent/job.yaml"], "cannot write /nonexistent/job.yaml: /nonexistent does not"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    layerwise: Command, tiny_workflow: Path, empty_home: Path, results: Path, arguments: list[str], message: str
) -> None:
    command, *options = arguments
    outcome = layerwise(command, tiny_workflow, *options)
    assert outcome.code == 2
    assert message in outcome.err
    assert not list(results.glob("runs/*"))


def test_a_results_folder_that_cannot_be_made_is_refused(in_process: Command, tiny_workflow: Path) -> None:
    outcome = in_process("submit", tiny_workflow, "--address", GONE, "--results", "/proc/x")
    assert outcome.code == 2
    assert "error: cannot use /proc/x as a results folder" in outcome.err


def test_mistakes_in_the_workflow_are_told_before_the_cluster_is_visited(
    cluster: Any, layerwise: Command, tiny_workflow: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(tiny_workflow.read_text().replace("calibration.txt", "nowhere.txt"))
    outcome = layerwise("submit", wrong, "--address", cluster.address)
    assert outcome.code == 2
    assert re.search(rf"{wrong}:4:\d+: .*file not found", outcome.err)
    assert cluster.seen == []


# --- clusters ---


def test_an_address_where_nobody_answers_ends_with_exit_code_5(
    layerwise: Command, tiny_workflow: Path, empty_home: Path, results: Path
) -> None:
    outcome = layerwise("submit", tiny_workflow, "--address", GONE)
    assert outcome.code == 5
    assert f"{GONE} cannot be reached" in outcome.err
    assert not list(results.glob("runs/*/submissions"))


def test_a_variable_that_leads_elsewhere_is_named(
    cluster: Any, layerwise: Command, tiny_workflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    outcome = layerwise("submit", tiny_workflow, "--address", cluster.address)
    assert outcome.code == 2
    assert "RAY_ADDRESS is set" in outcome.err
    assert cluster.seen == []


def test_an_open_cluster_draws_a_warning_or_is_refused(cluster: Any, layerwise: Command, tiny_workflow: Path) -> None:
    cluster.token = None
    refused = layerwise("submit", tiny_workflow, "--address", cluster.address, "--require-auth")
    assert refused.code == 5
    assert "lets anyone in: whoever can reach it runs code there" in refused.err
    assert not cluster.jobs
    warned = layerwise("submit", tiny_workflow, "--address", cluster.address)
    assert warned.code == 0
    assert "warning: " in warned.err
    assert "whoever can reach it runs code there" in warned.err
    assert cluster.sent == {None}


def test_a_token_goes_over_plain_http_only_where_that_is_said_and_then_for_this_run(
    cluster: Any, layerwise: Command, tiny_workflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.pipeline.cluster.connection._is_loopback", lambda _: False)
    refused = layerwise("submit", tiny_workflow, "--address", cluster.address)
    assert refused.code == 5
    assert "--allow-insecure-http" in refused.err
    assert cluster.sent == {None}
    sent = layerwise("submit", tiny_workflow, "--address", cluster.address, "--allow-insecure-http")
    assert sent.code == 0
    assert f"warning: the token travels in clear to {cluster.address}" in sent.err
    assert layerwise("status", sent.out.split()[1]).out.count("pending") > 0


def test_an_old_ray_is_refused_and_another_one_draws_a_warning(
    cluster: Any, layerwise: Command, tiny_workflow: Path
) -> None:
    cluster.version = "2.51.1"
    refused = layerwise("submit", tiny_workflow, "--address", cluster.address)
    assert refused.code == 5
    assert "runs Ray 2.51.1, which lets a web page run code" in refused.err
    assert not cluster.jobs
    cluster.version = "2.55.0"
    warned = layerwise("submit", tiny_workflow, "--address", cluster.address)
    assert warned.code == 0
    assert "warning: the cluster runs Ray 2.55.0, this machine 2.60.0" in warned.err


# --- what is sent ---


def test_a_job_gets_the_files_and_what_it_must_know(
    cluster: Any, pending: tuple[str, str], results: Path, tiny_workflow: Path
) -> None:
    run, job = pending
    assert job == f"lw-{run}-a1"
    submission = read_submission(results / "runs" / run, 1)
    assert submission is not None
    given = cluster.given[job]
    assert given["entrypoint"] == f"exec sh start.sh {results} {run} 1 {submission.nonce}"
    assert {"workflow.yaml", "start.sh", "config.json", "model.safetensors", "text-0.txt"} <= set(given["files"])
    assert submission.elsewhere == ()
    assert SECRET not in json.dumps(given)
    assert SECRET not in submission.__repr__()


def test_what_is_too_large_stays_here_and_must_be_seen(
    cluster: Any, layerwise: Command, tiny_workflow: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "SHIP_LIMIT_BYTES", 1000)
    outcome = layerwise("submit", tiny_workflow, "--address", cluster.address)
    assert outcome.code == 0
    assert "are too large to ship" in outcome.err
    _, run, _, job = outcome.out.split()
    assert cluster.given[job]["files"] == ["start.sh", "workflow.yaml"]
    submission = read_submission(results / "runs" / run, 1)
    assert submission is not None
    folder = tiny_workflow.parent
    assert submission.elsewhere == tuple(str(folder / name) for name in ("model", "calibration.txt", "heldout.txt"))


def test_a_variable_is_handed_on_with_a_warning_and_its_value_is_not_kept(
    cluster: Any, layerwise: Command, tiny_workflow: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_value")
    outcome = layerwise("submit", tiny_workflow, "--address", cluster.address, "--pass-env", "HF_TOKEN")
    assert "warning: everybody who reaches the dashboard can read the values of HF_TOKEN" in outcome.err
    assert "hf_value" not in outcome.out + outcome.err
    ((job, given),) = cluster.given.items()
    assert given["env"]["HF_TOKEN"] == "hf_value"
    (record,) = results.glob("runs/*/submissions/*")
    assert "hf_value" not in record.read_text()
    cluster.jobs[job]["status"] = "STOPPED"
    layerwise("resume", "flow")  # which hands it on again
    assert [given["env"]["HF_TOKEN"] for given in cluster.given.values()] == ["hf_value"] * 2


# --- before it begins ---


def test_a_pending_run_is_seen_and_not_submitted_again(
    cluster: Any, pending: tuple[str, str], layerwise: Command, tiny_workflow: Path
) -> None:
    run, job = pending
    assert re.search(rf"{run} +pending +0/8 ", layerwise("status").out)
    assert f"run {run}: pending, attempt 1 (ray), started " in layerwise("status", "flow").out
    assert layerwise("runs").code == 0
    again = layerwise("submit", tiny_workflow, "--address", cluster.address)
    assert again.code == 0
    assert f"run {run} is at work already, as job {job} at {cluster.address}" in again.err
    assert layerwise("resume", run).code == 4
    assert list(cluster.given) == [job]


def test_a_pending_run_is_stopped_and_resumed_with_the_next_number(
    cluster: Any, pending: tuple[str, str], layerwise: Command
) -> None:
    run, job = pending
    stopped = layerwise("stop", run)
    assert stopped.code == 0
    assert f"run {run}: stopped; to go on: layerwise resume {run}" in stopped.err
    assert cluster.jobs[job]["status"] == "STOPPED"
    assert layerwise("logs", "-f", run).code == 3
    again = layerwise("stop", run)
    assert (again.code, again.err) == (0, stopped.err)
    resumed = layerwise("resume", run)
    assert resumed.code == 0, resumed.err
    assert resumed.out == f"run: {run}\njob: lw-{run}-a2\n"


def test_a_resume_to_a_cluster_that_is_gone_says_how_to_name_another_place(
    cluster: Any, pending: tuple[str, str], layerwise: Command, results: Path
) -> None:
    run, job = pending
    cluster.jobs[job]["status"] = "STOPPED"
    record = results / "runs" / run / "submissions" / "0001.json"
    record.write_bytes(sealed({**unsealed(record.read_bytes()), "address": GONE}))
    name_cluster(GONE)
    elsewhere = "; or --address URL for another cluster, --executor ray to go on here"
    lost = layerwise("resume", run)
    assert lost.code == 5
    assert f"{GONE} cannot be reached" in lost.err
    assert lost.err.endswith(f"{elsewhere}\n")
    named = layerwise("resume", run, "--address", GONE)
    assert named.code == 5
    assert elsewhere not in named.err


def test_a_job_that_fails_before_it_begins_is_told_with_its_words_and_exit_code(
    cluster: Any, pending: tuple[str, str], layerwise: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, job = pending
    cluster.jobs[job] |= {"status": "FAILED", "driver_exit_code": 2}
    cluster.logs[job] = "Running entrypoint\nerror: not visible on head, where the job runs: /model\nhint: put it\n"
    state = layerwise("status", run)
    assert f"{run}: failed, attempt 1" in state.out
    assert "not visible on head, where the job runs: /model" in state.out
    assert "error: not visible on head" in layerwise("logs", run).out
    monkeypatch.setattr(handover, "SECONDS_TO_BEGIN", 60.0)
    take = Jobs.submit

    def fail(self: Jobs, job: str, *given: Any) -> None:
        take(self, job, *given)
        cluster.jobs[job] |= {"status": "FAILED", "driver_exit_code": 2}
        cluster.logs[job] = "error: no such place\n"

    monkeypatch.setattr(Jobs, "submit", fail)
    again = layerwise("resume", run)
    assert again.code == 2
    assert f"error: job lw-{run}-a2 ended before the run began: no such place" in again.err


def test_a_cluster_that_forgot_the_job_is_told(cluster: Any, pending: tuple[str, str], layerwise: Command) -> None:
    run, _ = pending
    cluster.jobs.clear()
    state = layerwise("status", run)
    assert f"{run}: interrupted" in state.out
    assert f"the cluster at {cluster.address} knows no job lw-{run}-a1: it may have been started anew" in state.err
    refused = layerwise("stop", run)
    assert refused.code == 2
    assert "is not at work: the cluster at" in refused.err


def test_who_follows_gives_up_when_the_cluster_is_silent_for_long(
    cluster: Any, pending: tuple[str, str], layerwise: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = pending
    monkeypatch.setattr(lifecycle, "SECONDS_OF_PATIENCE", 0.0)
    monkeypatch.setattr(lifecycle, "SECONDS_BETWEEN_STORE_LOOKS", 0.0)
    cluster.status = 500
    outcome = layerwise("logs", "-f", run)
    assert outcome.code == 5
    assert "HTTP 500" in outcome.err


def test_ctrl_c_while_waiting_leaves_the_job_alone(
    cluster: Any, layerwise: Command, tiny_workflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lifecycle.time, "sleep", interrupt)
    outcome = layerwise("submit", tiny_workflow, "--address", cluster.address, "--wait")
    assert outcome.code == 130
    assert re.search(r"run (flow-\w+) goes on without this window\n  layerwise logs -f \1 --results ", outcome.err)
    assert layerwise("logs", "-f", "flow").code == 130
    assert [job["status"] for job in cluster.jobs.values()] == ["PENDING"]


# --- the same run elsewhere ---


def test_a_second_results_folder_gets_an_id_of_its_own(
    cluster: Any, pending: tuple[str, str], tiny_workflow: Path, layerwise: Command, results: Path
) -> None:
    _, job = pending
    cluster.jobs[job]["metadata"]["layerwise_results"] = "/elsewhere"
    results.rename(results.with_name("moved"))
    outcome = layerwise("submit", tiny_workflow, "--address", cluster.address)
    assert outcome.code == 0, outcome.err
    assert re.search(rf"^job: {job}-\w+$", outcome.out, re.MULTILINE)


def test_a_job_that_works_on_this_folder_without_a_record_there_is_not_doubled(
    cluster: Any, pending: tuple[str, str], tiny_workflow: Path, layerwise: Command, results: Path
) -> None:
    _, job = pending
    results.rename(results.with_name("moved"))
    outcome = layerwise("submit", tiny_workflow, "--address", cluster.address)
    assert outcome.code == 4
    assert f"job {job} at {cluster.address} works on {results}, which has no record of it" in outcome.err


def test_a_run_at_work_in_a_process_here_is_not_submitted(
    cluster: Any, layerwise: Command, tiny_workflow: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerwise.pipeline.display import SilentDisplay
    from layerwise.pipeline.runs.attempt import begin_attempt
    from layerwise.pipeline.runs.run import Run
    from layerwise.pipeline.workflow import load_workflow

    run = Run(load_workflow(tiny_workflow), results, SilentDisplay())
    run.keep_workflow()
    begin_attempt(run.folder, "inline", [], run.artifacts.tmp)  # by this process, which is alive
    outcome = layerwise("submit", tiny_workflow, "--address", cluster.address)
    assert outcome.code == 4
    assert f"run {run.id} is at work, in process " in outcome.err
    assert not cluster.jobs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--executor", "inline", "--address", "http://head:8265"], "--executor inline runs it here, and --address"),
        (["--executor", "inline", "--wait"], "--wait: only for a run that is submitted"),
        (["--address", "auto", "--no-ship"], "--ship/--no-ship: only for a run that is submitted"),
    ],
)
def test_a_resume_of_two_kinds_at_once_is_refused(
    cluster: Any, pending: tuple[str, str], layerwise: Command, arguments: list[str], message: str
) -> None:
    outcome = layerwise("resume", pending[0], *arguments)
    assert outcome.code == 2
    assert message in outcome.err


def test_a_pending_run_has_left_no_row(pending: tuple[str, str], results: Path) -> None:
    assert Store.open(results).rows("runs") == []
