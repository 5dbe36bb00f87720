"""The same submission as a `RayJob` of KubeRay, for clusters that live as long as their job.

Nothing talks to Kubernetes here: the manifest is printed, and `kubectl apply` does the rest. Files cannot be uploaded
that way, so the pods must find everything in an image and on volumes; the manifest's head says what and where. Its
entrypoint resumes the run from its folder, so that a retry of Kubernetes, which makes a new cluster, goes on where the
one before ended.

Source: the `ray.io/v1` RayJob of KubeRay 1.5.1, which knows `authOptions`.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from layerwise import __version__
from layerwise.errors import UsageError
from layerwise.pipeline.cluster.handover import JOB_ENVIRONMENT
from layerwise.pipeline.cluster.shipping import named_paths
from layerwise.pipeline.doctor.versions import installed_version
from layerwise.pipeline.runs.run import Run
from layerwise.results.destination import writing

DEFAULT_IMAGE, CLAIM = f"your-registry/layerwise:{__version__}", "layerwise"
_LONGEST_NAME = 47
"""Characters of a RayJob's name that leave room for what KubeRay appends, below Kubernetes' 63."""


@dataclass(frozen=True)
class Pods:
    """What the cluster is made of.

    Args:
        image: with Ray, layerwise and what it requires.
        workers: how many worker pods; 0 for a head alone.
        cpus, memory_gib, gpus: of each pod.
        deadline_seconds: after which Kubernetes ends the job; None for no limit.
        retries: how often Kubernetes makes a new cluster and resumes.
    Raises:
        UsageError: the image is empty.
    """

    image: str = DEFAULT_IMAGE
    workers: int = 0
    cpus: int = 4
    memory_gib: int = 16
    gpus: int = 0
    deadline_seconds: int | None = None
    retries: int = 2

    def __post_init__(self) -> None:
        if not self.image:
            raise UsageError("--image is empty", hint="name an image with Ray and layerwise in it, or leave it out")


def manifest(run: Run, pods: Pods) -> str:
    """The RayJob that makes a run, as YAML with what it needs in comments.

    Args:
        run: kept in its folder, which must be on a volume of the pods.
        pods: what the cluster is made of.
    Raises:
        UsageError: Ray is not installed, so its version is not known.
    """
    version = installed_version("ray")
    if version is None:
        raise UsageError("Ray is not installed here, so the version of the cluster is not known", "pip install ray")
    results = run.store.root.absolute()
    folders = _folders([results, *named_paths(run.workflow)])
    mounts = [{"name": CLAIM, "mountPath": str(folder), "subPath": str(folder).strip("/") or "."} for folder in folders]
    # Not `python`: the command that is installed beside the layerwise of the image is the one that has it.
    command = ["layerwise", "resume", run.id, "--results", str(results), "--executor", "ray", "--address", "auto"]
    command += ["--trust"] if run.workflow.model.trust else []
    cluster: dict[str, Any] = {
        "rayVersion": version,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": {"dashboard-host": "0.0.0.0"}, "template": _pod("ray-head", pods, mounts)},
    }
    if pods.workers:
        cluster["workerGroupSpecs"] = [
            {
                "groupName": "workers",
                "replicas": pods.workers,
                "minReplicas": pods.workers,
                "maxReplicas": pods.workers,
                "rayStartParams": {},
                "template": _pod("ray-worker", pods, mounts),
            }
        ]
    deadline = {} if pods.deadline_seconds is None else {"activeDeadlineSeconds": pods.deadline_seconds}
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": _name(run.id), "labels": {"app.kubernetes.io/name": "layerwise"}},
        "spec": {
            "entrypoint": shlex.join(command),
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": JOB_ENVIRONMENT}, sort_keys=False),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 300,
            "backoffLimit": pods.retries,
            **deadline,
            "rayClusterSpec": cluster,
        },
    }
    return _comment(run, results, folders, pods) + yaml.safe_dump(job, sort_keys=False, width=120)


def write_manifest(run: Run, pods: Pods, output: Path | None) -> None:
    """Keep the run in its folder, where its pods find it, and print its manifest, or write it into a file.

    Raises:
        UsageError: the file cannot be written, and then no run is kept; or as `manifest`.
    """
    text = manifest(run, pods)
    if output is not None:
        with writing(output):
            output.write_text(text, encoding="utf-8")
    run.keep_workflow()
    if pods.image == DEFAULT_IMAGE:
        print(f"warning: the image {DEFAULT_IMAGE} is a placeholder: edit it, or say --image", file=sys.stderr)
    if output is None:
        print(text, end="")
    else:
        print(f"wrote {output}; {shlex.join(['kubectl', 'apply', '-f', str(output)])}", file=sys.stderr)


def _pod(container: str, pods: Pods, mounts: Sequence[dict[str, str]]) -> dict[str, Any]:
    size: dict[str, Any] = {"cpu": str(pods.cpus), "memory": f"{pods.memory_gib}Gi"}
    if pods.gpus:
        size["nvidia.com/gpu"] = str(pods.gpus)
    return {
        "spec": {
            "containers": [
                {
                    "name": container,
                    "image": pods.image,
                    "resources": {"limits": size, "requests": dict(size)},
                    "volumeMounts": [dict(mount) for mount in mounts],
                }
            ],
            "volumes": [{"name": CLAIM, "persistentVolumeClaim": {"claimName": CLAIM}}],
        }
    }


def _folders(paths: Sequence[Path]) -> list[Path]:
    """The folders to mount: that of each file, without those that lie in another one."""
    folders = sorted({path if path.is_dir() else path.parent for path in paths})
    return [folder for folder in folders if not any(other in folder.parents for other in folders)]


def _name(run: str) -> str:
    """A name that Kubernetes takes: small letters, digits and dashes."""
    safe = re.sub(r"[^a-z0-9]+", "-", run.lower())[-_LONGEST_NAME + 3 :].strip("-")
    return f"lw-{safe}"


def _comment(run: Run, results: Path, folders: Sequence[Path], pods: Pods) -> str:
    paths = [f"{results}  (the results folder; it holds runs/{run.id})", *map(str, named_paths(run.workflow))]
    lines = [
        f"Run {run.id} as a RayJob (KubeRay 1.5.1 or later): kubectl apply -f THIS-FILE",
        "",
        "Nothing is uploaded. Before it can run:",
        f"- the image {pods.image} holds Ray, layerwise {__version__} and what it requires;",
        f"- a persistent volume claim `{CLAIM}`, ReadWriteMany, is mounted in every pod at",
        *(f"    {folder}" for folder in folders),
        "  and so holds these, under the paths that they have here:",
        *(f"    {path}" for path in paths),
        "Where folders come from other volumes, change `volumes` and `volumeMounts`; the paths must stay.",
        "A Hugging Face token belongs into a secret of the pods (`env`), not into `runtimeEnvYAML`.",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)
