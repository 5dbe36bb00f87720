"""What the tables, the process and Ray say of an attempt, put together: every combination, one line each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from layerwise.errors import ClusterError
from layerwise.pipeline.cluster.jobs import Job, Jobs
from layerwise.pipeline.cluster.liveness import Clusters, judge, refusal
from layerwise.pipeline.cluster.submission import Submission
from layerwise.pipeline.runs.attempt import Attempt
from layerwise.pipeline.runs.process import Process

SUBMISSION = Submission(1, "lw-a", "http://head:8265")
HERE = Process.this()
PROCESSES = {"alive": HERE, "dead": replace(HERE, started="1"), "elsewhere": replace(HERE, host="far-away")}
GONE, NONE = "gone", "none"


class FakeJobs:
    """One job, as Ray tells of it."""

    def __init__(self, said: str) -> None:
        self.said = said

    def find(self, job: str) -> Job | None:
        assert job == "lw-a"
        return None if self.said == NONE else Job(self.said, "the last lines", 2)

    def log(self, job: str) -> str:
        return "Running entrypoint\nerror: it cannot be\nhint: mend it\n"


@pytest.fixture
def ray_says(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what Ray says; gives the list of visits."""
    visits: list[str] = []

    def say(said: str) -> list[str]:
        def at(address: str, *, in_clear: bool = False) -> Jobs:
            visits.append(address)
            if said == GONE:
                raise ClusterError(f"{address} cannot be reached")
            return cast(Jobs, FakeJobs(said))

        monkeypatch.setattr(Jobs, "recorded", at)
        return visits

    return say


def attempt(process: str | None) -> Attempt | None:
    return None if process is None else Attempt(1, PROCESSES[process], "ray", (), SUBMISSION.submitted_at)


@pytest.mark.parametrize("status", ["ok", "failed", "stopped"])
@pytest.mark.parametrize("process", [None, "alive", "dead", "elsewhere"])
def test_an_end_that_was_written_holds_and_nobody_is_asked(ray_says: Any, status: str, process: str | None) -> None:
    visits = ray_says("RUNNING")
    told = judge(status, attempt(process), SUBMISSION, Clusters(), thorough=True)
    assert (told.status, told.checked, told.remark, visits) == (status, True, None, [])


@pytest.mark.parametrize("process", ["alive", "dead"])
def test_where_the_process_answers_ray_is_not_asked(ray_says: Any, process: str) -> None:
    visits = ray_says(GONE)
    told = judge("running", attempt(process), SUBMISSION, Clusters())
    assert (told.status, told.checked) == ({"alive": "running", "dead": "interrupted"}[process], True)
    assert visits == []


@pytest.mark.parametrize(
    ("process", "said", "status", "remark"),
    [
        ("alive", "RUNNING", "running", None),
        ("alive", "FAILED", "running", "Ray says FAILED of job lw-a, but its process is at work"),
        ("alive", NONE, "running", "knows no job lw-a"),
        ("alive", GONE, "running", None),
        ("dead", "FAILED", "interrupted", None),
        ("dead", "RUNNING", "interrupted", "Ray says RUNNING of job lw-a, but its process is gone"),
        ("dead", GONE, "interrupted", None),
        ("elsewhere", "RUNNING", "running", None),
        ("elsewhere", "PENDING", "running", None),
        ("elsewhere", "FAILED", "interrupted", "Ray says FAILED of job lw-a"),
        ("elsewhere", "SUCCEEDED", "interrupted", "Ray says SUCCEEDED of job lw-a"),
        ("elsewhere", NONE, "interrupted", "the cluster at http://head:8265 knows no job lw-a"),
        (None, "PENDING", "pending", None),
        (None, "RUNNING", "pending", None),
        (None, "STOPPED", "stopped", "was stopped before it began"),
        (None, "FAILED", "failed", None),
        (None, NONE, "interrupted", "knows no job lw-a"),
    ],
)
def test_who_wants_to_know_everything_hears_what_ray_says(
    ray_says: Any, process: str | None, said: str, status: str, remark: str | None
) -> None:
    ray_says(said)
    told = judge(None if process is None else "running", attempt(process), SUBMISSION, Clusters(), thorough=True)
    assert (told.status, told.checked) == (status, True)
    assert (told.remark is None) is (remark is None)
    assert (remark or "") in (told.remark or "")


@pytest.mark.parametrize(("process", "status"), [(None, "pending"), ("elsewhere", "running")])
def test_where_only_ray_can_say_and_is_gone_nothing_is_claimed(ray_says: Any, process: str | None, status: str) -> None:
    ray_says(GONE)
    told = judge(None if process is None else "running", attempt(process), SUBMISSION, Clusters())
    assert (told.status, told.checked, told.remark) == (status, False, "http://head:8265 cannot be reached")
    assert told.failure is not None


def test_a_job_that_failed_before_it_began_says_why_in_its_own_words(ray_says: Any) -> None:
    ray_says("FAILED")
    assert judge(None, None, SUBMISSION, Clusters()).error == "it cannot be\nhint: mend it"
    assert refusal("no error here") == ""


def test_an_attempt_that_has_begun_but_written_nothing_is_asked_about(ray_says: Any) -> None:
    ray_says(GONE)
    assert judge(None, attempt("alive"), SUBMISSION, Clusters()).status == "running"
    assert judge(None, attempt("dead"), None, Clusters()).status == "interrupted"
    assert judge(None, None, None, Clusters()).status == "not started"


def test_an_attempt_with_a_later_one_is_over(ray_says: Any) -> None:
    visits = ray_says("RUNNING")
    assert judge("running", attempt("elsewhere"), SUBMISSION, Clusters(), over=True).status == "interrupted"
    assert visits == []


def test_a_cluster_is_visited_once_until_it_is_forgotten(ray_says: Any) -> None:
    visits, clusters = ray_says(GONE), Clusters()
    for _ in range(3):
        judge(None, None, SUBMISSION, clusters)
    assert visits == ["http://head:8265"]
    clusters.forget()
    judge(None, None, SUBMISSION, clusters)
    assert len(visits) == 2
