"""All checks, in the order in which they are made and printed.

Every check has a deadline. One that misses it ends its group, whose rest would wait for the same dead mount or host. So
does a cluster that does not let us in: it says nothing more.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path

from layerwise.errors import LayerwiseError
from layerwise.pipeline.cluster.connection import plain_address
from layerwise.pipeline.doctor import cluster, machine, ray, results_folder, versions
from layerwise.pipeline.doctor.check import Check, Finding, Surroundings, problem

CHECK_SECONDS = 90.0

_DOOR = "cluster"

GROUPS: Mapping[str, Mapping[str, Check]] = {
    "versions": {
        "python": versions.python,
        "layerwise": versions.own_version,
        "torch": versions.torch,
        "gpu": versions.gpu,
        "transformers": partial(versions.package, "transformers"),
        "numpy": partial(versions.package, "numpy"),
        "pandas": partial(versions.package, "pandas"),
        "pyarrow": partial(versions.package, "pyarrow"),
        "optuna": partial(versions.package, "optuna"),
        "pulp": partial(versions.package, "pulp"),
        "highspy": partial(versions.package, "highspy"),
        "HiGHS": partial(versions.solver, "HiGHS"),
        "CBC": partial(versions.solver, "CBC"),
        "triton": versions.triton,
        "ray": versions.ray,
    },
    "ray": {
        "ray authentication": ray.authentication,
        "ray token": ray.token,
        "ray addresses": ray.addresses,
        "ray sockets": ray.sockets,
    },
    "machine": {"cores": machine.cores, "memory": machine.memory},
    "results": {
        "results folder": results_folder.place,
        "file system": results_folder.file_system,
        "disk space": results_folder.disk_space,
        "exclusive create": results_folder.exclusive_create,
        "rename": results_folder.rename,
        "flush": results_folder.flush,
        "lock": results_folder.lock,
    },
    "cluster": {_DOOR: cluster.door, "cluster's ray": cluster.ray},
}

_NO_ANSWER = problem(f"no answer within {CHECK_SECONDS:g} s", "does the disk or the network hang?")


def examine(results: Path, address: str | None = None) -> Iterator[tuple[str, Finding]]:
    """Make every check, and yield its name and finding as soon as there is one.

    Args:
        results: the results folder; nothing is left in it, and it is not made.
        address: also check the cluster there.
    Raises:
        UsageError: an address that is none.
    """
    surroundings = Surroundings(results, None if address is None else plain_address(address))
    for group, checks in GROUPS.items():
        if group == "cluster" and address is None:
            continue
        for name, check in checks.items():
            finding = before_the_deadline(check, surroundings)
            yield name, finding
            if finding is _NO_ANSWER or (name == _DOOR and finding.state == "problem"):
                break


def before_the_deadline(check: Check, surroundings: Surroundings) -> Finding:
    """The finding; a known error or no answer is one too. The thread of a check that hangs is left behind."""
    found: Future[Finding] = Future()

    def work() -> None:
        try:
            found.set_result(check(surroundings))
        except LayerwiseError as error:
            found.set_result(problem(error.message, error.hint))
        except (OSError, ImportError) as error:
            found.set_result(problem(f"{type(error).__name__}: {error}"))
        except BaseException as error:  # a mistake of ours: raised again where it is seen
            found.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return found.result(timeout=CHECK_SECONDS)
    except TimeoutError:
        return _NO_ANSWER


def as_line(name: str, finding: Finding) -> str:
    """A finding for people."""
    width = max(len(check) for checks in GROUPS.values() for check in checks)
    hint = "" if finding.hint is None else f" (hint: {finding.hint})"
    return " ".join(f"{name:{width}}  {finding.state:7}  {finding.found}{hint}".split("\n"))


def as_json(findings: Iterable[tuple[str, Finding]]) -> str:
    """All findings for programs: a list of objects, one a line."""
    return "[\n  " + ",\n  ".join(json.dumps({"check": name, **asdict(finding)}) for name, finding in findings) + "\n]"
