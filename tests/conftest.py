"""Fixtures that every folder may use."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerwise.pipeline.executors import RawExecutor, Resources

collect_ignore = ["example_package"]
"""A project of its own, whose tests run where it is installed; see `test_example_package.py`."""

ROOT = Path(__file__).parents[1]
WHOLE = ("tests/pipeline/", "tests/kernels/")
"""Folders whose files share what is made once in a test session and takes long: a Ray, kernels compiled for GPUs."""
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="session", autouse=True)
def own_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Settings that are nobody's: whoever runs the tests agrees to nothing by that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("settings")))
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadscope` one process takes a whole file, and a whole folder where that is in `WHOLE`."""
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class LoadPlaceScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", maxsplit=1)[0]
            return next((folder for folder in WHOLE if file.startswith(folder)), file)

    return LoadPlaceScheduling(config, log)


@pytest.fixture(scope="session")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what a checkout holds, because building leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    links = [path.name for path in (ROOT / "layerwise").iterdir() if path.is_symlink()]
    for name in ("layerwise", *links, "tests"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=source, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def ray_executor() -> Iterator[RawExecutor]:
    """The one Ray of the test session, two cores, started by the first test that asks; mark such tests `ray`.

    It starts under a `RAY_ADDRESS` where nothing answers, which must not matter.
    """
    from layerwise.pipeline.executors.ray import RayExecutor
    from layerwise.pipeline.executors.ray_session import RaySession

    executor = RayExecutor(Resources(), RaySession(cores=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        assert executor.workers == 2
    yield executor
    executor.close()
