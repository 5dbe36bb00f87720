"""The jobs of a Ray cluster: submit one, ask how it is, read what it printed, stop it.

Submitting goes through Ray's `JobSubmissionClient`, which packs and uploads files. Asking and stopping are single HTTP
requests of Ray's documented REST interface, made by ourselves: they import no Ray, so that `layerwise status` stays
quick, and they give up after some seconds, which Ray's client never does.

What Ray 2.60's client would do by itself, and is kept from doing: follow `RAY_ADDRESS` instead of the address that it
is given; send a stored token in clear, or through a proxy to this machine; send none at all unless `RAY_AUTH_MODE` says
so.

The client needs no particular version on the other side: it speaks HTTP and asks for Ray 2.0, and the job runs on the
cluster's own Ray. So another minor version draws a warning only. Below 2.52 a cluster is refused for its faults.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from layerwise.errors import ClusterError, UsageError
from layerwise.pipeline.cluster.connection import ADDRESS_VARIABLES, get, same_address, stays_here, unreachable, visit
from layerwise.pipeline.cluster.tokens import Token
from layerwise.pipeline.consent import consent_to
from layerwise.pipeline.doctor.versions import FAULT_OF_OLD_RAY, OLDEST_RAY, installed_version, release

LONGEST_LOG_BYTES = 2**24
"""So much of what a job printed is read."""


RESULTS = "layerwise_results"
"""The key of a job's metadata that names its results folder."""


@dataclass(frozen=True)
class Job:
    """What Ray says of a job.

    Args:
        status: `PENDING`, `RUNNING`, `SUCCEEDED`, `FAILED` or `STOPPED`.
        message: for people.
        exit_code: of its process, None while there is none.
        results: the results folder that it was given.
    """

    status: str
    message: str = ""
    exit_code: int | None = None
    results: str | None = None

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status not in ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Jobs:
    """The jobs of one cluster that has let us in.

    Args:
        address: of its dashboard, plain.
        token: the one that it takes, None if it asks for none.
        ray_version: of its Ray, None if it did not say.
    """

    address: str
    token: Token | None
    ray_version: str | None

    @classmethod
    def at(cls, address: str, *, in_clear: bool = False) -> Jobs:
        """Visit a cluster.

        Args:
            address: of its dashboard, plain.
            in_clear: send the token even where others on the way can read it.
        Raises:
            ClusterError: it cannot be reached, or does not let us in.
        """
        visited = visit(address, in_clear=in_clear)
        return cls(address, visited.token, visited.ray_version)

    @classmethod
    def recorded(cls, address: str, *, in_clear: bool) -> Jobs:
        """Visit a cluster that a results folder names, as far as the user has agreed to it.

        Args:
            address: of its dashboard, plain.
            in_clear: what the folder says; the token travels in clear only if the user says so, too.
        Raises:
            NotNamed: he has never named it; nothing is sent there.
            ClusterError: it cannot be reached, or does not let us in.
        """
        consent = consent_to(address)
        return cls.at(address, in_clear=in_clear and consent.in_clear)

    def find(self, job: str) -> Job | None:
        """How a job is; None if the cluster knows none of that id."""
        status, body = self._ask(f"/api/jobs/{quote(job, safe='')}")
        if status == 404:
            return None
        record = self._read(status, body)
        code = record.get("driver_exit_code")
        return Job(
            status=str(record.get("status")),
            message=str(record.get("message") or ""),
            exit_code=code if isinstance(code, int) else None,
            results=(record.get("metadata") or {}).get(RESULTS),
        )

    def log(self, job: str) -> str:
        """What a job has printed; empty if nothing is left of it."""
        status, body = self._ask(f"/api/jobs/{quote(job, safe='')}/logs")
        return "" if status == 404 else str(self._read(status, body).get("logs") or "")

    def stop(self, job: str) -> None:
        """Tell a job to end; one that has ended, or that the cluster does not know, is no error."""
        status, _ = self._ask(f"/api/jobs/{quote(job, safe='')}/stop", method="POST")
        if status not in (200, 400, 404):
            raise self._strange(status)

    def submit(self, job: str, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        """Upload what the runtime environment names, and start a job.

        Args:
            job: its id, which must be free.
            entrypoint: a line for the cluster's shell.
            runtime_env: as Ray has it.
            metadata: everybody who reaches the dashboard can read it.
        Raises:
            UsageError: a variable leads Ray's client elsewhere, or the client is not installed.
            ClusterError: the cluster does not take it.
        """
        check_variables(self.address)
        import ray.exceptions
        from ray.job_submission import JobSubmissionClient

        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)  # else it tells of every file that it packs
        # An empty header is one that Ray's client leaves alone: a cluster that asks for no token gets none.
        headers = {"Authorization": "" if self.token is None else f"Bearer {self.token.value}"}
        try:
            with _direct(self.address):
                client = JobSubmissionClient(self.address, headers=headers)
                client.submit_job(
                    entrypoint=entrypoint, submission_id=job, runtime_env=dict(runtime_env), metadata=dict(metadata)
                )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            if "ray[default]" in str(error):
                raise UsageError(
                    "Ray's job client is not installed", hint=f"pip install 'ray[default]=={ray.__version__}'"
                ) from error
            raise ClusterError(f"{self.address} did not take the job {job}: {error}") from error

    def _ask(self, path: str, method: str = "GET") -> tuple[int, bytes]:
        try:
            return get(f"{self.address}{path}", self.token, limit=LONGEST_LOG_BYTES, method=method)
        except (OSError, http.client.HTTPException) as error:
            raise unreachable(self.address, error) from error

    def _read(self, status: int, body: bytes) -> dict[str, Any]:
        try:
            record = json.loads(body) if status == 200 else None
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise self._strange(status)
        return record

    def _strange(self, status: int) -> ClusterError:
        return ClusterError(f"{self.address} does not answer as Ray's job server does: HTTP {status}")


def check_version(jobs: Jobs) -> str | None:
    """A warning if the cluster's Ray is not of our minor version; None if it is.

    Raises:
        ClusterError: it is too old to be safe, or does not say what it is.
    """
    theirs, ours = jobs.ray_version, installed_version("ray")
    oldest = ".".join(map(str, OLDEST_RAY[:2]))
    if theirs is None:
        raise ClusterError(
            f"{jobs.address} does not say which Ray it runs", hint=f"it must be {oldest} or later; ask its owner"
        )
    if release(theirs) < OLDEST_RAY:
        raise ClusterError(
            f"{jobs.address} runs Ray {theirs}, which {FAULT_OF_OLD_RAY}", hint="upgrade it to Ray 2.59 or later"
        )
    if ours is not None and release(theirs)[:2] != release(ours)[:2]:
        return f"the cluster runs Ray {theirs}, this machine {ours}; the job runs on the cluster's"
    return None


def check_variables(address: str) -> None:
    """Refuse a variable that leads Ray's job client to another cluster than the one that was asked for.

    Raises:
        UsageError: names the variable.
    """
    name = next((name for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
    if name is not None and not same_address(os.environ[name], address):
        raise UsageError(
            f"{name} is set, and Ray's job client would follow it instead of --address {address}",
            hint=f"unset {name}",
        )


@contextmanager
def _direct(address: str) -> Iterator[None]:
    """No proxy between us and this machine, for as long as this lasts: one would get the token."""
    before = os.environ.get("no_proxy")
    if stays_here(address):
        os.environ["no_proxy"] = "*"
    try:
        yield
    finally:
        if before is not None:
            os.environ["no_proxy"] = before
        else:
            os.environ.pop("no_proxy", None)
