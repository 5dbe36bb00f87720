"""A cluster's jobs over HTTP: what is asked, what is refused, and where a token goes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import ClusterError, UsageError
from layerwise.pipeline.cluster import jobs as jobs_module
from layerwise.pipeline.cluster.jobs import Job, Jobs, check_variables, check_version
from layerwise.pipeline.cluster.tokens import Token

SECRET = "5ecret" * 8

pytestmark = pytest.mark.usefixtures("empty_home")


@pytest.fixture
def cluster(fake_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cluster with one job, and we have its token."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    fake_cluster.jobs["lw-a"] = {
        "status": "FAILED",
        "message": "it broke",
        "driver_exit_code": 2,
        "metadata": {"layerwise_results": "/r"},
    }
    fake_cluster.logs["lw-a"] = "one\nerror: two\n"
    return fake_cluster


def test_a_job_is_found_with_its_end_and_its_log(cluster: Any) -> None:
    jobs = Jobs.at(cluster.address)
    found = jobs.find("lw-a")
    assert found == Job("FAILED", "it broke", 2, "/r")
    assert found.over
    assert jobs.log("lw-a") == "one\nerror: two\n"
    assert jobs.find("lw-b") is None
    assert jobs.log("lw-b") == ""
    assert cluster.sent == {None, f"Bearer {SECRET}"}


@pytest.mark.parametrize(("status", "over"), [("PENDING", False), ("RUNNING", False), ("STOPPED", True)])
def test_a_job_without_an_exit_code_has_none(cluster: Any, status: str, over: bool) -> None:
    cluster.jobs["lw-a"] = {"status": status, "message": None, "driver_exit_code": None}
    found = Jobs.at(cluster.address).find("lw-a")
    assert found == Job(status)
    assert found.over is over


def test_a_job_is_stopped_and_an_unknown_one_is_no_error(cluster: Any) -> None:
    jobs = Jobs.at(cluster.address)
    jobs.stop("lw-a")
    assert cluster.jobs["lw-a"]["status"] == "STOPPED"
    jobs.stop("lw-b")


def test_a_server_that_answers_nonsense_or_not_at_all_is_told(cluster: Any) -> None:
    jobs = Jobs.at(cluster.address)
    cluster.status_for_token = 500
    for ask in (jobs.find, jobs.log, jobs.stop):
        with pytest.raises(ClusterError, match="does not answer as Ray's job server does: HTTP 500"):
            ask("lw-a")
    cluster.status_for_token = 200
    with pytest.raises(ClusterError, match="HTTP 200"):
        jobs.find("lw-a")
    with pytest.raises(ClusterError, match=r"http://127.0.0.1:9 cannot be reached"):
        Jobs("http://127.0.0.1:9", None, None).find("lw-a")


@pytest.mark.parametrize(
    ("theirs", "warns"), [("2.60.0", False), ("2.60.9", False), ("2.59.1", True), ("2.61.0", True), ("3.0.0", True)]
)
def test_another_minor_version_draws_a_warning(monkeypatch: pytest.MonkeyPatch, theirs: str, warns: bool) -> None:
    monkeypatch.setattr(jobs_module, "installed_version", lambda _: "2.60.0")
    warning = check_version(Jobs("http://head:8265", None, theirs))
    assert (warning is not None) is warns
    assert warning is None or f"Ray {theirs}, this machine 2.60.0" in warning


@pytest.mark.parametrize(("theirs", "message"), [("2.51.2", "2.51.2, which lets a web page"), (None, "does not say")])
def test_an_old_ray_and_one_that_hides_its_version_are_refused(theirs: str | None, message: str) -> None:
    with pytest.raises(ClusterError, match=message) as caught:
        check_version(Jobs("http://head:8265", None, theirs))
    assert caught.value.exit_code == 5
    assert caught.value.hint


@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_a_variable_that_leads_elsewhere_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://other:8265")
    with pytest.raises(UsageError, match=f"{name} is set") as caught:
        check_variables("http://head:8265")
    assert caught.value.hint == f"unset {name}"
    monkeypatch.setenv(name, "HEAD:8265/")
    check_variables("http://head:8265")


def test_of_two_variables_the_one_counts_that_ray_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    check_variables("http://head:8265")


SUBMIT = """
import sys
from layerwise.errors import LayerwiseError
from layerwise.pipeline.cluster.jobs import Jobs
from layerwise.pipeline.cluster.tokens import Token

address, token = sys.argv[1:]
try:
    Jobs(address, Token("a test", token) if token else None, "2.60.0").submit("lw-b", "true", {}, {})
except LayerwiseError as error:
    print(f"{error.exit_code} {error}")
"""


def submitted(address: str, token: str, **env: str) -> str:
    """What becomes of a job that is submitted in a process of its own, which may import Ray."""
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT, address, token],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rays_client_sends_the_token_and_passes_no_proxy_to_this_machine(cluster: Any) -> None:
    told = submitted(cluster.address, SECRET, http_proxy="http://127.0.0.1:9")
    assert told == ""
    assert cluster.jobs["lw-b"]["entrypoint"] == "true"
    assert {path for path, _ in cluster.seen} >= {"/api/version", "/api/jobs/"}
    assert cluster.sent == {f"Bearer {SECRET}"}


def test_rays_client_sends_no_token_to_a_cluster_that_asks_for_none(cluster: Any) -> None:
    cluster.token = None
    assert submitted(cluster.address, "", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=SECRET) == ""
    assert "lw-b" in cluster.jobs
    assert not any(given for given in cluster.sent)


def test_a_job_that_is_not_taken_is_told_without_the_token(cluster: Any) -> None:
    cluster.status_for_token = 500
    told = submitted(cluster.address, SECRET)
    assert told.startswith(f"5 {cluster.address} did not take the job lw-b: ")
    assert SECRET not in told


def test_rays_client_is_told_where_nobody_answers() -> None:
    told = submitted("http://127.0.0.1:9", SECRET)
    assert told.startswith("5 http://127.0.0.1:9 did not take the job lw-b: ")


def test_asking_imports_no_ray(cluster: Any, tmp_path: Path) -> None:
    script = (
        "import sys; from layerwise.pipeline.cluster.jobs import Jobs; jobs = Jobs.at(sys.argv[1]); "
        "jobs.find('lw-a'), jobs.log('lw-a'), jobs.stop('lw-a'); print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, cluster.address], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


def test_a_token_is_not_shown_by_what_holds_it() -> None:
    assert SECRET not in repr(Jobs("http://head:8265", Token("a test", SECRET), None))
