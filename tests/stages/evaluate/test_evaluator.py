"""The evaluator's numbers against the plain way: copy the model, set every weight, run it whole, measure in float64."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import NotFinite
from layerwise.stages.evaluate.evaluator import Evaluator
from layerwise.stages.evaluate.scoring import DENSE, METRICS, Genome, Request, Score

SEQUENCES = torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(3))
N_LEVELS = 3


class NoisyLevels:
    """Levels of some units: the dense weight with more noise at each level; level 2 of the last unit is broken."""

    def __init__(self, lm: Any, *, skip: int = 0, broken: float | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.units = lm.units[skip:]
        self.unit_names = tuple(unit.name for unit in self.units)
        self.reads: Counter[tuple[str, int]] = Counter()
        self.table = {}
        for unit in self.units:
            weight = lm.weight(unit).detach().clone()
            for level in range(N_LEVELS):
                noise = torch.randn(weight.shape, generator=generator) * weight.std()
                self.table[unit.name, level] = weight + 0.1 * (level + 1) * noise
        if broken is not None:
            self.table[self.unit_names[-1], 2][0, 0] = broken

    def weight(self, unit: str, level: int) -> Tensor:
        self.reads[unit, level] += 1
        return self.table[unit, level]


def random_genomes(levels: NoisyLevels, count: int, seed: int = 0) -> tuple[Genome, ...]:
    """Half of them share their first units with another."""
    generator = torch.Generator().manual_seed(seed)
    genomes = torch.randint(DENSE, N_LEVELS, (count, len(levels.units)), generator=generator)
    for number in range(1, count, 2):
        cut = int(torch.randint(0, len(levels.units), (1,), generator=generator))
        genomes[number, :cut] = genomes[number - 1, :cut]
    return tuple(tuple(genome) for genome in genomes.tolist())


def plainly(lm: Any, levels: NoisyLevels, genome: Genome, sequences: Tensor) -> dict[str, float]:
    """Mean KL, NLL and agreement over all positions, from log-softmax in float64."""
    changed = copy.deepcopy(lm.model)
    modules = dict(changed.named_modules())
    for unit, level in zip(levels.units, genome, strict=True):
        if level != DENSE:
            modules[unit.name].weight.data.copy_(levels.table[unit.name, level])
    with torch.no_grad():
        p, q = (model(input_ids=sequences).logits.double().log_softmax(-1) for model in (lm.model, changed))
    following = q[:, :-1].gather(-1, sequences[:, 1:, None])
    return {
        "kl": (p.exp() * (p - q)).sum(-1).mean().item(),
        "nll": -following.mean().item(),
        "agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    }


def means(scores: Sequence[Score]) -> list[dict[str, float | None]]:
    return [{metric: measured["mean"] for metric, measured in score.items()} for score in scores]


def dense_weights(lm: Any) -> list[tuple[int, Tensor]]:
    return [(lm.weight(unit).data_ptr(), lm.weight(unit).clone()) for unit in lm.units]


def test_a_score_is_that_of_the_plain_way(load_model: Callable[[str], Any], family: str) -> None:
    lm = load_model(family)
    levels, before = NoisyLevels(lm), dense_weights(lm)
    genomes = random_genomes(levels, 6)
    scores = Evaluator(lm, SEQUENCES, levels, batch_tokens=48)(Request(genomes, METRICS))
    for genome, score in zip(genomes, scores, strict=True):
        expected = plainly(lm, levels, genome, SEQUENCES)
        assert expected["kl"] > 1e-3, "the test would see nothing"
        assert score["agreement"]["mean"] == expected["agreement"]
        for metric in ("kl", "nll"):
            assert score[metric]["mean"] == pytest.approx(expected[metric], abs=1e-5)
            assert score[metric]["n_tokens"] == SEQUENCES.numel()
    after = dense_weights(lm)
    for (place, weight), (place_now, weight_now) in zip(before, after, strict=True):
        assert place == place_now
        assert torch.equal(weight, weight_now)


def test_the_dense_model_differs_from_itself_by_exactly_nothing(load_model: Callable[[str], Any], family: str) -> None:
    lm = load_model(family)
    levels = NoisyLevels(lm)
    dense, other = (DENSE,) * len(lm.units), random_genomes(levels, 1)[0]
    scores = Evaluator(lm, SEQUENCES, levels)(Request((other, dense), METRICS))
    assert scores[1]["kl"]["mean"] == 0.0
    assert scores[1]["kl"]["stderr"] == 0.0
    assert scores[1]["agreement"]["mean"] == 1.0
    assert scores[1]["nll"]["mean"] == pytest.approx(plainly(lm, levels, dense, SEQUENCES)["nll"], abs=1e-5)


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(5)), cut=st.integers(0, 5), batch_tokens=st.sampled_from([1, 32, 10**6]))
def test_neither_company_nor_order_nor_batch_changes_a_bit(
    load_model: Callable[[str], Any], order: list[int], cut: int, batch_tokens: int
) -> None:
    lm = load_model("llama")
    levels = NoisyLevels(lm)
    genomes = random_genomes(levels, 5)
    whole, evaluator = (Evaluator(lm, SEQUENCES[:3], levels, batch_tokens=batch_tokens) for _ in range(2))
    scores = whole(Request(genomes, METRICS, sequences=True))
    for part in (order[:cut], order[cut:]):
        request = Request(tuple(genomes[number] for number in part), METRICS, sequences=True)
        assert evaluator(request) == [scores[number] for number in part]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("cache_bytes", "reference_bytes"), [(0, 0), (20_000, 60_000)])
def test_caches_too_small_for_anything_change_nothing(
    load_model: Callable[[str], Any], family: str, cache_bytes: int, reference_bytes: int
) -> None:
    lm = load_model(family)
    levels = NoisyLevels(lm)
    request = Request(random_genomes(levels, 5), METRICS)
    expected = Evaluator(lm, SEQUENCES, levels, batch_tokens=32)(request)
    small = Evaluator(lm, SEQUENCES, levels, batch_tokens=32, cache_bytes=cache_bytes, reference_bytes=reference_bytes)
    assert small(request) == expected
    assert small(request) == expected, "what is left in a cache is right the second time too"


def test_a_large_cache_decodes_each_level_once(load_model: Callable[[str], Any]) -> None:
    lm = load_model("llama")
    levels = NoisyLevels(lm)
    evaluator = Evaluator(lm, SEQUENCES, levels, batch_tokens=16)
    for seed in range(3):
        evaluator(Request(random_genomes(levels, 6, seed)))
    assert max(levels.reads.values()) == 1


def test_blocks_that_candidates_share_run_once(
    load_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, runs = load_model("llama"), Counter[int]()
    run_block = lm.run_block

    def counted(index: int, *args: Any) -> Tensor:
        runs[index] += 1
        output: Tensor = run_block(index, *args)
        return output

    monkeypatch.setattr(lm, "run_block", counted)
    levels = NoisyLevels(lm)
    per_block = len(lm.units) // len(lm.blocks)
    dense = (DENSE,) * len(lm.units)
    genomes = [
        (*dense[: block * per_block], level, *dense[block * per_block + 1 :])
        for block in range(len(lm.blocks))
        for level in range(N_LEVELS)
    ]
    genomes = [genomes[number] for number in (4, 0, 8, 2, 6, 1, 7, 3, 5)]
    evaluator = Evaluator(lm, SEQUENCES, levels)
    evaluator(Request((dense,)))
    runs.clear()
    evaluator(Request((*genomes, genomes[0])))
    prefixes = {block: {genome[: (block + 1) * per_block] for genome in genomes} for block in range(len(lm.blocks))}
    assert runs == {block: len(distinct) for block, distinct in prefixes.items()} == {0: 4, 1: 7, 2: 9}


def test_the_same_draw_takes_the_same_tokens_and_another_takes_others(load_model: Callable[[str], Any]) -> None:
    lm = load_model("llama")
    levels = NoisyLevels(lm)
    genomes = random_genomes(levels, 2)
    first, second = (Evaluator(lm, SEQUENCES, levels, batch_tokens=n) for n in (2048, 2048))
    one = first(Request(genomes, tokens=32, draw=5, sequences=True))
    first(Request(genomes, tokens=48, draw=1))
    assert first(Request(genomes, tokens=32, draw=5, sequences=True)) == one
    assert second(Request(genomes, tokens=32, draw=5, sequences=True)) == one
    draws = {second(Request(genomes, tokens=32, draw=draw))[0]["kl"]["mean"] for draw in range(8)}
    assert len(draws) > 4, "of 15 possible pairs of sequences"


@pytest.mark.parametrize(("tokens", "used"), [(32, 32), (47, 32), (16, 16), (5, 5), (96, 96), (1000, 96), (None, 96)])
def test_a_subset_is_whole_sequences_or_the_start_of_one(
    load_model: Callable[[str], Any], tokens: int | None, used: int
) -> None:
    lm = load_model("llama")
    levels = NoisyLevels(lm)
    (genome,) = random_genomes(levels, 1)
    (score,) = Evaluator(lm, SEQUENCES, levels)(Request((genome,), tokens=tokens, sequences=True))
    assert score["kl"]["n_tokens"] == used
    length = min(used, 16)
    each = [plainly(lm, levels, genome, sequence[None, :length])["kl"] for sequence in SEQUENCES]
    for value in score["kl"]["sequences"]:
        assert min(abs(value - expected) for expected in each) < 1e-5
    assert len(score["kl"]["sequences"]) == max(1, used // 16)


def test_mean_and_standard_error_are_those_over_sequences(load_model: Callable[[str], Any]) -> None:
    import statistics

    lm = load_model("llama")
    levels = NoisyLevels(lm)
    request = Request(random_genomes(levels, 1), METRICS, sequences=True)
    (score,) = Evaluator(lm, SEQUENCES, levels, batch_tokens=32)(request)
    for measured in score.values():
        values = measured["sequences"]
        assert measured["mean"] == pytest.approx(statistics.fmean(values), rel=1e-12)
        assert measured["stderr"] == pytest.approx(statistics.stdev(values) / math.sqrt(6), rel=1e-12)
    (single,) = Evaluator(lm, SEQUENCES[:1], levels)(request)
    assert single["kl"]["stderr"] is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_candidate_that_is_not_finite_has_no_score_and_harms_no_other(
    load_model: Callable[[str], Any], broken: float
) -> None:
    lm = load_model("llama")
    sound, levels = NoisyLevels(lm), NoisyLevels(lm, broken=broken)
    good = [(*genome[:-1], 1) for genome in random_genomes(levels, 2)]
    bad = (*good[0][:-1], 2)
    scores = Evaluator(lm, SEQUENCES, levels)(Request((good[0], bad, good[1]), METRICS, sequences=True))
    for metric in METRICS:
        assert scores[1][metric]["mean"] is None
        assert scores[1][metric]["stderr"] is None
        assert "sequences" not in scores[1][metric]
    expected = Evaluator(lm, SEQUENCES, sound)(Request(tuple(good), METRICS, sequences=True))
    assert [scores[0], scores[2]] == expected


def test_a_dense_model_that_is_not_finite_is_an_error_that_puts_the_weights_back(
    load_model: Callable[[str], Any],
) -> None:
    from layerwise.stages.models.causal_lm import CausalLM

    lm = CausalLM(copy.deepcopy(load_model("llama").model))
    lm.model.get_input_embeddings().weight.data[int(SEQUENCES[0, 0])] = math.nan
    levels = NoisyLevels(lm)
    before = dense_weights(lm)
    with pytest.raises(NotFinite, match="the dense model gives NaN or Inf"):
        Evaluator(lm, SEQUENCES, levels)(Request(random_genomes(levels, 2)))
    assert [place for place, _ in before] == [place for place, _ in dense_weights(lm)]


def test_units_that_the_levels_do_not_know_stay_dense(load_model: Callable[[str], Any]) -> None:
    lm = load_model("gpt2")
    levels = NoisyLevels(lm, skip=5)
    (genome,) = random_genomes(levels, 1)
    (score,) = Evaluator(lm, SEQUENCES, levels)(Request((genome,)))
    assert score["kl"]["mean"] == pytest.approx(plainly(lm, levels, genome, SEQUENCES)["kl"], abs=1e-5)
