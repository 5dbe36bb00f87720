"""A cluster: what each way of being received means, and its Ray beside ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from layerwise.errors import ClusterError
from layerwise.pipeline.cluster.connection import Visit
from layerwise.pipeline.cluster.tokens import Token
from layerwise.pipeline.doctor import check, cluster
from layerwise.pipeline.doctor.check import Finding, Surroundings

CLUSTER = "http://head:8265"
TOKEN = Token("RAY_AUTH_TOKEN", "5ecret" * 8)


def received(monkeypatch: pytest.MonkeyPatch, visit: Visit) -> Surroundings:
    monkeypatch.setattr(check, "visit", lambda _: visit)
    return Surroundings(Path(), CLUSTER)


def test_a_cluster_that_takes_the_token_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = cluster.door(received(monkeypatch, Visit(TOKEN, "2.60.0")))
    assert finding == Finding("ok", f"{CLUSTER} takes the token from RAY_AUTH_TOKEN")


def test_a_cluster_that_asks_for_nothing_draws_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = cluster.door(received(monkeypatch, Visit(None, "2.60.0")))
    assert finding.state == "warning"
    assert "whoever can reach it runs code" in finding.found


def test_a_cluster_that_refuses_us_is_a_problem_and_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(address: str) -> Visit:
        asked.append(address)
        raise ClusterError("asks for a token, and there is none", hint="get one")

    monkeypatch.setattr(check, "visit", refuse)
    surroundings = Surroundings(Path(), CLUSTER)
    assert cluster.door(surroundings) == Finding("problem", "asks for a token, and there is none", "get one")
    assert cluster.ray(surroundings).state == "warning"
    assert asked == [CLUSTER]


@pytest.mark.parametrize(
    ("theirs", "ours", "state"),
    [
        ("2.60.0", "2.60.0", "ok"),
        ("2.60.1", "2.60.0", "ok"),
        ("2.60.1", None, "ok"),
        ("2.59.0", "2.60.0", "warning"),
        ("3.0.0.dev0", "2.60.0", "warning"),
        (None, "2.60.0", "warning"),
        ("2.51.2", "2.60.0", "problem"),
    ],
)
def test_the_clusters_ray_is_compared_with_ours(
    monkeypatch: pytest.MonkeyPatch,
    installed: Callable[..., None],
    theirs: str | None,
    ours: str | None,
    state: str,
) -> None:
    installed(ray=ours)
    assert cluster.ray(received(monkeypatch, Visit(None, theirs))).state == state
