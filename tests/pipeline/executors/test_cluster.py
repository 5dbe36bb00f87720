"""`RaySession(address=...)` against a real head node on loopback that asks for a token."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from layerwise.errors import ClusterError
from layerwise.pipeline.executors.ray import RayExecutor
from layerwise.pipeline.executors.ray_session import RaySession

TOKEN = "0123456789abcdef0123456789abcdef"
JOIN = """
import sys
from layerwise.pipeline.executors.ray import RayExecutor
from layerwise.pipeline.executors.ray_session import RaySession
from layerwise.errors import ClusterError

executor = RayExecutor(session=RaySession(address=sys.argv[1]))
try:
    print(executor.workers, executor.map(abs, [-1, -2, -3]))
except ClusterError as error:
    print(f"{error.exit_code} {error}")
finally:
    executor.close()
"""


def free_ports(count):
    """Ports that nobody listens on, above those that Ray gives to its workers."""
    taken = []
    for port in range(20_000 + os.getpid() % 10_000, 60_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                taken.append(port)
        if len(taken) == count:
            return taken
    raise AssertionError("no free ports")


def with_token(token):
    return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The address of a head node of two cores; only processes started here are ended."""
    (gcs,) = free_ports(1)
    folder = Path(f"/tmp/lw-head-{os.getpid()}")  # socket paths end at 107 bytes
    folder.mkdir()
    ray = Path(sys.executable).with_name("ray")
    options = f"--head --block --port {gcs} --num-cpus 2 --include-dashboard=false"
    command = [ray, "start", *options.split(), "--object-store-memory", "100000000", "--temp-dir", folder]
    log = (tmp_path_factory.mktemp("head") / "log").open("w")
    process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=with_token(TOKEN))
    try:
        for _ in range(600):
            assert process.poll() is None, Path(log.name).read_text()
            with socket.socket() as probe:
                if "block forever" in Path(log.name).read_text() and probe.connect_ex(("127.0.0.1", gcs)) == 0:
                    break
            time.sleep(0.1)
        yield f"127.0.0.1:{gcs}"
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


def joined(address, token):
    found = subprocess.run(
        [sys.executable, "-c", JOIN, address],
        check=False,
        capture_output=True,
        text=True,
        env=with_token(token),
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


@pytest.mark.ray
def test_a_running_cluster_is_joined_used_and_left_running(head):
    assert joined(head, TOKEN) == "2 [1, 2, 3]"
    assert joined(head, TOKEN) == "2 [1, 2, 3]"


@pytest.mark.ray
def test_a_cluster_that_does_not_take_the_token_is_an_error_with_exit_code_5(head):
    answer = joined(head, TOKEN[::-1])
    assert answer.startswith(f"5 joining the Ray cluster at {head} failed")
    assert "token" in answer


def test_an_address_where_nobody_listens_is_an_error_at_once():
    (port,) = free_ports(1)
    executor = RayExecutor(session=RaySession(address=f"ray://127.0.0.1:{port}"))
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at ray://127.0.0.1:{port}"):
        executor.map(abs, [1])


def layerwise(*arguments, env=None):
    found = subprocess.run(
        [sys.executable, "-m", "layerwise", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    return found.returncode, found.stdout, found.stderr


@pytest.mark.ray
def test_a_run_on_a_cluster_has_the_frontier_of_a_run_in_one_process(head, tiny_workflow, tmp_path):
    joined, inline = tmp_path / "joined", tmp_path / "inline"
    code, _, story = layerwise("run", tiny_workflow, "--results", joined, "--address", head, env=with_token(TOKEN))
    assert code == 0, story
    assert layerwise("run", tiny_workflow, "--results", inline, "--executor", "inline")[0] == 0
    frontiers = [layerwise("frontier", "--results", results, "--format", "csv")[1] for results in (joined, inline)]
    assert frontiers[0] == frontiers[1] != ""


def test_only_executors_that_join_clusters_take_an_address(tiny_workflow, tmp_path):
    code, _, story = layerwise("run", tiny_workflow, "--results", tmp_path, "--executor", "inline", "--address", "auto")
    assert code == 2
    assert "executor inline joins no cluster" in story
