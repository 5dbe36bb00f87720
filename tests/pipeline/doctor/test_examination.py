"""All checks together: what becomes of errors and of checks that hang, and once everything, for real."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import DiskFull, UsageError
from layerwise.pipeline import cli
from layerwise.pipeline.doctor import as_line, examination, examine
from layerwise.pipeline.doctor.check import Check, Finding, State, Surroundings

CLUSTER = "http://head:8265"
WORKING = [
    *("torch", "HiGHS", "CBC", "ray sockets", "exclusive create", "rename", "flush", "lock"),
    *("ray token", "cluster", "cluster's ray"),
]
"""Checks that succeed wherever the tests do."""


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make these checks instead of ours."""
    return lambda **groups: monkeypatch.setattr(examination, "GROUPS", groups)


def raising(error: Exception) -> Check:
    def check(_: Surroundings) -> Finding:
        raise error

    return check


def finding_of(state: State) -> Check:
    return lambda _: Finding(state, "found\nmore", None if state == "ok" else "do")


def test_a_known_error_is_a_finding(use: Callable[..., None]) -> None:
    errors = {"full": DiskFull("cannot write", "free space"), "os": OSError("gone"), "import": ImportError("no numpy")}
    use(group={name: raising(error) for name, error in errors.items()})
    assert dict(examine(Path())) == {
        "full": Finding("problem", "cannot write", "free space"),
        "os": Finding("problem", "OSError: gone"),
        "import": Finding("problem", "ImportError: no numpy"),
    }


def test_a_mistake_of_ours_keeps_its_traceback(use: Callable[..., None]) -> None:
    use(group={"bad": raising(ZeroDivisionError())})
    with pytest.raises(ZeroDivisionError):
        list(examine(Path()))


def test_a_check_that_hangs_ends_its_group_and_nothing_else(
    use: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def hang(_: Surroundings) -> Finding:
        release.wait()
        return Finding("ok", "too late")

    monkeypatch.setattr(examination, "CHECK_SECONDS", 0.2)
    use(first={"hangs": hang, "would hang": hang}, second={"works": finding_of("ok")})
    try:
        found = dict(examine(Path()))
    finally:
        release.set()
    assert {name: finding.state for name, finding in found.items()} == {"hangs": "problem", "works": "ok"}
    assert found["hangs"].found.startswith("no answer within")


def test_the_cluster_is_asked_only_if_one_is_named(use: Callable[..., None]) -> None:
    use(ray={"ray": finding_of("ok")}, cluster={"cluster": finding_of("ok")})
    assert list(dict(examine(Path()))) == ["ray"]
    assert list(dict(examine(Path(), CLUSTER))) == ["ray", "cluster"]


def test_a_cluster_that_lets_nobody_in_is_not_asked_further(use: Callable[..., None]) -> None:
    use(cluster={"cluster": finding_of("problem"), "cluster's ray": finding_of("warning")})
    assert list(dict(examine(Path(), CLUSTER))) == ["cluster"]
    use(cluster={"cluster": finding_of("warning"), "cluster's ray": finding_of("ok")})
    assert list(dict(examine(Path(), CLUSTER))) == ["cluster", "cluster's ray"]


def test_an_address_that_is_none_is_refused_before_the_first_check() -> None:
    with pytest.raises(UsageError):
        next(examine(Path(), "ray://head:10001"))


def test_a_line_holds_name_state_find_and_hint() -> None:
    assert as_line("gpu", Finding("warning", "a\nb", "do")).split() == ["gpu", "warning", "a", "b", "(hint:", "do)"]
    assert as_line("gpu", Finding("ok", "a")).split() == ["gpu", "ok", "a"]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["layerwise", "doctor", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(("worst", "code"), [("ok", 0), ("warning", 0), ("problem", 1)])
def test_the_exit_code_tells_of_problems(
    use: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    worst: State,
    code: int,
) -> None:
    use(group={"ray": finding_of(worst), "gpu": finding_of("ok")})
    assert call(monkeypatch) == code
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["ray", worst], ["gpu", "ok"]]
    assert call(monkeypatch, "--format", "json") == code
    hint = None if worst == "ok" else "do"
    first = json.loads(capsys.readouterr().out)[0]
    assert first == {"check": "ray", "state": worst, "found": "found\nmore", "hint": hint}


def test_a_wrong_address_is_invalid_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--address", "ray://head:10001") == 2
    assert capsys.readouterr().err.startswith("error: --address 'ray://head:10001': expected http://")


def test_every_check_is_made_for_real_without_loading_anything_heavy(
    tmp_path: Path, home: Path, fake_cluster: Any
) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(fake_cluster.token)
    (home / ".ray" / "auth_token").chmod(0o600)
    fake_cluster.version = metadata.version("ray")
    script = """
import sys
from layerwise.pipeline.cli import main
try:
    main()
finally:
    print("heavy:", sorted({"torch", "ray", "numpy", "pandas", "pulp"} & set(sys.modules)), file=sys.stderr)
"""
    command = ["doctor", "--results", str(tmp_path / "results"), "--address", fake_cluster.address, "--format", "json"]
    command = [sys.executable, "-c", script, *command]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    found = {entry["check"]: entry for entry in json.loads(done.stdout)}
    assert list(found) == [name for checks in examination.GROUPS.values() for name in checks]
    assert done.returncode == any(entry["state"] == "problem" for entry in found.values())
    assert done.stderr == "heavy: []\n"
    for name in WORKING:
        assert found[name]["state"] == "ok", found[name]
    assert fake_cluster.token not in done.stdout
    assert not (tmp_path / "results").exists()
