"""How a batch of candidates is spread over replicas, and how its answers find their way back."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.stages.evaluate.scoring import Genome, Request, Score, perplexity, score


class RecordingPool:
    """Answers each genome with its own sum, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.calls = 0

    def map(self, items: Any, *, keys: Sequence[str] | None = None, note: str = "") -> list[Any]:
        raise AssertionError("candidates are cheaper together")

    def map_together(self, parts: Sequence[Any], *, keys: Sequence[str], calls: int, note: str = "") -> list[Any]:
        assert len(set(keys)) == len(keys) == len(parts), "an executor refuses two parts of one key"
        self.asked, self.calls = list(parts), calls
        return [{"kl": {"mean": sum(genome)}} for request in parts for genome in request.genomes]


genome_lists = st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3).map(tuple), max_size=12)


@given(genomes=genome_lists, workers=st.integers(1, 5))
def test_every_genome_gets_its_own_score_whatever_the_workers(genomes: list[Genome], workers: int) -> None:
    pool = RecordingPool()
    scores: list[Score] = score(pool, Request(tuple(genomes)), workers=workers, note="x")
    assert [measured["kl"]["mean"] for measured in scores] == [sum(genome) for genome in genomes]
    asked = [request.genomes for request in pool.asked]
    assert asked == [(genome,) for genome in sorted(set(genomes))], "neighbours meet, and none is scored twice"
    assert pool.calls == workers


def test_the_parts_of_a_request_measure_the_same() -> None:
    pool = RecordingPool()
    request = Request(((0,), (1,), (2,)), ("kl", "nll"), tokens=64, draw=7, sequences=True)
    score(pool, request, workers=2)
    assert [replace(part, genomes=()) for part in pool.asked] == [replace(request, genomes=())] * 3


def test_a_request_has_one_key_in_every_process_and_another_when_anything_differs() -> None:
    request = Request(((0, 1), (1, 0)), ("kl",), tokens=64, draw=7)
    assert request.key == "5f4f1cd2545ac81b36043936", "an interrupted stage finds its answers by it"
    others = [
        replace(request, genomes=((1, 0), (0, 1))),
        replace(request, metrics=("nll",)),
        replace(request, tokens=None),
        replace(request, draw=8),
        replace(request, sequences=True),
    ]
    assert len({request.key, *(other.key for other in others)}) == 6
    assert replace(request).key == request.key


@pytest.mark.parametrize("nll", [0.0, 1.5, 700.0])
def test_perplexity_is_the_exponential(nll: float) -> None:
    assert perplexity(nll) == math.exp(nll)


@pytest.mark.parametrize("nll", [None, 710.0, sys.float_info.max])
def test_a_perplexity_beyond_float64_is_unknown(nll: float | None) -> None:
    assert perplexity(nll) is None
