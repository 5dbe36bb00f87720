"""A process is known by its id and its start, on its own host."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from layerwise.pipeline.runs import process as process_module
from layerwise.pipeline.runs.process import Process


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits to be ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_this_process_is_alive_and_another_of_its_id_is_not() -> None:
    this = Process.this()
    assert this.alive() is True
    assert replace(this, started="12345").alive() is False


def test_a_process_that_ended_is_not_alive_although_nobody_has_collected_it(child: subprocess.Popen[bytes]) -> None:
    started = process_module._started(child.pid)
    assert started is not None
    process = replace(Process.this(), pid=child.pid, started=started)
    assert process.alive() is True
    child.kill()
    while process.alive():
        pass
    assert child.returncode is None
    child.wait()
    assert process.alive() is False


def test_of_another_host_or_container_nothing_is_known() -> None:
    this = Process.this()
    assert replace(this, host="elsewhere").alive() is None
    assert replace(this, namespace="pid:[1]").alive() is None


def test_nothing_survives_a_boot() -> None:
    assert replace(Process.this(), boot="the one before", namespace="pid:[1]").alive() is False


def test_without_proc_the_start_is_asked_of_ps(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(process_module, "_PROC", tmp_path)
    try:
        this = Process.this()
    except FileNotFoundError:
        pytest.skip("this machine has no ps")
    assert this.started
    assert this.alive() is True
    child.kill()
    child.wait()
    assert replace(this, pid=child.pid).alive() is False
