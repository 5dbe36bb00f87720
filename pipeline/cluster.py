"""The door of a Ray cluster: its dashboard's address, and whether it lets us in.

A visit asks without a token first. The token is sent only to a cluster that wants one, over https or to this machine
(`travels_safely`), and never after a redirect. Nothing of Ray is imported.

Left out: waiting for a cluster that is not up yet.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from layerwise.errors import ClusterError, UsageError
from layerwise.pipeline.tokens import Token, asks_for_token, find_token, token_file

NETWORK_SECONDS = 10.0


@dataclass(frozen=True)
class Visit:
    """How a cluster let us in.

    Args:
        token: the one that it took; None if it asks for none, and so lets in whoever can reach it.
        ray_version: of its Ray, None if it did not say.
    """

    token: Token | None
    ray_version: str | None


def plain_address(address: str) -> str:
    """The address of a dashboard without a slash at its end.

    Raises:
        UsageError: another scheme, no host, or a password in it.
    """
    hint = "give the dashboard's address, such as http://127.0.0.1:8265"
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if "@" in address:
        raise UsageError("--address holds a user name or password", hint=hint)
    if not usable or not re.fullmatch(r"[!-~]+", address) or parts.query or parts.fragment:
        raise UsageError(f"--address {address!r}: expected http://HOST:PORT or https://HOST:PORT", hint=hint)
    return address.rstrip("/")


def visit(address: str) -> Visit:
    """Ask for the list of jobs without a token, then with ours if the cluster wants one.

    Args:
        address: a plain one.
    Raises:
        ClusterError: it cannot be reached, it is not Ray's, or we are not let in.
    """
    try:
        return _knock(address)
    except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last: a host name that cannot be one
        reason = getattr(error, "reason", None) or error
        raise ClusterError(
            f"{address} cannot be reached: {str(reason) or type(error).__name__}",
            "is it the dashboard's address (port 8265), and is the tunnel or port-forward up?",
        ) from error


def get(url: str, token: Token | None = None) -> tuple[int, bytes]:
    """Status and the beginning of the body. To this machine it goes directly, whatever proxy is set.

    Args:
        url: with a token, one that `travels_safely`.
        token: to send along, None for none.
    Raises:
        OSError: no answer, or none in time.
        http.client.HTTPException: an answer that is not HTTP.
    """
    request = urllib.request.Request(url)
    if token is not None:
        assert travels_safely(url)
        request.add_unredirected_header("Authorization", f"Bearer {token.value}")
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if _is_loopback(urlsplit(url).hostname):
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=NETWORK_SECONDS) as reply:
            return int(reply.status), bytes(reply.read(2**16))
    except urllib.error.HTTPError as error:
        with error:
            return error.code, b""


def travels_safely(url: str) -> bool:
    """Whether nobody on the way can read what is sent there."""
    parts = urlsplit(url)
    return parts.scheme == "https" or _is_loopback(parts.hostname)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would take the token along to wherever it is sent."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _knock(address: str) -> Visit:
    status, _ = get(f"{address}/api/jobs/")
    if status == 200:
        return Visit(None, _ray_version(address))
    if status != 401:
        raise _strange(address, status)
    token = _token_for(address)
    status, _ = get(f"{address}/api/jobs/", token)
    if status in (401, 403):
        hint = "get this cluster's token; `ray get-auth-token` prints it there"
        raise ClusterError(f"{address} refuses the token from {token.source} (HTTP {status})", hint)
    if status != 200:
        raise _strange(address, status)
    return Visit(token, _ray_version(address, token))


def _token_for(address: str) -> Token:
    """The token, if there is one that may be sent there."""
    asks = f"{address} asks for a token"
    if not asks_for_token():
        raise ClusterError(f"{asks}, and with this RAY_AUTH_MODE none is sent", hint="unset RAY_AUTH_MODE")
    token = find_token()
    if token is None:
        hint = f"put the cluster's into {token_file()}, mode 600, or name its file by RAY_AUTH_TOKEN_PATH"
        raise ClusterError(f"{asks}, and there is none", hint)
    if not travels_safely(address):
        hint = "use https, or a tunnel or port-forward to this machine"
        raise ClusterError(f"{asks}; it was not sent, for it would travel in clear", hint)
    return token


def _strange(address: str, status: int) -> ClusterError:
    return ClusterError(
        f"{address} answers, but not as Ray's dashboard does: HTTP {status}", "what else listens there?"
    )


def _ray_version(address: str, token: Token | None = None) -> str | None:
    """What `/api/version` says; None for anything but a version, for it is printed."""
    status, body = get(f"{address}/api/version", token)
    try:
        version = json.loads(body)["ray_version"] if status == 200 else None
    except (ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, str) and re.fullmatch(r"\d+(\.[0-9a-z]+){1,4}(\+\w+)?", version) else None


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
