"""The packages that layerwise needs: are they there, new enough, and do they work?"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

from layerwise.pipeline.doctor import child
from layerwise.pipeline.doctor.check import Finding, Surroundings, gigabytes, ok, problem, warning

OLDEST_RAY, RECOMMENDED_RAY = (2, 52, 0), (2, 59, 0)
FAULT_OF_OLD_RAY = "lets a web page run code (CVE-2025-62593) and has no authentication (CVE-2023-48022)"

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

_SOLVE = """
import sys
import numpy as np
from layerwise.solvers import Problem, ilp
costs, losses = np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[3.0, 0.0], [1.0, 0.0]])
print(ilp(Problem(costs={"bits": costs}, budgets={"bits": 3.0}, losses=losses), backend=sys.argv[1]).loss)
"""


def python(_: Surroundings) -> Finding:
    """The interpreter."""
    return ok(f"{sys.version.split()[0]}, {sys.executable}")


def own_version(_: Surroundings) -> Finding:
    """layerwise itself, and whether it is installed."""
    import layerwise

    assert layerwise.__file__ is not None
    found = f"{layerwise.__version__}, {Path(layerwise.__file__).parent}"
    installed = installed_version("layerwise")
    if installed is None:
        return warning(f"{found}, not installed: the least versions of other packages are not known", "pip install .")
    if installed != layerwise.__version__:
        return warning(f"{found}, but {installed} is what was installed", "install it again")
    return ok(found)


def package(name: str, _: Surroundings) -> Finding:
    """A package that layerwise requires: is it there, and is its version one that pyproject.toml allows?"""
    wanted, version = _requirement(name), installed_version(name)
    if version is None:
        return problem("not installed", f"pip install '{name}{wanted}'")
    if not _fits(version, wanted):
        return problem(f"{version}, but layerwise needs {wanted}", f"pip install '{name}{wanted}'")
    return ok(version)


def torch(surroundings: Surroundings) -> Finding:
    """torch: its version, and whether it can be imported."""
    finding = package("torch", surroundings)
    if installed_version("torch") is None or not surroundings.torch.failure:
        return finding
    return problem(f"{finding.found}, but its import fails: {surroundings.torch.failure}", "install torch again")


def gpu(surroundings: Surroundings) -> Finding:
    """The devices that torch can compute on; each computes a sum."""
    answer = surroundings.torch
    if answer.failure:
        return warning("not known, for torch cannot be asked", "see torch")
    devices = answer.value["devices"]
    found = "; ".join(f"{device['name']}, {gigabytes(device['bytes'])}" for device in devices)
    faults = [f"{device['name']}: {device['fault']}" for device in devices if device["fault"]]
    if faults:
        return problem("; ".join(faults), "install a torch that is built for this GPU and its driver")
    if not devices and _NVIDIA_DRIVER.exists():
        why = "torch cannot use it" if answer.value["built_for_gpus"] else "this torch is built for the CPU only"
        return warning(f"an NVIDIA driver is here, but {why}", "install a torch that is built for this driver")
    return ok(found or "no GPU: the CPU is used")


def ray(surroundings: Surroundings) -> Finding:
    """Ray's version, against its known faults."""
    finding, version = package("ray", surroundings), installed_version("ray")
    if version is None:
        return problem("not installed", "pip install 'ray>=2.59'; `--executor inline` works without it")
    if release(version) < OLDEST_RAY:
        return problem(f"{version} {FAULT_OF_OLD_RAY}", "pip install 'ray>=2.59'")
    if finding.state == "ok" and release(version) < RECOMMENDED_RAY:
        return warning(
            f"{version} asks nobody for a token unless RAY_AUTH_MODE says so", "pip install 'ray>=2.59', where it does"
        )
    return finding


def triton(_: Surroundings) -> Finding:
    """Whether Triton is there; nothing needs it."""
    return ok(installed_version("triton") or "not installed; nothing needs it")


def solver(backend: str, _: Surroundings) -> Finding:
    """Solve two units with two levels by the integer program; the least loss is 1."""
    answer = child.ask(_SOLVE, backend)
    if answer.failure:
        return problem(f"does not solve: {answer.failure}", "install pulp and highspy again")
    if abs(answer.value - 1) > 1e-9:
        return problem(f"solves a small problem wrongly: {answer.value} instead of 1", "install pulp and highspy again")
    return ok("solves a small problem")


def installed_version(name: str) -> str | None:
    """As its metadata say, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The first three numbers, without what follows a `+`: "2.13.0+cpu" gives (2, 13, 0)."""
    numbers = [int(digits) for digits in re.findall(r"\d+", version.partition("+")[0])]
    return tuple((*numbers, 0, 0, 0)[:3])


def _requirement(name: str) -> str:
    """What layerwise's own metadata ask of a package, such as ">=3.0,<4"; empty where nothing is known."""
    try:
        lines = metadata.requires("layerwise") or []
    except metadata.PackageNotFoundError:
        return ""
    pairs = (re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*)", line) for line in lines)
    return next((pair[2].strip() for pair in pairs if pair and pair[1].lower() == name), "")


def _fits(version: str, wanted: str) -> bool:
    """Whether a version keeps the `>=` and `<` of a requirement; pre-releases count as the release."""
    for sign, limit in re.findall(r"(>=|<)\s*([\d.]+)", wanted):
        if (release(version) >= release(limit)) != (sign == ">="):
            return False
    return True
