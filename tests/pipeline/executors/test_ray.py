"""What only Ray can do: work in parallel, lose processes, and stay out of the way."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import StageFailed, UsageError
from layerwise.pipeline.executors import RawExecutor, Resources
from layerwise.pipeline.executors import ray_session as ray_session_module
from layerwise.pipeline.executors.ray_hosts import ATTEMPTS, LOADINGS


@pytest.fixture
def executor(ray_executor: RawExecutor) -> RawExecutor:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
    return ray_executor


def ordered(stream: Iterator[tuple[int, Any]]) -> list[Any]:
    """The answers of a stream in the order of its items."""
    return [answer for _, answer in sorted(stream)]


def begin(folder: Path, item: int) -> int:
    """Leave a trace of this try; how many there were before."""
    before = len(list(folder.glob(f"{item}-*")))
    (folder / f"{item}-{before}").touch()
    return before


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def the_first_waits_for_the_second(folder: Path, item: int) -> int:
    begin(folder, item)
    if item == 0:
        wait_for(folder / "1-0")
        time.sleep(2)  # the second has begun; by now its answer is there, also on a busy machine
    return item


def die_at_the_first_try(folder: Path, item: int) -> int:
    if item == 3 and begin(folder, item) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def always_die(folder: Path, item: int) -> int:
    begin(folder, item)
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def fail_while_the_others_work(folder: Path, item: int) -> int:
    begin(folder, item)
    if item == 0:
        wait_for(folder / "1-0")
        raise ValueError("the first one")
    time.sleep(60)
    return item


def raise_what_cannot_be_sent(item: int) -> int:
    raise ValueError(threading.Lock())


def die_while_loading(folder: Path, times: int) -> Callable[[int], int]:
    """A factory whose process is killed so many times before it has loaded."""
    if begin(folder, 0) < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return abs


def loaded(call: Callable[[Path, int], int], folder: Path) -> Callable[[int], int]:
    return partial(call, folder)


@pytest.mark.ray
def test_items_run_side_by_side_and_arrive_as_they_finish(executor: RawExecutor, tmp_path: Path) -> None:
    assert list(executor.stream(partial(the_first_waits_for_the_second, tmp_path), [0, 1])) == [(1, 1), (0, 0)]
    with executor.replicas(partial(loaded, the_first_waits_for_the_second, tmp_path)) as replicas:
        assert ordered(replicas.stream([0, 1, 2])) == [0, 1, 2]


@pytest.mark.ray
def test_a_task_whose_worker_is_killed_is_repeated(executor: RawExecutor, tmp_path: Path) -> None:
    assert ordered(executor.stream(partial(die_at_the_first_try, tmp_path), list(range(6)))) == [0, 1, 4, 9, 16, 25]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.ray
def test_a_killed_replica_is_replaced_and_its_item_repeated_in_place(executor: RawExecutor, tmp_path: Path) -> None:
    with executor.replicas(partial(loaded, die_at_the_first_try, tmp_path)) as replicas:
        assert ordered(replicas.stream(list(range(6)))) == [0, 1, 4, 9, 16, 25]
        assert len(list(tmp_path.iterdir())) == 2
        assert ordered(replicas.stream([3, 4])) == [9, 16]


@pytest.mark.ray
def test_a_task_that_always_dies_fails_by_name_and_ray_does_not_speak_on_stdout(
    executor: RawExecutor, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(StageFailed, match="unit-b died again and again") as caught:
        ordered(executor.stream(partial(always_die, tmp_path), [0, 1], ["unit-a", "unit-b"]))
    assert caught.value.hint
    assert len(list(tmp_path.glob("1-*"))) == ATTEMPTS
    with caplog.at_level(logging.INFO):
        for _ in range(1000):  # Ray reports from a thread of its own
            if any(record.message.startswith("Ray: ") for record in caplog.records):
                break
            time.sleep(0.01)
        else:
            pytest.fail("Ray's report of a dead worker did not reach the log")
    assert capfd.readouterr() == ("", "")


@pytest.mark.ray
def test_an_item_whose_replicas_always_die_fails_by_name(executor: RawExecutor, tmp_path: Path) -> None:
    with executor.replicas(partial(loaded, always_die, tmp_path)) as replicas:
        with pytest.raises(StageFailed, match="item 2 of 2 died again and again"):
            ordered(replicas.stream([0, 1]))
        assert len(list(tmp_path.glob("1-*"))) == 3
        assert ordered(replicas.stream([2])) == [2]


@pytest.mark.ray
def test_dying_while_loading_is_no_fault_of_an_item(executor: RawExecutor, tmp_path: Path) -> None:
    with executor.replicas(partial(die_while_loading, tmp_path, ATTEMPTS + 2)) as replicas:
        assert ordered(replicas.stream([-1, 2, -3])) == [1, 2, 3]


@pytest.mark.ray
def test_processes_that_never_load_end_the_call(executor: RawExecutor, tmp_path: Path) -> None:
    with (
        executor.replicas(partial(die_while_loading, tmp_path, 100)) as replicas,
        pytest.raises(StageFailed, match="the process loading died again and again"),
    ):
        ordered(replicas.stream([1, 2]))
    assert LOADINGS <= len(list(tmp_path.iterdir())) <= LOADINGS + 1, "two load at a time"


@pytest.mark.ray
@pytest.mark.parametrize("process", ["raylet", pytest.param("gcs_server", marks=pytest.mark.slow)])
def test_a_process_of_rays_own_that_is_killed_is_told_at_once(process: str) -> None:
    script = f"""
