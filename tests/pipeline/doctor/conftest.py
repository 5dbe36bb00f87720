"""What the checks look at, faked: the packages that are installed, and what other processes answer."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from layerwise.pipeline.doctor import child
from layerwise.pipeline.doctor.check import Surroundings


@pytest.fixture(autouse=True)
def home(empty_home: Path) -> Path:
    """Nothing of whoever runs the tests."""
    return empty_home


@pytest.fixture
def here(tmp_path: Path) -> Surroundings:
    """A results folder that exists."""
    (tmp_path / "results").mkdir()
    return Surroundings(tmp_path / "results")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say which version of a package is installed, None for none."""

    def install(**versions: str | None) -> None:
        real = metadata.version

        def version(name: str) -> str:
            found = versions[name] if name in versions else real(name)
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(metadata, "version", version)

    return install


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what children answer, one after the other; a string that starts with "!" is a failure."""

    def prepare(*values: Any) -> None:
        left = list(values)

        def ask(*_: str) -> child.Answer:
            value = left.pop(0)
            failed = isinstance(value, str) and value.startswith("!")
            return child.Answer(None, value[1:]) if failed else child.Answer(value)

        monkeypatch.setattr(child, "ask", ask)

    return prepare
