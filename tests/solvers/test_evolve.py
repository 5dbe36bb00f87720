import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.solvers import PRESETS, Evolve, Problem, Stop, any_feasible, depth_generations, ilp, uniform

SMALL = {"generations": 5, "offspring": 6, "survivors": (3, 1), "tokens": (64, 256), "initially_generated": 4}


def layers(sizes, levels, average, **more):
    """Units of these sizes with `levels` bits, and a budget of `average` bits per weight."""
    costs = np.array(sizes, dtype=float)[:, None] * np.array(levels, dtype=float)
    return Problem(costs={"bits": costs}, budgets={"bits": average * sum(sizes)}, **more)


def measured(problem, choice, ask=None):
    """A stand-in for a model: additive losses, which rounds on a part of the data see with noise of their own."""
    loss = problem.losses[np.arange(len(choice)), choice].sum()
    if ask is None or ask.tokens is None:
        return float(loss)
    noise = np.random.default_rng([ask.draw, *choice]).normal()
    return float(loss * (1 + noise / math.sqrt(ask.tokens)))


def run(search, problem, evaluate=measured):
    asked = []
    while not search.done:
        ask = search.ask()
        asked.append(ask)
        search.tell([evaluate(problem, choice, ask) for choice in ask.candidates])
    return asked


def course(asked):
    return [(a.generation, a.round, a.tokens, a.draw, [c.tolist() for c in a.candidates]) for a in asked]


def with_losses(problem, seed):
    rng = np.random.default_rng(seed)
    n_units, n_levels = problem.shape
    losses = rng.lognormal(0, 1, (n_units, 1)) * 3.0 ** -np.arange(n_levels) * rng.uniform(0.6, 1.4, problem.shape)
    return replace(problem, losses=losses)


@pytest.mark.parametrize(
    "problem",
    [
        layers([1] * 10, [2, 3, 4], 3.0),
        layers([1] * 10, [2, 3, 4, 6, 8], 3.3),
        layers([1, 1, 3, 3, 7, 2], [2, 3, 4, 8], 3.5, groups=[[0, 1], [3, 4]]),
        Problem(
            costs={"bits": np.arange(24.0).reshape(6, 4), "ms": np.arange(24.0).reshape(6, 4)[::-1, ::-1]},
            budgets={"bits": 70.0, "ms": 70.0},
        ),
    ],
    ids=["equal", "uneven levels", "tied units of unequal size", "two budgets that pull apart"],
)
def test_no_candidate_leaves_the_budgets_and_none_is_asked_twice_in_a_round(problem):
    problem = with_losses(problem, seed=0)
    asked = run(Evolve(problem, **{**SMALL, "generations": 30, "offspring": 12}), problem)
    for ask in asked:
        assert all(problem.feasible(choice) for choice in ask.candidates)
        assert len({choice.tobytes() for choice in ask.candidates}) == len(ask.candidates)
    assert len({choice.tobytes() for ask in asked for choice in ask.candidates}) > 20  # it does move


