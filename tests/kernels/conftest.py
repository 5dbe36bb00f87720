"""Triton's interpreter where there is no GPU, guarded buffers, and the statistics of compiled kernels.

Triton decides when a kernel is decorated whether it is interpreted, so it is imported here, before any test module,
with the switch on. The switch is taken back from the environment at once: child processes of other tests compile.

    guard       a `Guard` (guarded.py): canaries around every buffer, NaN in every output
    device      `cuda` where there is a GPU, else `cpu`, where kernels are interpreted
    run_ptx     evaluates inline PTX, which the interpreter cannot (ptx.py)
    compiled    statistics of a compile case by its name (offline.py); everything selected is compiled once
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
SWITCH = "TRITON_INTERPRET"


def _interpret() -> None:
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise pytest.UsageError("triton was imported before tests/kernels/conftest.py, so no kernel can be interpreted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "1")
        import triton
        import triton.language
    triton.knobs.propagate_env = False  # the switch below stays in this process
    triton.knobs.runtime.interpret = True
    triton.knobs.propagate_env = True


if not torch.cuda.is_available():
    _interpret()


def _helper(name: str) -> ModuleType:
    """A module that stands beside this file: tests are no package, so it is loaded by its path."""
    spec = importlib.util.spec_from_file_location(f"kernels_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU what needs one is skipped, also when it is asked for."""
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def guard() -> Iterator[Any]:
    """A fresh `Guard`; every canary is looked at again when the test ends."""
    guard = _helper("guarded").Guard()
    yield guard
    guard.check()


@pytest.fixture(scope="session")
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """`relative_error(y, exact)`: Frobenius norm of the difference over that of the exact result."""
    function: Callable[[torch.Tensor, torch.Tensor], float] = _helper("guarded").relative_error
    return function


@pytest.fixture(scope="session")
def run_ptx() -> Callable[..., dict[str, int]]:
    """`run_ptx(text, registers)`: what a few lines of inline PTX leave in the registers (ptx.py)."""
    function: Callable[..., dict[str, int]] = _helper("ptx").run_ptx
    return function


@pytest.fixture(scope="session")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """Statistics of a compile case. One child process, where nothing is interpreted, compiles all that are selected."""
    wanted = {item.callspec.params["case"]["name"] for item in request.session.items if _has_case(item)}
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    (folder / "wanted.json").write_text(json.dumps(sorted(wanted)))
    command = [sys.executable, str(HERE / "offline.py"), str(folder / "wanted.json"), str(folder / "statistics.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    statistics = json.loads((folder / "statistics.json").read_text())

    def find(name: str) -> dict[str, Any]:
        found: dict[str, Any] = statistics[name]
        assert "error" not in found, f"{name} does not compile: {found['error']}"
        return found

    return find


def _has_case(item: pytest.Item) -> bool:
    return "compiled" in getattr(item, "fixturenames", ()) and "case" in item.callspec.params
