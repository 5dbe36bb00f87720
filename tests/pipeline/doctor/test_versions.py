"""The packages: what is there, what is missing or too old, and what is there and does not work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from layerwise.pipeline.doctor import versions
from layerwise.pipeline.doctor.check import Finding, Surroundings
from layerwise.pipeline.doctor.examination import GROUPS


def test_python_and_layerwise_say_where_they_are(here: Surroundings) -> None:
    assert versions.python(here) == Finding("ok", f"{sys.version.split()[0]}, {sys.executable}")
    assert "layerwise" in versions.own_version(here).found


@pytest.mark.parametrize(("version", "state"), [(None, "warning"), ("0.0.1", "warning"), ("same", "ok")])
def test_a_layerwise_that_is_not_what_was_installed_is_noticed(
    here: Surroundings, installed: Callable[..., None], version: str | None, state: str
) -> None:
    import layerwise

    installed(layerwise=layerwise.__version__ if version == "same" else version)
    assert versions.own_version(here).state == state


@pytest.mark.parametrize(
    ("version", "state", "found"),
    [
        ("3.3.2", "ok", "3.3.2"),
        ("3.0", "ok", "3.0"),
        ("2.9.0", "problem", "2.9.0, but layerwise needs"),
        ("4.0", "problem", "4.0, but layerwise needs"),
        (None, "problem", "not installed"),
    ],
)
def test_a_package_must_be_there_and_in_the_range_of_the_project_file(
    here: Surroundings,
    installed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    state: str,
    found: str,
) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: ["numpy>=2.0", "pulp<4,>=3.0", 'pytest>=8; extra == "dev"'])
    installed(pulp=version)
    finding = versions.package("pulp", here)
    assert (finding.state, finding.found.startswith(found)) == (state, True)
    if state == "problem":
        assert finding.hint is not None
        assert finding.hint.startswith("pip install 'pulp")
        assert ">=3.0" in finding.hint


def test_without_metadata_any_version_will_do(
    here: Surroundings, installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    installed(numpy="0.1")
    assert versions.package("numpy", here) == Finding("ok", "0.1")


@pytest.mark.parametrize(
    "name", ["torch", "transformers", "numpy", "pandas", "pyarrow", "optuna", "pulp", "highspy", "ray"]
)
def test_every_package_that_is_checked_is_one_that_layerwise_requires(name: str) -> None:
    assert versions._requirement(name).startswith((">=", "<"))
    assert name in GROUPS["versions"]


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.6", True),
        ("2.6", ">=2.6.0", True),
        ("2.5.9", ">=2.6", False),
        ("2.60.0rc1", ">=2.52", True),
        ("3.9", "<4,>=3.0", True),
        ("4", "<4,>=3.0", False),
        ("1", "", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, wanted: str, fits: bool) -> None:
    assert versions._fits(version, wanted) is fits


def test_torch_must_import_not_only_be_there(
    here: Surroundings, installed: Callable[..., None], answers: Callable[..., None]
) -> None:
    installed(torch="2.13.0")
    answers("!no libcudart.so")
    finding = versions.torch(here)
    assert finding == Finding("problem", "2.13.0, but its import fails: no libcudart.so", "install torch again")
    assert versions.gpu(here).state == "warning"  # and is not asked a second time
    installed(torch=None)
    assert versions.torch(here).found == "not installed"


DEVICE = {"name": "NVIDIA H100", "bytes": 85_000_000_000, "fault": None}


@pytest.mark.parametrize(
    ("answer", "driver", "state", "found"),
    [
        ({"built_for_gpus": False, "devices": []}, False, "ok", "no GPU: the CPU is used"),
        ({"built_for_gpus": True, "devices": []}, False, "ok", "no GPU: the CPU is used"),
        ({"built_for_gpus": False, "devices": []}, True, "warning", "built for the CPU only"),
        ({"built_for_gpus": True, "devices": []}, True, "warning", "torch cannot use it"),
        ({"built_for_gpus": True, "devices": [DEVICE, DEVICE]}, True, "ok", "H100, 85 GB; NVIDIA H100, 85 GB"),
        ({"built_for_gpus": True, "devices": [DEVICE | {"fault": "no kernel"}]}, True, "problem", "H100: no kernel"),
        ("!crash", True, "warning", "not known"),
    ],
)
def test_a_gpu_is_named_and_one_that_cannot_be_used_is_noticed(
    here: Surroundings,
    answers: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    answer: Any,
    driver: bool,
    state: str,
    found: str,
) -> None:
    answers(answer)
    monkeypatch.setattr(versions, "_NVIDIA_DRIVER", tmp_path if driver else tmp_path / "none")
    finding = versions.gpu(here)
    assert finding.state == state
    assert found in finding.found


@pytest.mark.parametrize(
    ("version", "state", "says"),
    [
        ("2.51.9", "problem", "CVE-2025-62593"),
        ("2.52.0", "warning", "asks nobody"),
        ("2.58.1", "warning", "2.58.1"),
        ("2.59.0", "ok", "2.59.0"),
        (None, "problem", "not installed"),
    ],
)
def test_an_old_ray_is_a_danger(
    here: Surroundings, installed: Callable[..., None], version: str | None, state: str, says: str
) -> None:
    installed(ray=version)
    finding = versions.ray(here)
    assert finding.state == state
    assert says in finding.found
    assert (finding.hint is None) == (state == "ok")


def test_triton_may_be_missing(here: Surroundings, installed: Callable[..., None]) -> None:
    installed(triton=None)
    assert versions.triton(here) == Finding("ok", "not installed; nothing needs it")
    installed(triton="3.5.0")
    assert versions.triton(here) == Finding("ok", "3.5.0")


@pytest.mark.parametrize("backend", ["HiGHS", "CBC"])
def test_the_solvers_solve(here: Surroundings, backend: str) -> None:
    assert versions.solver(backend, here) == Finding("ok", "solves a small problem")


@pytest.mark.parametrize(("answer", "says"), [("!no cbc", "no cbc"), (2.0, "wrongly: 2.0")])
def test_a_solver_that_fails_or_errs_is_a_problem(
    here: Surroundings, answers: Callable[..., None], answer: Any, says: str
) -> None:
    answers(answer)
    finding = versions.solver("CBC", here)
    assert finding.state == "problem"
    assert says in finding.found
