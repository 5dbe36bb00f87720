"""The driver of a submitted run: what it makes sure of before it begins."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerwise.errors import StoreError, UsageError
from layerwise.pipeline.cluster import driver
from layerwise.pipeline.cluster.shipping import cargo, stage_job
from layerwise.pipeline.cluster.submission import Submission, publish_submission
from layerwise.pipeline.display import SilentDisplay
from layerwise.pipeline.runs.attempt import begin_attempt
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.workflow import load_workflow


@pytest.fixture
def run(tiny_workflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that was submitted, seen from the folder of its job."""
    workflow = load_workflow(tiny_workflow)
    run = Run(workflow, tmp_path / "results", SilentDisplay())
    run.keep_workflow()
    monkeypatch.chdir(stage_job(tmp_path, workflow, cargo(workflow)))
    return run


def submitted(run: Run, number: int = 1, elsewhere: tuple[str, ...] = ()) -> Submission:
    submission = Submission(number, "lw-a", "http://head:8265", elsewhere=elsewhere)
    publish_submission(run.folder, submission, run.artifacts.tmp)
    return submission


def refusal(run: Run, nonce: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        driver.drive(run.store.root, run.id, 1, nonce)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert f"on {socket.gethostname()}, where the job runs" in caught.value.message
    assert not (run.folder / "attempts").exists()
    return caught.value


def test_a_results_folder_without_the_submission_is_not_visible(run: Run) -> None:
    assert f"the results folder {run.store.root} is not visible" in refusal(run, "x").message


def test_a_folder_of_another_submission_is_another_one(run: Run) -> None:
    submitted(run)
    assert "is another one than where it was submitted" in refusal(run, "x").message


def test_every_path_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    here, gone = str(tmp_path), (str(tmp_path / "a"), str(tmp_path / "b"))
    submission = submitted(run, elsewhere=(here, *gone))
    assert refusal(run, submission.nonce).message.endswith(f": {', '.join(gone)}")


def test_a_text_with_another_content_is_refused(run: Run) -> None:
    submission = submitted(run)
    (Path.cwd() / "files" / "text-0.txt").write_text("something else")
    assert "is not the one that was submitted: this would be flow-" in refusal(run, submission.nonce).message


def test_an_attempt_that_has_begun_is_not_begun_again(run: Run) -> None:
    submission = submitted(run)
    begin_attempt(run.folder, "ray", [], run.artifacts.tmp, submitted=1)
    with pytest.raises(StoreError, match="has begun already"):
        driver.drive(run.store.root, run.id, 1, submission.nonce)


# --- as a program ---


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """What the program changes in this process is put back."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def ended(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["job", *arguments])
    with pytest.raises(SystemExit) as caught:
        driver.main()
    return caught.value.code


def test_a_mistake_is_told_with_its_hint_and_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ended(monkeypatch, "/nowhere", "run", "1", "x") == 2
    assert capsys.readouterr().err.startswith("error: the results folder /nowhere is not visible on ")


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGHUP])
def test_a_job_that_is_stopped_ends_with_exit_code_3(
    name: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "drive", lambda *_: signal.raise_signal(name))
    assert ended(monkeypatch, "/nowhere", "run", "1", "x") == 3
    assert "what is finished is kept" in capsys.readouterr().err


def test_a_python_that_is_too_old_or_lacks_something_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_NEEDED", ("numpy", "no_such_module", "nor_this"))
    assert ended(monkeypatch) == 2
    told = capsys.readouterr().err
    assert ", lacks no_such_module, nor_this\nhint: install layerwise, or what it requires, on every machine" in told
    monkeypatch.setattr(driver, "OLDEST_PYTHON", (9, 0))
    assert ended(monkeypatch) == 2
    assert "layerwise needs Python 9.0 or later; the cluster's Ray runs on " in capsys.readouterr().err