def test_with_equal_layers_and_even_levels_each_switch_moves_one_unit_up_and_another_down():
    problem = with_losses(layers([1] * 12, [2, 3, 4, 5, 6], 4.0), seed=0)
    counts = {}
    for choice in Evolve(problem, offspring=200, generations=1, max_switches=1).ask().candidates:
        steps = choice - 2  # the parent is uniform 4-bit
        assert sorted(steps[steps != 0].tolist()) == [-1, 1]
    for choice in Evolve(problem, offspring=2000, generations=1, max_switches=3).ask().candidates:
        steps = choice - 2
        assert steps.sum() == 0
        counts[int(np.abs(steps).sum() // 2)] = counts.get(int(np.abs(steps).sum() // 2), 0) + 1
    assert set(counts) == {1, 2, 3}


def test_big_steps_that_no_single_step_down_pays_for_are_taken():
    problem = layers([1] * 6, [2, 3, 8], 3.0)
    dearest = replace(problem, losses=np.array([[1.0, 1.0, 0.0]] * 1 + [[1.0, 1.0, 1.0]] * 5))
    search = Evolve(dearest, seed=0, generations=20, offspring=8, survivors=(1,), tokens=(None,))
    run(search, dearest)
    assert search.best.choice[0] == 2


@pytest.mark.parametrize("sizes", [[1] * 8, [1, 1, 3, 3, 4, 1, 1, 3]], ids=["equal", "unequal"])
def test_the_optimum_of_an_additive_problem_is_found(sizes, milp_optimum):
    for seed in range(5):
        problem = with_losses(layers(sizes, [2, 3, 4, 5], 3.25), seed)
        search = Evolve(problem, seed=seed, generations=60, offspring=24, survivors=(1,), tokens=(None,))
        run(search, problem)
        assert search.best.loss == pytest.approx(milp_optimum(problem), rel=1e-9)


def test_the_best_five_of_ten_blocks_to_drop_are_found_although_blocks_interact():
    rng = np.random.default_rng(0)
    harm, together = rng.random(10), rng.normal(0, 0.3, (10, 10))
    problem = Problem(costs={"blocks": np.tile([0.0, 1.0], (10, 1))}, budgets={"blocks": 5})

    def loss(_, choice, ask=None):
        dropped = (choice == 0).astype(float)
        return float(harm @ dropped + dropped @ together @ dropped)

    every = [np.isin(np.arange(10), kept).astype(int) for kept in itertools.combinations(range(10), 5)]
    best = min(loss(problem, choice) for choice in every)
    for seed in range(5):
        search = Evolve(
            problem, seed=seed, preset="evopress-depth", generations=depth_generations(10, 5), total_tokens=2048
        )
        run(search, problem, loss)
        assert search.best.loss == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("n_units", "seed"), [(56, 0), (56, 1), pytest.param(224, 0, marks=pytest.mark.slow)], ids=str)
def test_the_published_number_of_evaluations_comes_within_one_percent_of_an_additive_optimum(n_units, seed):
    rng = np.random.default_rng(seed)
    bits = np.tile(np.arange(2.0, 8.0), (n_units, 1))
    losses = rng.lognormal(0, 1, n_units)[:, None] * 4.0**-bits * rng.uniform(0.7, 1.3, bits.shape)
    problem = Problem(costs={"bits": bits}, budgets={"bits": 4.0 * n_units}, losses=losses)
    search = Evolve(problem, seed=seed, preset="evopress-quantization", total_tokens=2048)
    while not search.done:
        search.tell(losses[np.arange(n_units), np.array(search.ask().candidates)].sum(axis=1))
    assert search.evaluations <= 150 * (128 + 16 + 4 + 1) + 64
    assert search.best.loss <= 1.01 * ilp(problem).loss


def test_the_best_eight_of_sixteen_blocks_to_drop_are_found_from_nearly_every_seed():
    """Harm by block, interactions of every pair, and a penalty for neighbours: another landscape for each seed."""
    n_blocks, n_dropped = 16, 8
    problem = Problem(costs={"blocks": np.tile([0.0, 1.0], (n_blocks, 1))}, budgets={"blocks": n_dropped})
    every = np.array(
        [np.isin(np.arange(n_blocks), kept) for kept in itertools.combinations(range(n_blocks), n_blocks - n_dropped)]
    )
    found = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        harm, together = rng.random(n_blocks), rng.normal(0, 0.3, (n_blocks, n_blocks))

        def losses(choices, harm=harm, together=together):
            dropped = (np.asarray(choices) == 0).astype(float)
            neighbours = (dropped[:, 1:] * dropped[:, :-1]).sum(axis=1)
            return dropped @ harm + np.einsum("ci,ij,cj->c", dropped, together, dropped) + 0.5 * neighbours

        search = Evolve(
            problem,
            seed=seed,
            preset="evopress-depth",
            generations=depth_generations(n_blocks, n_dropped),
            total_tokens=2048,
        )
        while not search.done:
            search.tell(losses(search.ask().candidates))
        found += search.best.loss <= losses(every).min() + 1e-12
    assert len(every) == 12_870
    assert found >= 18


def test_what_was_measured_on_all_of_the_data_is_not_asked_again():
    problem = with_losses(layers([1] * 8, [2, 3, 4], 3.0), seed=0)
    asked = run(Evolve(problem, **{**SMALL, "generations": 20, "tokens": (64, None)}), problem)
    complete, repeated = set(), 0
    for ask in asked:
        if ask.tokens is not None:
            repeated += sum(choice.tobytes() in complete for choice in ask.candidates)
        complete.update(choice.tobytes() for choice in ask.candidates if ask.tokens is None)
    assert len(complete) > 20
    assert repeated == 0


@pytest.mark.parametrize("tokens", [(64, 256), (64, None), (None, None)])
def test_no_search_ends_above_its_start_on_all_the_data(tokens):
    for seed in range(6):
        problem = with_losses(layers([1, 2, 3, 4, 5, 6], [2, 3, 4, 6], 3.2), seed)
        for start in (uniform(problem), ilp(problem)):  # the second leaves nothing to gain and all to lose
            search = Evolve(problem, start, seed=seed, **{**SMALL, "tokens": tokens})
            run(search, problem)
            assert search.best.loss == measured(problem, search.best.choice)
            assert search.best.loss <= measured(problem, start.choice)


def test_the_parent_joins_the_last_round_and_only_a_better_one_replaces_it():
    problem = layers([1] * 6, [2, 3, 4], 3.0)
    start = np.ones(6, dtype=np.int64)
    search = Evolve(problem, start, **{**SMALL, "survivors": (3, 2, 1), "tokens": (8, 16, None)})
    parents = []
    while not search.done:
        ask = search.ask()
        joined = any(np.array_equal(choice, search.best.choice) for choice in ask.candidates)
        assert joined == (ask.round == 2)
        assert len(ask.candidates) == [6, 3, 3][ask.round]
        search.tell([1.0] * len(ask.candidates))
        parents.append(search.best.choice.tolist())
    assert all(parent == start.tolist() for parent in parents)


def test_each_round_keeps_the_candidates_with_the_lowest_losses():
    problem = with_losses(layers([1] * 8, [2, 3, 4], 3.0), seed=0)
    search = Evolve(problem, **SMALL)
    first = search.ask()
    search.tell([5.0, 1.0, math.nan, 2.0, 4.0, 3.0])
    kept = search.ask().candidates[:-1]
    assert [choice.tolist() for choice in kept] == [first.candidates[index].tolist() for index in (1, 3, 5)]


def test_candidates_that_failed_never_become_the_parent():
    problem = with_losses(layers([1, 2, 3, 4, 5, 6], [2, 3, 4, 6], 3.2), seed=0)

    def often_broken(problem, choice, ask=None):
        failure = [math.nan, math.inf, -math.inf][int(choice.sum()) % 3]
        return failure if choice[0] == 2 or choice[1] == 0 else measured(problem, choice, ask)

    search = Evolve(problem, seed=1, **SMALL)
    run(search, problem, often_broken)
    assert math.isfinite(often_broken(problem, search.best.choice))
    assert search.best.loss == measured(problem, search.best.choice)


def test_when_everything_fails_the_search_ends_with_its_start_and_no_loss():
    problem = layers([1] * 6, [2, 3, 4], 3.0)
    search = Evolve(problem, **SMALL)
    run(search, problem, lambda *_: math.nan)
    assert search.best.choice.tolist() == [1] * 6
    assert search.best.loss is None


def test_candidates_of_a_round_share_their_tokens_and_rounds_do_not():
    problem = with_losses(layers([1] * 8, [2, 3, 4], 3.5), seed=0)
    asked = run(Evolve(problem, **SMALL), problem)
    assert len({ask.draw for ask in asked}) == len(asked)
    assert [(ask.generation, ask.round, ask.tokens) for ask in asked[:4]] == [
        (0, 0, 64), (1, 0, 64), (1, 1, 256), (2, 0, 64),
    ]  # fmt: skip
    assert asked[-1].tokens is None


def test_the_seed_decides_the_course():
    problem = with_losses(layers([1] * 8, [2, 3, 4], 3.5), seed=0)
    first, again, other = (course(run(Evolve(problem, seed=seed, **SMALL), problem)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    stop=st.integers(0, 12),
    between=st.booleans(),
    average=st.sampled_from([2.0, 3.0, 3.3]),
    tokens=st.sampled_from([(64, 256), (64, None)]),
    patience=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 100),
)
def test_stopping_saving_loading_and_going_on_is_never_having_stopped(stop, between, average, tokens, patience, seed):
    problem = with_losses(layers([1, 1, 2, 3, 3], [2, 3, 4, 6], average, groups=[[0, 1]]), seed)

    def fresh():
        return Evolve(problem, seed=seed, **{**SMALL, "tokens": tokens}, stop=Stop(patience=patience))

    def broken_at_times(problem, choice, ask):
        return math.nan if (ask.draw + int(choice.sum())) % 5 == 0 else measured(problem, choice, ask)

    unbroken = fresh()
    expected = course(run(unbroken, problem, broken_at_times))

    stopped, asked = fresh(), []
    while not stopped.done and len(asked) < stop:
        ask = stopped.ask()
        asked.append(ask)
        stopped.tell([broken_at_times(problem, choice, ask) for choice in ask.candidates])
    if between and not stopped.done:
        stopped.ask()
    resumed = fresh()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict(), allow_nan=False)))
    assert course([*asked, *run(resumed, problem, broken_at_times)]) == expected
    assert resumed.best.choice.tolist() == unbroken.best.choice.tolist()
    assert (resumed.best.loss, resumed.evaluations, resumed.evaluated_tokens) == (
        unbroken.best.loss, unbroken.evaluations, unbroken.evaluated_tokens,
    )  # fmt: skip
    assert resumed.state_dict() == unbroken.state_dict()


