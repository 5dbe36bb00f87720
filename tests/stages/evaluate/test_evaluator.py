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
from layerwise.stages.evaluate.scoring import METRICS, Genome, Request, Score

SEQUENCES = torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(3))
N_LEVELS = 4
"""Of a weight: what the model has, and three others."""


class NoisyLevels:
    """Levels of a network: of every weight the dense one with more noise at each level, of every parent `drop`.

    Args:
        lm: the network.
        skip: units at the beginning that have no levels.
        parents: also let half-blocks and blocks be dropped.
        broken: a value in the last level of the last unit.
    """

    def __init__(self, lm: Any, *, skip: int = 0, parents: bool = True, broken: float | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        found = [*(lm.parents if parents else ()), *lm.units[skip:]]
        self.units = sorted(found, key=lambda unit: (unit.positions[0], not unit.is_parent))
        self.unit_names = tuple(unit.name for unit in self.units)
        self.reads: Counter[tuple[str, int]] = Counter()
        self.table = {}
        for unit in self.units:
            for level in range(1, 1 if unit.is_parent else N_LEVELS):
                weight = lm.weight(unit).detach().clone()
                noise = torch.randn(weight.shape, generator=generator) * weight.std()
                self.table[unit.name, level] = weight + 0.1 * level * noise
        if broken is not None:
            self.table[self.unit_names[-1], N_LEVELS - 1][0, 0] = broken

    def weight(self, unit: str, level: int, device: torch.device | str = "cpu") -> Tensor | None:
        if not level:
            return None
        self.reads[unit, level] += 1
        return self.table[unit, level]

    def drops(self, unit: str, level: int) -> bool:
        return level == 1 and (unit, 1) not in self.table

    def narrows(self, unit: str, level: int) -> dict[str, int]:
        return {}


def random_genomes(levels: NoisyLevels, count: int, seed: int = 0) -> tuple[Genome, ...]:
    """Every second one shares its first units with the one before; the others drop a part of each kind in turn."""
    generator = torch.Generator().manual_seed(seed)
    genomes = torch.randint(N_LEVELS, (count, len(levels.units)), generator=generator)
    parents = [number for number, unit in enumerate(levels.units) if unit.is_parent]
    genomes[:, parents] = (torch.rand((count, len(parents)), generator=generator) < 0.1).long()
    roles = sorted({levels.units[number].role for number in parents})
    for number in range(count):
        if number % 2:
            cut = int(torch.randint(0, len(levels.units), (1,), generator=generator))
            genomes[number, :cut] = genomes[number - 1, :cut]
        elif roles:
            own = [parent for parent in parents if levels.units[parent].role == roles[number // 2 % len(roles)]]
            genomes[number, own[number // 2 % len(own)]] = 1
    return tuple(tuple(genome) for genome in genomes.tolist())


def measured_plainly(dense: Any, model: Any, sequences: Tensor) -> dict[str, float]:
    """Mean KL, NLL, agreement and accuracy over all positions, from log-softmax in float64."""
    with torch.no_grad():
        p, q = (each(input_ids=sequences, use_cache=False).logits.double().log_softmax(-1) for each in (dense, model))
    following = q[:, :-1].gather(-1, sequences[:, 1:, None])
    return {
        "kl": (p.exp() * (p - q)).sum(-1).mean().item(),
        "nll": -following.mean().item(),
        "agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        "accuracy": (q[:, :-1].argmax(-1) == sequences[:, 1:]).double().mean().item(),
    }


@pytest.fixture
def plainly(rebuilt: Callable[..., Any]) -> Callable[..., dict[str, float]]:
    """The figures of a genome: of a copy of the whole model with its weights written into it."""

    def run(lm: Any, levels: NoisyLevels, genome: Genome, sequences: Tensor) -> dict[str, float]:
        chosen = {unit.name: level for unit, level in zip(levels.units, genome, strict=True) if level}
        weights = {name: levels.table[name, level] for name, level in chosen.items() if (name, level) in levels.table}
        changed = rebuilt(lm.model, weights, [name for name in chosen if name not in weights])
        return measured_plainly(lm.model, changed, sequences)

    return run


def means(scores: Sequence[Score]) -> list[dict[str, float | None]]:
    return [{metric: measured["mean"] for metric, measured in score.items()} for score in scores]


def everything(lm: Any) -> dict[str, tuple[int, Tensor]]:
    """Place and content of every parameter."""
    return {name: (tensor.data_ptr(), tensor.detach().clone()) for name, tensor in lm.parameters.items()}


def assert_untouched(lm: Any, before: dict[str, tuple[int, Tensor]]) -> None:
    for name, tensor in lm.parameters.items():
        place, content = before[name]
        assert tensor.data_ptr() == place, name
        assert torch.equal(tensor, content), name


def test_a_score_is_that_of_the_plain_way(
    load_model: Callable[[str], Any], any_family: str, plainly: Callable[..., dict[str, float]]
) -> None:
    lm = load_model(any_family)
    levels, before = NoisyLevels(lm), everything(lm)
    genomes = random_genomes(levels, 6)
    dropped = {unit.role for genome in genomes for unit, level in zip(levels.units, genome, strict=True) if level == 1}
    assert dropped >= {unit.role for unit in lm.parents}, "every kind of part is left out in one of them"
    scores = Evaluator(lm, SEQUENCES, levels, batch_tokens=48)(Request(genomes, METRICS))
    for genome, score in zip(genomes, scores, strict=True):
        expected = plainly(lm, levels, genome, SEQUENCES)
        assert expected["kl"] > 1e-3, "the test would see nothing"
        assert score["agreement"]["mean"] == expected["agreement"]
        for metric in ("kl", "nll"):
            assert score[metric]["mean"] == pytest.approx(expected[metric], abs=1e-5)
            assert score[metric]["n_tokens"] == SEQUENCES.numel()
    assert_untouched(lm, before)


def test_each_kind_of_unit_alone_counts_as_it_does_in_the_whole_model(
    load_model: Callable[[str], Any], any_family: str, plainly: Callable[..., dict[str, float]]
) -> None:
    """One unit of every kind, the embedding and the head among them: in company a small harm could hide."""
    lm = load_model(any_family)
    levels = NoisyLevels(lm)
    kinds = {unit.kind: number for number, unit in enumerate(levels.units) if unit.block in (None, 1)}
    dense = (0,) * len(levels.units)
    genomes = [
        (*dense[:number], 1 if levels.units[number].is_parent else 3, *dense[number + 1 :]) for number in kinds.values()
    ]
    for genome, score in zip(genomes, Evaluator(lm, SEQUENCES, levels)(Request(tuple(genomes))), strict=True):
        assert score["kl"]["mean"] == pytest.approx(plainly(lm, levels, genome, SEQUENCES)["kl"], abs=1e-5)
        assert score["kl"]["mean"] > 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "olmoe"])
def test_a_dropped_block_is_one_that_is_not_in_the_list(load_model: Callable[[str], Any], family: str) -> None:
    lm = load_model(family)
    levels = NoisyLevels(lm)
    for gone in ([0], [1], [2], [0, 2], [0, 1, 2]):
        names = {f"model.layers.{block}" for block in gone}
        genome = tuple(int(unit.name in names) for unit in levels.units)
        shorter = copy.deepcopy(lm.model)
        for block in reversed(gone):
            del shorter.model.layers[block]
        shorter.config.num_hidden_layers = len(shorter.model.layers)
        (score,) = Evaluator(lm, SEQUENCES, levels)(Request((genome,), METRICS))
        expected = measured_plainly(lm.model, shorter, SEQUENCES)
        for metric in METRICS:
            assert score[metric]["mean"] == pytest.approx(expected[metric], abs=1e-5)


def test_what_stands_inside_a_dropped_part_makes_no_difference(load_model: Callable[[str], Any]) -> None:
    lm = load_model("mixtral")
    levels = NoisyLevels(lm)
    gone = {"model.layers.1", "model.layers.2.mlp"}
    parents = tuple(int(unit.name in gone) for unit in levels.units)
    inside = [unit.parent in {*gone, "model.layers.1.self_attn", "model.layers.1.mlp"} for unit in levels.units]
    filled = tuple(1 if absent else level for absent, level in zip(inside, parents, strict=True))
    assert sum(filled) > 20
    bare, full = Evaluator(lm, SEQUENCES, levels)(Request((parents, filled), METRICS, sequences=True))
    assert bare == full


def test_the_dense_model_differs_from_itself_by_exactly_nothing(
    load_model: Callable[[str], Any], any_family: str
) -> None:
    lm = load_model(any_family)
    levels = NoisyLevels(lm)
    dense, other = (0,) * len(levels.units), random_genomes(levels, 1)[0]
    scores = Evaluator(lm, SEQUENCES, levels)(Request((other, dense), METRICS))
    assert scores[1]["kl"]["mean"] == 0.0
    assert scores[1]["kl"]["stderr"] == 0.0
    assert scores[1]["agreement"]["mean"] == 1.0
    assert scores[1]["nll"]["mean"] == pytest.approx(measured_plainly(lm.model, lm.model, SEQUENCES)["nll"], abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])  # plain, tied, experts
@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(5)), cut=st.integers(0, 5), batch_tokens=st.sampled_from([1, 32, 10**6]))
def test_neither_company_nor_order_nor_batch_changes_a_bit(
    load_model: Callable[[str], Any], family: str, order: list[int], cut: int, batch_tokens: int
) -> None:
    lm = load_model(family)
    levels = NoisyLevels(lm)
    genomes = random_genomes(levels, 5)
    whole, evaluator = (Evaluator(lm, SEQUENCES[:3], levels, batch_tokens=batch_tokens) for _ in range(2))
    scores = whole(Request(genomes, METRICS, sequences=True))
    for part in (order[:cut], order[cut:]):
        request = Request(tuple(genomes[number] for number in part), METRICS, sequences=True)
        assert evaluator(request) == [scores[number] for number in part]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
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
    levels = NoisyLevels(lm, skip=1, parents=False)  # without the embedding, and up to the head
    per_block = 7
    dense = (0,) * len(levels.units)
    genomes = [
        (*dense[: block * per_block], level, *dense[block * per_block + 1 :])
        for block in range(len(lm.blocks))
        for level in range(1, N_LEVELS)
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
    load_model: Callable[[str], Any], plainly: Callable[..., dict[str, float]], tokens: int | None, used: int
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
    bad = (*good[0][:-1], N_LEVELS - 1)
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
    places = [tensor.data_ptr() for tensor in lm.parameters.values()]
    with pytest.raises(NotFinite, match="the dense model gives NaN or Inf"):
        Evaluator(lm, SEQUENCES, levels)(Request(random_genomes(levels, 2)))
    assert [tensor.data_ptr() for tensor in lm.parameters.values()] == places


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_failure_in_the_middle_of_a_block_puts_everything_back(
    load_model: Callable[[str], Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_model(family)
    levels, before = NoisyLevels(lm), everything(lm)
    (genome,) = random_genomes(levels, 1)
    expected = Evaluator(lm, SEQUENCES, levels)(Request((genome,)))

    def broken(index: int, *args: Any) -> Tensor:
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(lm, "run_block", broken)
        Evaluator(lm, SEQUENCES, levels, reference=lm)(Request((genome,)))
    assert_untouched(lm, before)
    assert Evaluator(lm, SEQUENCES, levels)(Request((genome,))) == expected


def test_levels_of_a_model_that_was_changed_before_are_compared_with_the_model_that_was_not(
    load_model: Callable[[str], Any], rebuilt: Callable[..., Any]
) -> None:
    from layerwise.stages.models.causal_lm import CausalLM

    dense = load_model("gpt2")
    pruned = CausalLM(copy.deepcopy(dense.model))
    for unit in pruned.units:
        weight = pruned.weight(unit)
        pruned.overwrite(unit, weight * (weight.abs() > 0.1))
    pruned.leave_out(["transformer.h.1.mlp"])
    levels = NoisyLevels(pruned)
    genomes = ((0,) * len(levels.units), *random_genomes(levels, 3))
    scores = Evaluator(pruned, SEQUENCES, levels, reference=dense)(Request(genomes, METRICS))
    kept = {unit.name: weight * (weight.abs() > 0.1) for unit in dense.units for weight in [dense.weight(unit)]}
    for genome, score in zip(genomes, scores, strict=True):
        chosen = {unit.name: level for unit, level in zip(levels.units, genome, strict=True) if level}
        weights = kept | {name: levels.table[key] for key in levels.table if chosen.get(name := key[0]) == key[1]}
        dropped = [name for name in chosen if name not in weights]
        expected = measured_plainly(
            dense.model, rebuilt(dense.model, weights, [*dropped, "transformer.h.1.mlp"]), SEQUENCES
        )
        assert expected["kl"] > 0.01
        for metric in METRICS:
            assert score[metric]["mean"] == pytest.approx(expected[metric], abs=1e-5)


def test_units_that_the_levels_do_not_know_stay_dense(
    load_model: Callable[[str], Any], plainly: Callable[..., dict[str, float]]
) -> None:
    lm = load_model("gpt2")
    levels = NoisyLevels(lm, skip=5, parents=False)
    (genome,) = random_genomes(levels, 1)
    (score,) = Evaluator(lm, SEQUENCES, levels)(Request((genome,)))
    assert score["kl"]["mean"] == pytest.approx(plainly(lm, levels, genome, SEQUENCES)["kl"], abs=1e-5)
