"""Ray's token: the same one that Ray finds, a hint for each that cannot be used, and never its value in a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerwise.errors import ClusterError
from layerwise.pipeline.cluster.tokens import Token, asks_for_token, find_token, has_token
from layerwise.pipeline.doctor import child

SECRET = "5ecret" * 8


@pytest.fixture(autouse=True)
def default_file(empty_home: Path) -> Path:
    """Where Ray looks if no variable says otherwise; nothing is there yet."""
    (empty_home / ".ray").mkdir()
    return empty_home / ".ray" / "auth_token"


@pytest.fixture
def named_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that `RAY_AUTH_TOKEN_PATH` names; nothing is there yet."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    return tmp_path / "named"


@pytest.mark.parametrize(
    ("mode", "asks"), [(None, True), ("token", True), ("TOKEN", True), ("disabled", False), ("on", False), ("", False)]
)
def test_any_mode_but_token_means_none(monkeypatch: pytest.MonkeyPatch, mode: str | None, asks: bool) -> None:
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert asks_for_token() is asks


def test_the_first_source_of_a_token_wins(default_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (find_token(), has_token()) == (None, False)
    default_file.write_text("default")
    assert find_token() == Token(str(default_file), "default", default_file)
    named = tmp_path / "named"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    assert not has_token()
    named.write_text("named")
    assert find_token() == Token(f"RAY_AUTH_TOKEN_PATH={named}", "named", named)
    assert has_token()
    named.unlink()
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    assert find_token() == Token("RAY_AUTH_TOKEN", SECRET)
    assert has_token()
    assert SECRET not in repr(find_token())


@pytest.mark.parametrize(("mode", "open_"), [(0o600, None), (0o400, None), (0o644, 0o644), (0o620, 0o620)])
def test_a_file_that_others_get_at_is_told_by_its_mode(default_file: Path, mode: int, open_: int | None) -> None:
    default_file.write_text(SECRET)
    default_file.chmod(mode)
    token = find_token()
    assert token is not None
    assert token.open_mode == open_


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        ("", "is empty"),
        (" \n", "is empty"),
        (f"{SECRET}\n{SECRET}", "characters"),
        ("é", "characters"),
    ],
)
def test_a_named_token_that_cannot_be_used_is_refused_and_stays_secret(
    named_file: Path, content: str | None, says: str
) -> None:
    if content is not None:
        named_file.write_text(content)
    with pytest.raises(ClusterError, match=says) as caught:
        find_token()
    assert caught.value.hint
    assert SECRET not in str(caught.value)


def test_a_token_that_cannot_be_read_and_a_missing_home_are_told(
    default_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default_file.mkdir()
    with pytest.raises(ClusterError, match="cannot be read: Is a directory"):
        find_token()

    def home() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(ClusterError, match="no home folder"):
        find_token()


def test_ray_finds_the_same_tokens(default_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named, blank = tmp_path / "named", tmp_path / "blank"
    named.write_text("\t named \n")
    blank.write_text(" \n")
    settings: list[dict[str, str]] = [
        {},
        {"RAY_AUTH_TOKEN": " padded "},
        {"RAY_AUTH_TOKEN": "  "},
        {"RAY_AUTH_TOKEN_PATH": ""},
        {"RAY_AUTH_TOKEN_PATH": str(named)},
        {"RAY_AUTH_TOKEN_PATH": str(blank)},
        {"RAY_AUTH_TOKEN_PATH": "~/.ray/auth_token"},
        {"RAY_AUTH_TOKEN": "first", "RAY_AUTH_TOKEN_PATH": str(named)},
    ]
    script = f"""
import json, os
from ray._raylet import AuthenticationTokenLoader
from ray.exceptions import AuthenticationError
found = []
for setting in {settings!r}:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        os.environ.pop(name, None)
    os.environ.update(setting)
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    try:
        found.append(loader.get_token_for_http_header()["authorization"].removeprefix("Bearer "))
    except (AuthenticationError, KeyError):
        found.append(None)
print(json.dumps(found))
"""

    def ours(setting: dict[str, str]) -> str | None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in setting.items():
                patch.setenv(name, value)
            try:
                token = find_token()
            except ClusterError:
                return None
            return token and token.value

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for content in (None, " default\n", ""):
        if content is not None:
            default_file.write_text(content)
        answer = child.ask(script)
        assert answer.failure == ""
        assert answer.value == [ours(setting) for setting in settings]