def test_a_state_is_not_continued_by_another_search():
    problem = layers([1] * 6, [2, 3, 4], 3.0)
    state = Evolve(problem, seed=1, **SMALL).state_dict()
    others = [
        Evolve(problem, seed=2, **SMALL),
        Evolve(problem, seed=1, **{**SMALL, "offspring": 7}),
        Evolve(layers([1] * 6, [2, 3, 4], 3.5), seed=1, **SMALL),
        Evolve(problem, [1] * 6, seed=1, **SMALL),
    ]
    for other in others:
        with pytest.raises(UsageError, match="another problem, start or settings"):
            other.load_state_dict(state)


def test_asking_twice_asks_the_same_and_changes_nothing():
    search = Evolve(layers([1] * 6, [2, 3, 4], 3.0), **SMALL)
    before = search.state_dict()
    assert course([search.ask()]) == course([search.ask()])
    assert search.state_dict() == before


def test_rounds_that_would_use_all_the_data_ask_for_all_and_need_no_closing_round():
    problem = with_losses(layers([1] * 8, [2, 3, 4], 3.5), seed=0)
    search = Evolve(problem, **SMALL, total_tokens=256)
    asked = run(search, problem)
    assert {(ask.round, ask.tokens) for ask in asked} == {(0, 64), (1, None)}
    assert asked[-1].generation == SMALL["generations"]
    assert search.evaluated_tokens == sum(len(ask.candidates) * (ask.tokens or 256) for ask in asked)
    assert search.evaluations == sum(len(ask.candidates) for ask in asked)


