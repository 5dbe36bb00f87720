"""Ray's token: where it comes from, whether it can be sent, and who else can read it.

The rules are those of Ray 2.60's loader, tried one by one: `RAY_AUTH_TOKEN` comes before the file that
`RAY_AUTH_TOKEN_PATH` names, and that before `~/.ray/auth_token`; blanks around a token are cut; a `~` in
`RAY_AUTH_TOKEN_PATH` is not expanded; any `RAY_AUTH_MODE` but "token" means none.

A token never stands in a message or a `repr`. Left out: making one, which Ray does when it first starts.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from layerwise.errors import ClusterError


@dataclass(frozen=True)
class Token:
    """A token that Ray would take.

    Args:
        source: where it comes from, for people.
        value: the secret; printable ASCII, so that an HTTP header takes it.
        file: the file that it stands in, None if it comes from `RAY_AUTH_TOKEN`.
        in_clear: its owner lets it travel where others may read it.
    """

    source: str
    value: str = field(repr=False)
    file: Path | None = None
    in_clear: bool = False

    @property
    def open_mode(self) -> int | None:
        """The permissions of its file if they let others in, else None."""
        mode = 0 if self.file is None else self.file.stat().st_mode & 0o777
        return mode if mode & 0o077 else None


def asks_for_token() -> bool:
    """Whether a Ray of ours asks for a token, and ours is sent to a cluster."""
    return os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"


def has_token() -> bool:
    """Whether Ray has a place to take a token from; what stands there is not looked at."""
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or token_file().is_file()


def token_file() -> Path:
    """Where Ray looks for a token that `RAY_AUTH_TOKEN` does not hold.

    Raises:
        ClusterError: none is named, and there is no home folder.
    """
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        return Path(named) if named else Path.home() / ".ray" / "auth_token"
    except RuntimeError as error:
        raise ClusterError("no home folder, so no place for a token", hint="set HOME or RAY_AUTH_TOKEN_PATH") from error


def find_token() -> Token | None:
    """The token that Ray would use, None if there is none.

    Raises:
        ClusterError: one is named that cannot be read or sent.
    """
    value = os.environ.get("RAY_AUTH_TOKEN", "")
    if value and not value.strip():  # Ray then looks nowhere else
        raise ClusterError("RAY_AUTH_TOKEN is blank", hint="unset it, or set it to the cluster's token")
    if value:
        return _sendable(Token("RAY_AUTH_TOKEN", value.strip()))
    named, path = bool(os.environ.get("RAY_AUTH_TOKEN_PATH")), token_file()
    source = f"RAY_AUTH_TOKEN_PATH={path}" if named else str(path)
    try:
        value = path.read_text(encoding="latin-1").strip()
    except FileNotFoundError as error:
        if not named:
            return None
        raise ClusterError(f"{source} does not exist", hint="correct RAY_AUTH_TOKEN_PATH, or unset it") from error
    except OSError as error:
        raise ClusterError(f"{source} cannot be read: {error.strerror}", hint="make it readable for you") from error
    if not value:
        if not named:
            return None
        raise ClusterError(f"{source} is empty", hint="write the cluster's token into it")
    return _sendable(Token(source, value, path))


def _sendable(token: Token) -> Token:
    """Refuse what http.client would refuse with the token in its message."""
    if not re.fullmatch(r"[!-~]+", token.value):
        raise ClusterError(
            f"the token from {token.source} holds characters that no HTTP header takes", hint="copy it once more"
        )
    return token
