"""The door of a Ray cluster: its dashboard's address, and whether it lets us in.

A visit asks without a token first. The token is sent only to a cluster that wants one, over https or to this machine
(`travels_safely`) unless its owner says otherwise, and never after a redirect. Nothing of Ray is imported.

Left out: waiting for a cluster that is not up yet.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from layerwise.errors import ClusterError, UsageError
from layerwise.pipeline.cluster.tokens import Token, asks_for_token, find_token, token_file

NETWORK_SECONDS = 10.0

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""What Ray's job client follows instead of the address that it is given; the first one that is set wins."""


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


def same_address(left: str, right: str) -> bool:
    """Whether Ray's job client reads them alike; it takes http where nothing is said."""
    return _with_scheme(left) == _with_scheme(right)


def _with_scheme(address: str) -> str:
    return (address if "://" in address else f"http://{address}").rstrip("/").lower()


def visit(address: str, *, in_clear: bool = False) -> Visit:
    """Ask for the list of jobs without a token, then with ours if the cluster wants one.

    Args:
        address: a plain one.
        in_clear: send the token even where others on the way can read it.
    Raises:
        ClusterError: it cannot be reached, it is not Ray's, or we are not let in.
    """
    try:
        return _knock(address, in_clear)
    except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last: a host name that cannot be one
        raise unreachable(address, error) from error


def get(url: str, token: Token | None = None, *, limit: int = 2**16, method: str = "GET") -> tuple[int, bytes]:
    """Status and the beginning of the body. To this machine it goes directly, whatever proxy is set.

    Args:
        url: with a token, one where it `travels_safely`, or may travel in clear.
        token: to send along, None for none.
        limit: of the body, in bytes.
        method: of the request, which has no body.
    Raises:
        OSError: no answer, or none in time.
        http.client.HTTPException: an answer that is not HTTP.
    """
    request = urllib.request.Request(url, method=method)
    if token is not None:
        assert token.in_clear or travels_safely(url)
        request.add_unredirected_header("Authorization", f"Bearer {token.value}")
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if stays_here(url):
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=NETWORK_SECONDS) as reply:
            return int(reply.status), bytes(reply.read(limit))
    except urllib.error.HTTPError as error:
        with error:
            return error.code, b""


def travels_safely(url: str) -> bool:
    """Whether nobody on the way can read what is sent there."""
    return urlsplit(url).scheme == "https" or stays_here(url)


def stays_here(url: str) -> bool:
    """Whether a request there does not leave this machine."""
    return _is_loopback(urlsplit(url).hostname)


def unreachable(address: str, error: Exception) -> ClusterError:
    """What to say when nobody answers there, or something that speaks no HTTP: its bytes are not for a terminal."""
    if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError | http.client.IncompleteRead):
        return ClusterError(
            f"{address} answers, but not in HTTP", "is it the GCS port (6379) instead of the dashboard's (8265)?"
        )
    reason = getattr(error, "reason", None) or error
    return ClusterError(
        f"{address} cannot be reached: {str(reason) or type(error).__name__}",
        "is it the dashboard's address (port 8265), and is the tunnel or port-forward up?",
    )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would take the token along to wherever it is sent."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _knock(address: str, in_clear: bool) -> Visit:
    status, _ = get(f"{address}/api/jobs/")
    if status == 200:
        return Visit(None, _ray_version(address))
    if status != 401:
        raise _strange(address, status)
    token = _token_for(address, in_clear)
    status, _ = get(f"{address}/api/jobs/", token)
    if status in (401, 403):
        hint = "get this cluster's token; `ray get-auth-token` prints it there"
        raise ClusterError(f"{address} refuses the token from {token.source} (HTTP {status})", hint)
    if status != 200:
        raise _strange(address, status)
    return Visit(token, _ray_version(address, token))


def _token_for(address: str, in_clear: bool) -> Token:
    """The token, if there is one that may be sent there."""
    asks = f"{address} asks for a token"
    if not asks_for_token():
        raise ClusterError(f"{asks}, and with this RAY_AUTH_MODE none is sent", hint="unset RAY_AUTH_MODE")
    token = find_token()
    if token is None:
        hint = f"put the cluster's into {token_file()}, mode 600, or name its file by RAY_AUTH_TOKEN_PATH"
        raise ClusterError(f"{asks}, and there is none", hint)
    if not (in_clear or travels_safely(address)):
        hint = "use https, a tunnel or port-forward to this machine, or --allow-insecure-http in a network of your own"
        raise ClusterError(f"{asks}; it was not sent, for it would travel in clear", hint)
    return replace(token, in_clear=in_clear)


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