def test_the_closing_round_compares_the_start_with_the_last_parents():
    problem = with_losses(layers([1] * 12, [2, 3, 4, 5], 3.0), seed=0)
    search = Evolve(problem, **{**SMALL, "generations": 30})
    closing = run(search, problem)[-1]
    candidates = [choice.tolist() for choice in closing.candidates]
    assert len(candidates) == 5
    assert candidates[-1] == [1] * 12
    assert search.best.loss == min(measured(problem, choice) for choice in closing.candidates)


def test_patience_stops_a_search_that_no_longer_improves():
    problem = layers([1] * 8, [2, 3, 4], 3.0)
    asked = run(Evolve(problem, **{**SMALL, "generations": 100}, stop=Stop(patience=3)), problem, lambda *_: 1.0)
    assert max(ask.generation for ask in asked) == 3


def test_max_tokens_is_never_exceeded_and_used_almost_up():
    problem = with_losses(layers([1] * 8, [2, 3, 4], 3.5), seed=0)
    for limit in (20_000, 33_333):
        search = Evolve(problem, **{**SMALL, "generations": 1000}, total_tokens=1000, stop=Stop(tokens=limit))
        run(search, problem)
        generation = 6 * 64 + 4 * 256 + 5 * 1000
        assert limit - generation - 5 * 1000 < search.evaluated_tokens <= limit


