"""`RaySession(address=...)` against a real head node on loopback that asks for a token."""

import socket
import subprocess
import sys

import pytest

from layerwise.errors import ClusterError
from layerwise.pipeline.executors.ray import RayExecutor
from layerwise.pipeline.executors.ray_session import RaySession

JOIN = """
import sys
from layerwise.pipeline.executors.ray import RayExecutor
from layerwise.pipeline.executors.ray_session import RaySession
from layerwise.errors import ClusterError

executor = RayExecutor(session=RaySession(address=sys.argv[1]))
try:
    print(executor.workers, sorted(executor.stream(abs, [-1, -2, -3])))
except ClusterError as error:
    print(f"{error.exit_code} {error}")
finally:
    executor.close()
"""


SHARE = """
import sys
from layerwise.pipeline.executors.ray import RayExecutor
from layerwise.pipeline.executors.ray_session import RaySession

session = RaySession(address=sys.argv[1])
executor, ray = RayExecutor(session=session), session.ray()
class Other: ...
while ray.available_resources().get("CPU", 0) < 2: ...  # until a job before this one has left
other = ray.remote(num_cpus=1)(Other).remote()
ray.get(other.__ray_ready__.remote())
print(executor.workers, sorted(executor.stream(abs, [-1, -2, -3])))
ray.kill(other)
executor.close()
"""


def joined(head, env, script=JOIN):
    found = subprocess.run(
        [sys.executable, "-c", script, head.address],
        check=False,
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


@pytest.mark.ray
def test_a_running_cluster_is_joined_used_and_left_running(head):
    assert joined(head, head.env()) == "2 [(0, 1), (1, 2), (2, 3)]"
    assert joined(head, head.env()) == "2 [(0, 1), (1, 2), (2, 3)]"


@pytest.mark.ray
def test_a_run_goes_on_with_the_cores_that_others_leave_to_it(head):
    """Somebody holds the second core for ever; an item that waited for a process there would never end."""
    assert joined(head, head.env(), SHARE) == "2 [(0, 1), (1, 2), (2, 3)]"


@pytest.mark.ray
def test_a_cluster_that_does_not_take_the_token_is_an_error_with_exit_code_5(head):
    answer = joined(head, head.env(head.token[::-1]))
    assert answer.startswith(f"5 joining the Ray cluster at {head.address} failed")
    assert "token" in answer


def test_an_address_where_nobody_listens_is_an_error_at_once():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    executor = RayExecutor(session=RaySession(address=f"ray://127.0.0.1:{port}"))
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at ray://127.0.0.1:{port}"):
        next(executor.stream(abs, [1]))


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
    code, _, story = layerwise("run", tiny_workflow, "--results", joined, "--address", head.address, env=head.env())
    assert code == 0, story
    assert layerwise("run", tiny_workflow, "--results", inline, "--executor", "inline")[0] == 0
    frontiers = [layerwise("frontier", "--results", results, "--format", "csv")[1] for results in (joined, inline)]
    assert frontiers[0] == frontiers[1] != ""


def test_only_executors_that_join_clusters_take_an_address(tiny_workflow, tmp_path):
    code, _, story = layerwise("run", tiny_workflow, "--results", tmp_path, "--executor", "inline", "--address", "auto")
    assert code == 2
    assert "executor inline joins no cluster" in story
