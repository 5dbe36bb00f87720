"""Ray on this machine: every state of its token, its variables and its sockets."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from layerwise.pipeline.doctor import ray
from layerwise.pipeline.doctor.check import Finding, Surroundings
from layerwise.pipeline.doctor.examination import before_the_deadline
from layerwise.pipeline.executors import ray_session

SECRET = "5ecret" * 8
CLUSTER = "http://head:8265"


@pytest.mark.parametrize(("mode", "state"), [(None, "ok"), ("token", "ok"), ("disabled", "warning"), ("", "warning")])
def test_a_ray_that_lets_everybody_in_draws_a_warning(
    here: Surroundings, monkeypatch: pytest.MonkeyPatch, mode: str | None, state: str
) -> None:
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert ray.authentication(here).state == state


def test_without_a_token_ray_makes_one(here: Surroundings, home: Path) -> None:
    finding = ray.token(here)
    assert finding.state == "ok"
    assert finding.found.startswith(f"none yet; Ray makes one in {home / '.ray/auth_token'}")


@pytest.mark.parametrize(("mode", "state"), [(0o600, "ok"), (0o644, "warning")])
def test_a_token_file_must_be_private(here: Surroundings, home: Path, mode: int, state: str) -> None:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text(SECRET)
    path.chmod(mode)
    finding = ray.token(here)
    assert finding.state == state
    assert finding.hint == (None if state == "ok" else f"chmod 600 {path}")
    assert SECRET not in finding.found


def test_a_token_from_the_environment_is_named_and_not_shown(
    here: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    assert ray.token(here) == Finding("ok", "from RAY_AUTH_TOKEN")


def test_a_token_that_cannot_be_used_is_a_problem(
    here: Surroundings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    finding = before_the_deadline(ray.token, here)
    assert finding.state == "problem"
    assert finding.found.endswith("does not exist")
    assert finding.hint


@pytest.mark.parametrize(
    ("api", "plain", "address", "state", "hint"),
    [
        (None, None, CLUSTER, "ok", None),
        (None, "other:6379", None, "ok", None),
        (None, "HEAD:8265", CLUSTER, "ok", None),
        (f"{CLUSTER}/", "other:6379", CLUSTER, "ok", None),
        (None, "other:6379", CLUSTER, "problem", "unset RAY_ADDRESS"),
        ("https://head:8265", None, CLUSTER, "problem", "unset RAY_API_SERVER_ADDRESS"),
        ("http://other:8265", CLUSTER, CLUSTER, "problem", "unset RAY_API_SERVER_ADDRESS RAY_ADDRESS"),
    ],
)
def test_a_variable_that_leads_elsewhere_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, api: str | None, plain: str | None, address: str | None, state: str, hint: str
) -> None:
    for name, value in (("RAY_API_SERVER_ADDRESS", api), ("RAY_ADDRESS", plain)):
        if value is not None:
            monkeypatch.setenv(name, value)
    finding = ray.addresses(Surroundings(Path(), address))
    assert (finding.state, finding.hint) == (state, hint)


def test_a_password_in_an_address_is_not_printed(here: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"http://me:{SECRET}@head:8265")
    assert ray.addresses(here).found.startswith("RAY_ADDRESS=http://***@head:8265")


@pytest.mark.parametrize(("letters", "state"), [(20, "ok"), (44, "problem")])
def test_sockets_need_a_short_folder(
    here: Surroundings, monkeypatch: pytest.MonkeyPatch, letters: int, state: str
) -> None:
    folder = Path("/tmp") / f"layerwise-{os.getpid()}-".ljust(letters, "x")[: letters - len("/tmp/")]
    folder.mkdir()
    monkeypatch.setattr(ray_session, "private_folder", lambda: folder)
    try:
        finding = ray.sockets(here)
        assert finding.state == state
        assert not folder.exists()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