def test_a_budget_between_levels_starts_from_the_best_of_random_fills():
    problem = with_losses(layers([1] * 8, [2, 3, 4], 3.25), seed=0)
    search = Evolve(problem, **{**SMALL, "initially_generated": 5}, initial_tokens=32)
    ask = search.ask()
    assert (ask.generation, ask.tokens, len(ask.candidates)) == (0, 32, 4)  # two of the five were equal
    assert all(problem.cost(choice)["bits"] == 26 for choice in ask.candidates)
    search.tell([3.0, 1.0, 2.0, math.nan])
    assert search.best.choice.tolist() == ask.candidates[1].tolist()
    assert Evolve(problem, ask.candidates[0], **SMALL).ask().generation == 1  # a given start needs no fills


def test_where_no_common_level_fits_the_search_starts_from_a_mixture():
    crossed = Problem(costs={"ms": [[1.0, 4.0], [4.0, 1.5]]}, budgets={"ms": 3.0})
    assert Evolve(crossed, **SMALL).best.choice.tolist() == any_feasible(crossed).tolist() == [0, 1]


def test_a_problem_with_one_allocation_is_measured_once():
    problem = layers([1, 1], [2, 3], 2.0)
    asked = run(Evolve(problem, **SMALL), problem, lambda *_: 0.5)
    assert [[choice.tolist() for choice in ask.candidates] for ask in asked] == [[[0, 0]]]


def test_an_impossible_budget_or_start_is_refused():
    problem = layers([1] * 4, [2, 3, 4], 3.0, groups=[[0, 1]])
    with pytest.raises(InfeasibleBudget):
        Evolve(layers([1] * 4, [2, 3, 4], 1.5))
    with pytest.raises(UsageError, match="13 bits of 12"):
        Evolve(problem, [1, 1, 1, 2])
    with pytest.raises(UsageError, match="tied"):
        Evolve(problem, [0, 1, 1, 1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"survivors": (4, 1)},
        {"survivors": (16, 4, 2)},
        {"survivors": (), "tokens": ()},
        {"generations": -1},
        {"offspring": 0},
        {"seed": -1},
        {"tokens": (0, 1, 2)},
        {"stop": Stop(tokens=1000)},
        {"preset": "evopres-quantisation"},
        {"preset": "evopress-depth"},
    ],
)
def test_settings_that_do_not_fit_together_are_refused(wrong):
    with pytest.raises(UsageError):
        Evolve(layers([1] * 4, [2, 3, 4], 3.0), **wrong)


def test_telling_the_wrong_number_of_losses_or_going_on_after_the_end_is_refused():
    problem = layers([1] * 6, [2, 3, 4], 3.0)
    search = Evolve(problem, **SMALL)
    with pytest.raises(UsageError, match="2 losses told for 6"):
        search.tell([1.0, 2.0])
    run(search, problem, lambda *_: 1.0)
    with pytest.raises(UsageError, match="done"):
        search.ask()
    with pytest.raises(UsageError, match="done"):
        search.tell([])


def test_every_preset_runs_as_published():
    problem = layers([1] * 40, [2, 3, 4, 5, 6], 4.0)
    for name, preset in PRESETS.items():
        search = Evolve(problem, preset=name, generations=1)
        sizes, tokens = [], []
        while not search.done:
            ask = search.ask()
            sizes.append(len(ask.candidates))
            tokens.append(ask.tokens)
            search.tell([1.0] * len(ask.candidates))
        survivors = list(preset.survivors[:-1])
        assert sizes == [preset.offspring, *survivors[:-1], survivors[-1] + 1, 1]
        assert tokens == [*preset.tokens, None]


def test_depth_pruning_gets_as_many_generations_as_in_the_papers_script():
    assert depth_generations(n_blocks=32, n_dropped=12) == 160