import os, signal, threading, time
from pathlib import Path
from layerwise.errors import LayerwiseError
from layerwise.pipeline.executors import open_executor
def kill():
    time.sleep(1)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and "({process})" in (entry / "stat").read_text():
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)
executor = open_executor("ray")
assert executor.workers
threading.Thread(target=kill).start()
try:
    list(executor.stream(time.sleep, [50]))
except LayerwiseError as error:
    print(error.message)
executor.close()
"""
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=45)
    assert run.stdout.startswith(f"Ray's own process {process} on this machine was killed by SIGKILL"), run.stdout


@pytest.mark.ray
def test_a_failure_ends_the_running_items_and_starts_no_others(executor: RawExecutor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the first one"):
        ordered(executor.stream(partial(fail_while_the_others_work, tmp_path), list(range(20))))
    assert not (tmp_path / "19-0").exists()
    again = executor.stream(partial(the_first_waits_for_the_second, tmp_path), [7])
    assert ordered(again) == [7]  # a slot is free at once


@pytest.mark.ray
def test_an_exception_that_cannot_be_sent_is_told_in_words(executor: RawExecutor) -> None:
    with pytest.raises(StageFailed, match="ValueError isn't serializable"):
        ordered(executor.stream(raise_what_cannot_be_sent, [1]))


@pytest.mark.ray
def test_items_larger_than_the_machine_are_refused_and_not_waited_for(executor: RawExecutor) -> None:
    for resources in (Resources(cpus=3), Resources(gpus=1000), Resources(memory_bytes=2**60)):
        with pytest.raises(UsageError, match="the largest machine has 2 cpus"):
            ordered(executor.sized(resources).stream(abs, [1]))


@pytest.mark.ray
def test_slots_are_how_often_an_item_fits(executor: RawExecutor) -> None:
    assert executor.sized(Resources(cpus=0.5)).workers == 4
    assert executor.sized(Resources(cpus=2)).workers == 1
    assert executor.sized(Resources(cpus=0.5, memory_bytes=2**20)).workers == 4


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to cores")
def test_only_the_cores_of_this_process_are_handed_out() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert ray_session_module.available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.ray
@pytest.mark.slow
def test_running_out_of_memory_is_told_and_not_tried_for_ever() -> None:
    script = """
import mmap, os
from pathlib import Path
memory = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
used = 1 - int(memory["MemAvailable:"]) / int(memory["MemTotal:"])
os.environ |= {"RAY_memory_usage_threshold": str(used + 0.1), "RAY_memory_monitor_refresh_ms": "100"}
from layerwise.errors import StageFailed
from layerwise.pipeline.executors import open_executor
def swell(tries):
    with Path(tries).open("a") as file:
        file.write("x")
    kept = []
    while True:
        kept.append(bytearray(os.urandom(2**20)) * 64)
def main(tries):
    executor = open_executor("ray")
    try:
        list(executor.stream(swell, [tries], ["the large one"]))
    except StageFailed as error:
        print(error.message[:40], Path(tries).read_text())
    executor.close()
"""
    with tempfile.NamedTemporaryFile() as tries:
        command = [sys.executable, "-c", f"{script}\nmain({tries.name!r})"]
        run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert run.stdout == f"out of memory while working on the large {'x' * ATTEMPTS}\n"


def test_an_executor_that_is_never_used_imports_no_ray() -> None:
    script = """
import sys
from layerwise.pipeline.executors import Resources, open_executor
executor = open_executor("ray", Resources()).sized(Resources(cpus=2))
assert list(executor.stream(abs, [])) == []
with executor.replicas(dict) as replicas:
    assert list(replicas.stream([])) == []
executor.close()
print(sorted({"ray", "torch", "pandas", "pyarrow"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_the_termination_handler_of_the_host_is_kept() -> None:
    def ours(signum: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, ours)
    try:
        with ray_session_module._sigterm_handler_kept():
            signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_token_of_ray_is_readable_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    ray_session_module._make_token_private()
    assert token.stat().st_mode & 0o777 == 0o600


@pytest.mark.ray
def test_authentication_is_on(executor: RawExecutor) -> None:
    assert executor.workers == 2
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.ray
def test_nobody_else_reaches_the_folder_of_a_ray_that_runs(executor: RawExecutor) -> None:
    import ray

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert executor.workers == 2
    folder = session.parents[1]
    assert (session.parent.name, folder.name[:3]) == (ray_session_module.RAYS_FOLDER, "lw-")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_socket_paths_of_ray_fit_whatever_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    folder = ray_session_module.private_folder()
    try:
        socket = (
            folder
            / ray_session_module.RAYS_FOLDER
            / "session_2026-01-01_00-00-00_000000_4194304"
            / "sockets"
            / "plasma_store"
        )
        assert len(os.fsencode(socket)) <= 107
        assert folder.stat().st_mode & 0o077 == 0
    finally:
        folder.rmdir()
