"""The RayJob manifest has the fields and types of KubeRay's API reference, and says what its pods must hold."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import layerwise
from layerwise.errors import UsageError
from layerwise.pipeline.cluster import kuberay
from layerwise.pipeline.cluster.kuberay import DEFAULT_IMAGE, Pods, manifest, write_manifest
from layerwise.pipeline.display import SilentDisplay
from layerwise.pipeline.runs.run import Run
from layerwise.pipeline.runs.status import run_state
from layerwise.pipeline.workflow import load_workflow

# Source: the API reference of KubeRay, ray.io/v1, and that of Kubernetes for what is in `template`.
CONTAINER = {"name": str, "image": str, "resources": {"limits": {str: str}, "requests": {str: str}}}
MOUNT = {"name": str, "mountPath": str, "subPath": str}
CLAIM = {"name": str, "persistentVolumeClaim": {"claimName": str}}
TEMPLATE = {"spec": {"containers": [{**CONTAINER, "volumeMounts": [MOUNT]}], "volumes": [CLAIM]}}
WORKERS = {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}
RAY_JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "labels": {str: str}},
    "spec": {
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "backoffLimit": int,
        "activeDeadlineSeconds": int,
        "rayClusterSpec": {
            "rayVersion": str,
            "authOptions": {"mode": str},
            "headGroupSpec": {"rayStartParams": {str: str}, "template": TEMPLATE},
            "workerGroupSpecs": [{**WORKERS, "rayStartParams": {str: str}, "template": TEMPLATE}],
        },
    },
}


@pytest.fixture
def run(tiny_workflow: Path, tmp_path: Path) -> Run:
    return Run(load_workflow(tiny_workflow), tmp_path / "results", SilentDisplay())


def check(value: Any, shape: Any, path: str = "") -> None:
    """Every field is a known one, and of its type; numbers of Kubernetes that are text are text."""
    if isinstance(shape, type):
        assert type(value) is shape, f"{path}: {value!r} is no {shape.__name__}"
    elif isinstance(shape, list):
        assert isinstance(value, list), path
        for index, entry in enumerate(value):
            check(entry, shape[0], f"{path}[{index}]")
    else:
        assert isinstance(value, dict), path
        for key, entry in value.items():
            assert key in shape or str in shape, f"{path}.{key} is no field"
            check(entry, shape.get(key, shape.get(str)), f"{path}.{key}")


@pytest.mark.parametrize("pods", [Pods(), Pods("r/image:1", 3, 8, 32, 1, 3600, 0)])
def test_every_field_is_one_of_rayjobs_and_of_its_type(run: Run, pods: Pods) -> None:
    job = yaml.safe_load(manifest(run, pods))
    check(job, RAY_JOB)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"].get("activeDeadlineSeconds") == pods.deadline_seconds
    assert sum(group["replicas"] for group in cluster.get("workerGroupSpecs", [])) == pods.workers
    assert {str(group["template"]["spec"]["containers"][0]["image"]) for group in groups(cluster)} == {pods.image}


def groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]


def test_a_field_that_is_none_would_be_found() -> None:
    with pytest.raises(AssertionError, match=r"spec\.entryPoint is no field"):
        check({"spec": {"entryPoint": "x"}}, RAY_JOB)
    with pytest.raises(AssertionError, match="'2' is no int"):
        check({"spec": {"backoffLimit": "2"}}, RAY_JOB)


def test_the_entrypoint_resumes_the_run_and_the_environment_is_that_of_a_submission(run: Run) -> None:
    spec = yaml.safe_load(manifest(run, Pods()))["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:5] == ["layerwise", "resume", run.id, "--results", str(run.store.root)]
    assert words[5:] == ["--executor", "ray", "--address", "auto"]
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30", "RAY_task_oom_retries": "1", "PYTHONUNBUFFERED": "1"}
    }


def test_the_comment_names_every_path_and_the_image_and_every_path_is_mounted(run: Run, tiny_workflow: Path) -> None:
    text = manifest(run, Pods())
    comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    project = tiny_workflow.parent
    for part in (run.store.root, *(project / name for name in ("model", "calibration.txt", "heldout.txt"))):
        assert f" {part}" in comment
    assert DEFAULT_IMAGE in comment
    assert layerwise.__version__ in comment
    cluster = yaml.safe_load(text)["spec"]["rayClusterSpec"]
    for group in groups(cluster):
        (container,) = group["template"]["spec"]["containers"]
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {str(run.store.root), str(project)}


def test_the_name_is_one_that_kubernetes_takes(run: Run) -> None:
    for id_ in (run.id, "Flow_ä.x-12345678", "x" * 300 + "-12345678"):
        run.id = id_
        name = yaml.safe_load(manifest(run, Pods()))["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
        assert len(name) <= 47
        assert name[-4:] == id_[-4:]


def test_the_run_is_there_to_be_resumed_and_nothing_claims_that_it_is_at_work(run: Run, tmp_path: Path) -> None:
    write_manifest(run, Pods(), tmp_path / "job.yaml")
    assert (tmp_path / "job.yaml").read_text() == manifest(run, Pods())
    state = run_state(run.store, "flow")
    assert (state.run, state.status, state.live) == (run.id, "not started", False)


def test_what_to_do_with_the_file_and_with_the_placeholder_is_told(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my job.yaml"
    write_manifest(run, Pods(), path)
    warned = f"warning: the image {DEFAULT_IMAGE} is a placeholder: edit it, or say --image\n"
    assert capsys.readouterr() == ("", f"{warned}wrote {path}; kubectl apply -f '{path}'\n")
    write_manifest(run, Pods("r/image:1"), None)
    assert capsys.readouterr() == (manifest(run, Pods("r/image:1")), "")


def test_a_manifest_that_cannot_be_written_keeps_no_run(run: Run) -> None:
    with pytest.raises(UsageError, match=r"cannot write /proc/job\.yaml"):
        write_manifest(run, Pods(), Path("/proc/job.yaml"))
    assert not run.folder.exists()


def test_without_ray_its_version_is_not_known(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kuberay, "installed_version", lambda _: None)
    with pytest.raises(UsageError, match="the version of the cluster is not known"):
        manifest(run, Pods())
