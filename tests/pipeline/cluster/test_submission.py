"""The record of a submission, the id of its job, and the numbers that attempts get."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerwise.errors import StoreError
from layerwise.pipeline.cluster.submission import (
    Submission,
    job_id,
    publish_submission,
    read_submission,
    submission_file,
    submission_numbers,
)
from layerwise.pipeline.runs.attempt import begin_attempt, last_number


def a_submission(number: int = 1) -> Submission:
    return Submission(
        number, job_id("flow-1", number), "http://head:8265", ("layerwise", "submit"), False, ("/model",), ("NAME",)
    )


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    submission = a_submission()
    assert publish_submission(tmp_path, submission, tmp_path / "tmp")
    assert read_submission(tmp_path, 1) == submission


def test_a_number_is_claimed_once(tmp_path: Path) -> None:
    first = a_submission()
    assert publish_submission(tmp_path, first, tmp_path / "tmp")
    assert not publish_submission(tmp_path, a_submission(), tmp_path / "tmp")
    assert read_submission(tmp_path, 1) == first
    assert submission_numbers(tmp_path) == [1]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"number": 1}', '{"submitted_at": 3}'])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    assert read_submission(tmp_path, 1) is None
    path = submission_file(tmp_path, 1)
    path.parent.mkdir()
    path.write_text(text)
    assert read_submission(tmp_path, 1) is None


def test_an_attempt_here_does_not_take_the_number_of_one_that_was_submitted(tmp_path: Path) -> None:
    publish_submission(tmp_path, a_submission(), tmp_path / "tmp")
    assert begin_attempt(tmp_path, "inline", [], tmp_path / "tmp").number == 2
    assert begin_attempt(tmp_path, "ray", [], tmp_path / "tmp", submitted=1).number == 1
    assert last_number(tmp_path) == 2


def test_a_submitted_attempt_begins_once(tmp_path: Path) -> None:
    begin_attempt(tmp_path, "ray", [], tmp_path / "tmp", submitted=1)
    with pytest.raises(StoreError, match=r"attempt 1 of run .* has begun already"):
        begin_attempt(tmp_path, "ray", [], tmp_path / "tmp", submitted=1)


@pytest.mark.parametrize(
    ("run", "job"),
    [
        ("flow-1a2b3c4d", "lw-flow-1a2b3c4d-a3"),
        ("a.b_c-1", "lw-a.b_c-1-a3"),
        ("a b/ü-1", "lw-a-b---1-a3"),
        ("x" * 300 + "-1", "lw-" + "x" * 148 + "-1-a3"),
    ],
)
def test_a_jobs_id_names_run_and_attempt_in_letters_that_ray_takes(run: str, job: str) -> None:
    assert job_id(run, 3) == job
