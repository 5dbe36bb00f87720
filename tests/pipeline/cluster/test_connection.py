"""A cluster's door: who is let in, what each refusal says, and that a token goes nowhere else."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import ClusterError, UsageError
from layerwise.pipeline.cluster import connection as cluster
from layerwise.pipeline.cluster.connection import Visit, plain_address, travels_safely, visit
from layerwise.pipeline.cluster.tokens import Token

SECRET = "5ecret" * 8
TOKEN = Token("RAY_AUTH_TOKEN", SECRET)

pytestmark = pytest.mark.usefixtures("empty_home")


@pytest.fixture
def with_token(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """We have the fake cluster's token."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)


def refusal(address: str) -> ClusterError:
    """Why we are not let in there."""
    with pytest.raises(ClusterError) as caught:
        visit(address)
    assert caught.value.exit_code == 5
    assert caught.value.hint
    assert SECRET not in str(caught.value)
    return caught.value


@pytest.mark.usefixtures("with_token")
def test_a_cluster_that_wants_the_token_gets_it_after_it_asked(fake_cluster: Any) -> None:
    assert visit(fake_cluster.address) == Visit(TOKEN, "2.60.0")
    paths = ["/api/jobs/", "/api/jobs/", "/api/version"]
    assert fake_cluster.seen == list(zip(paths, [None, f"Bearer {SECRET}", f"Bearer {SECRET}"], strict=True))


@pytest.mark.usefixtures("with_token")
def test_a_cluster_that_asks_for_nothing_gets_no_token(fake_cluster: Any) -> None:
    fake_cluster.token = None
    assert visit(fake_cluster.address) == Visit(None, "2.60.0")
    assert fake_cluster.sent == {None}


def test_a_wrong_a_missing_and_an_unreadable_token_are_refused(
    fake_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert refusal(fake_cluster.address).message.endswith("asks for a token, and there is none")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert refusal(fake_cluster.address).message.endswith("does not exist")
    assert fake_cluster.sent == {None}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    assert refusal(fake_cluster.address).message.endswith("refuses the token from RAY_AUTH_TOKEN (HTTP 403)")


@pytest.mark.usefixtures("with_token")
def test_a_mode_that_forbids_tokens_is_kept(fake_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert refusal(fake_cluster.address).hint == "unset RAY_AUTH_MODE"
    assert fake_cluster.sent == {None}


@pytest.mark.usefixtures("with_token")
def test_no_token_travels_in_clear_to_another_machine(fake_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_is_loopback", lambda _: False)
    assert "it would travel in clear" in refusal(fake_cluster.address).message
    assert fake_cluster.sent == {None}


@pytest.mark.usefixtures("with_token")
def test_a_token_travels_in_clear_where_its_owner_lets_it(fake_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_is_loopback", lambda _: False)
    found = visit(fake_cluster.address, in_clear=True)
    assert found.token is not None
    assert (found.token.value, found.token.in_clear) == (TOKEN.value, True)


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("https://cluster.example", True),
        ("http://localhost:8265", True),
        ("http://LOCALHOST:8265", True),
        ("http://127.8.9.1", True),
        ("http://[::1]:8265", True),
        ("http://cluster.example", False),
        ("http://10.0.0.1:8265", False),
        ("http://0.0.0.0:8265", False),
        ("http://127.0.0.1.example", False),
        ("http://localhost.example", False),
    ],
)
def test_only_https_and_this_machine_are_safe_for_a_token(url: str, safe: bool) -> None:
    assert travels_safely(url) is safe


@pytest.mark.usefixtures("with_token")
@pytest.mark.parametrize("status", [301, 302, 307])
def test_a_token_does_not_follow_a_redirect(fake_cluster: Any, status: int) -> None:
    fake_cluster.status_for_token, fake_cluster.location = status, f"{fake_cluster.address}/elsewhere"
    assert refusal(fake_cluster.address).message.endswith(f"HTTP {status}")
    assert "/elsewhere" not in {path for path, _ in fake_cluster.seen}


@pytest.mark.usefixtures("with_token")
def test_a_request_to_this_machine_passes_no_proxy(fake_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert visit(fake_cluster.address).token == TOKEN


@pytest.mark.parametrize("status", [403, 404, 500, 204])
def test_something_else_than_ray_is_told(fake_cluster: Any, status: int) -> None:
    fake_cluster.status = status
    assert refusal(fake_cluster.address).message.endswith(f"not as Ray's dashboard does: HTTP {status}")


def test_an_address_where_nothing_answers_is_told() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
    assert refusal(address).message.startswith(f"{address} cannot be reached: ")
    assert "cannot be reached" in refusal(f"http://{'x' * 70}.invalid:8265").message  # no host name is that long


def test_what_answers_in_another_protocol_is_told_without_its_bytes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"\x00\x00\x18\x04\x00\x1b[31m\xff\n")  # as gRPC does, and the colour red

        threading.Thread(target=answer, daemon=True).start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        found = refusal(address)
    assert found.message == f"{address} answers, but not in HTTP"
    assert found.hint == "is it the GCS port (6379) instead of the dashboard's (8265)?"


def test_a_tunnel_whose_far_end_is_down_is_no_other_protocol() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def hang_up() -> None:
            connection, _ = listening.accept()
            connection.recv(1024)
            connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        assert "cannot be reached" in refusal(f"http://127.0.0.1:{listening.getsockname()[1]}").message


def test_an_address_that_never_answers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "NETWORK_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert "timed out" in refusal(f"http://127.0.0.1:{listening.getsockname()[1]}").message


@pytest.mark.parametrize(
    ("said", "version"),
    [("2.60.1", "2.60.1"), ("3.0.0.dev0", "3.0.0.dev0"), ("\x1b[31mred", None), (7, None), (None, None)],
)
def test_only_what_looks_like_a_version_is_one(fake_cluster: Any, said: Any, version: str | None) -> None:
    fake_cluster.token, fake_cluster.version = None, said
    assert visit(fake_cluster.address).ray_version == version


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265/", "https://head", "http://[::1]:8265//"])
def test_a_plain_address_ends_without_a_slash(address: str) -> None:
    assert plain_address(address) == address.rstrip("/")


@pytest.mark.parametrize(
    "address",
    [
        *("ray://head:10001", "head:8265", "auto", "http://", "http://head:port", "http://head:0", "http://he ad"),
        *("ftp://a", f"http://me:{SECRET}@head:8265", "http://head:8265?x=1", "http://head:8265#x", "http://[::1"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="8265") as caught:
        plain_address(address)
    assert SECRET not in str(caught.value)
