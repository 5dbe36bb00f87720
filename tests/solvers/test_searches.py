"""What every search must do, whoever wrote it: each test runs over the whole table `SEARCHES`."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.solvers import SEARCHES, Problem, Stop, greedy

SMALL = {
    "evolve": {
        "generations": 6, "offspring": 6, "survivors": (3, 1), "tokens": (64, 256), "initially_generated": 4,
    },
    "genetic": {"population": 6, "tokens_per_ask": 64, "stop": Stop(evaluations=80)},
    "anneal": {"batch": 3, "tokens_per_ask": 64, "stop": Stop(evaluations=50)},
    "random": {"batch": 4, "tokens_per_ask": 64, "stop": Stop(evaluations=50)},
    "tpe": {"batch": 3, "tokens_per_ask": 64, "stop": Stop(evaluations=50), "random_trials": 8},
    "nsga2": {"population": 4, "tokens_per_ask": 64, "stop": Stop(evaluations=40)},
}  # fmt: skip
"""Settings for a short search on samples of the data. A search without an entry runs with its own."""

ON_ALL_DATA = {
    "evolve": {"tokens": (None, None), "initial_tokens": None},
    **{name: {"tokens_per_ask": None} for name in ("genetic", "anneal", "random", "tpe", "nsga2")},
}
"""What changes in them so that every ask sees all of the data."""


@pytest.fixture(params=SEARCHES)
def make(request):
    """Makes a small search of each kind in turn, from a problem, a start and a seed."""
    name = request.param

    def search(problem, start=None, seed=0, *, whole=False, **more):
        settings = {**SMALL.get(name, {}), **(ON_ALL_DATA.get(name, {}) if whole else {}), **more}
        return SEARCHES[name](problem, start, seed, **settings)

    return search


@pytest.fixture
def unequal_layers():
    """Layers of three sizes, two of them tied, under a budget that no common level meets exactly."""
    rng = np.random.default_rng(0)
    bits = np.array([1.0, 1, 2, 3, 3, 2])[:, None] * np.array([2.0, 3, 4, 6])
    losses = rng.lognormal(0, 1, (6, 1)) * 3.0 ** -np.arange(4) * rng.uniform(0.6, 1.4, (6, 4))
    return Problem(costs={"bits": bits}, budgets={"bits": 3.3 * 12}, losses=losses, groups=[[0, 1]])


@pytest.fixture
def two_budgets():
    """Costs that pull apart: what is cheap in bits is dear in ms. One unit lacks a level."""
    rng = np.random.default_rng(1)
    bits, losses = np.cumsum(rng.uniform(1, 3, (8, 4)), axis=1), rng.uniform(0, 1, (8, 4))
    bits[3, 1] = np.inf
    ms = np.cumsum(rng.uniform(1, 3, (8, 4)), axis=1)[:, ::-1]
    return Problem(costs={"bits": bits, "ms": ms}, budgets={"bits": 44.0, "ms": 46.0}, losses=losses)


@pytest.fixture
def nested_blocks():
    """Three blocks with an attention and an MLP inside, these with layers; two levels of an MLP remove its second."""
    rng = np.random.default_rng(2)
    costs, losses, nested = [], [], {}
    for block in range(0, 18, 6):
        switches = np.array([[0.0, 0.0, np.inf], [0.0, 0.0, np.inf], [0.0, 0.0, 0.5]])  # block, attention, MLP
        costs += [*switches, *np.cumsum(rng.uniform(1, 3, (3, 3)), axis=1)[:, ::-1]]
        losses += [*rng.uniform([0, 1, 1], [0.1, 3, 3], (3, 3)), *np.cumsum(rng.uniform(0, 1, (3, 3)), axis=1)]
        nested |= {
            (block, 1): [block + 1, block + 2],
            (block + 1, 1): [block + 3],
            (block + 2, 1): [block + 4, block + 5],
            (block + 2, 2): [block + 5],
        }
    return Problem(costs={"bits": costs}, budgets={"bits": 24.0}, losses=losses, nested=nested)


def measured(problem, choice, ask=None):
    """A stand-in for a model: additive losses, which samples of the data see with noise of their own."""
    loss = problem.loss(choice)
    if ask is None or ask.tokens is None:
        return loss
    noise = np.random.default_rng([ask.draw, *choice]).normal()
    return loss * (1 + noise / math.sqrt(ask.tokens))


def failing_at_times(problem, choice, ask):
    failures = [math.nan, math.inf, -math.inf]
    return failures[ask.draw % 3] if (ask.draw + int(choice.sum())) % 4 == 0 else measured(problem, choice, ask)


def step(search, problem, evaluate):
    ask = search.ask()
    search.tell([evaluate(problem, choice, ask) for choice in ask.candidates])
    return ask


def run(search, problem, evaluate=measured):
    asked = []
    while not search.done:
        asked.append(step(search, problem, evaluate))
    return asked


def course(asked):
    return [(a.generation, a.round, a.tokens, a.draw, [c.tolist() for c in a.candidates]) for a in asked]


def through_json(state):
    return json.loads(json.dumps(state, allow_nan=False))


@pytest.mark.parametrize("case", ["unequal_layers", "two_budgets"])
@pytest.mark.parametrize("whole", [False, True])
def test_no_candidate_leaves_the_budgets_and_none_is_asked_twice_in_a_round(make, case, whole, request):
    problem = request.getfixturevalue(case)
    search = make(problem, whole=whole)
    asked = []
    while not search.done:
        asked.append(step(search, problem, measured))
        assert problem.feasible(search.best.choice)
    for ask in asked:
        assert all(problem.feasible(choice) for choice in ask.candidates)
        assert len({choice.tobytes() for choice in ask.candidates}) == len(ask.candidates) > 0
    assert len({choice.tobytes() for ask in asked for choice in ask.candidates}) > 10  # it does move


@pytest.mark.parametrize("whole", [False, True])
def test_of_allocations_that_differ_in_absent_units_one_is_asked_for(make, nested_blocks, whole):
    start = nested_blocks.expand(np.array([1, 0, 2, 2, 2, 2, *[0, 1, 2, 2, 2, 2] * 2]))
    search = make(nested_blocks, start, whole=whole)
    assert search.best.choice.tolist() == [1, 0, 0, 0, 0, 0, *[0, 1, 2, 0, 2, 0] * 2]
    asked = run(search, nested_blocks)
    for ask in asked:
        models = {tuple(nested_blocks.named(choice).items()) for choice in ask.candidates}
        assert len(models) == len(ask.candidates)
    for choice in [search.best.choice, *(choice for ask in asked for choice in ask.candidates)]:
        assert nested_blocks.canonical(choice).tolist() == choice.tolist()
    present = np.array([nested_blocks.present(choice) for ask in asked for choice in ask.candidates])
    assert (present.any(axis=0) & ~present.all(axis=0)).sum() > 6  # units go and come back


@pytest.mark.parametrize("name", ["random", "tpe", "nsga2"])
def test_no_model_is_measured_twice_on_all_of_the_data(name, nested_blocks):
    search = SEARCHES[name](nested_blocks, **{**SMALL[name], **ON_ALL_DATA[name]})
    models = [choice.tobytes() for ask in run(search, nested_blocks) for choice in ask.candidates]
    assert len(set(models)) == len(models)


@pytest.mark.parametrize("name", SEARCHES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_candidates_keep_the_limits_however_deep_units_are_nested(name, problems, sums, brute_force, data):
    drawn = data.draw(problems(max_units=6, max_levels=3, nested=3, n_budgets=data.draw(st.integers(1, 2))))
    optimum = brute_force(drawn)
    assume(optimum is not None)
    few = {"generations": 3} if name == "evolve" else {"stop": Stop(evaluations=16)}
    search = SEARCHES[name](drawn, **{**SMALL.get(name, {}), **ON_ALL_DATA.get(name, {}), **few})
    losses = []
    while not search.done:
        true = [sums(drawn, choice.tolist()) for choice in search.ask().candidates]
        assert all(entry[r] <= limit for entry in true for r, limit in drawn.limits.items())
        losses += [entry["loss"] for entry in true]
        search.tell([entry["loss"] for entry in true])
    assert search.best.loss == min(losses) >= optimum - 1e-9
    assert sums(drawn, search.best.choice.tolist())["loss"] == pytest.approx(search.best.loss)


@pytest.mark.parametrize("whole", [False, True])
def test_the_best_is_the_best_of_what_was_measured_on_all_of_the_data(make, unequal_layers, whole):
    search = make(unequal_layers, whole=whole, seed=3)
    asked = run(search, unequal_layers)
    complete = [choice for ask in asked if ask.tokens is None for choice in ask.candidates]
    assert search.best.loss == min(measured(unequal_layers, choice) for choice in complete)
    assert search.best.loss == measured(unequal_layers, search.best.choice)
    assert search.best.cost == unequal_layers.cost(search.best.choice)


@pytest.mark.parametrize("whole", [False, True])
def test_no_search_ends_above_its_start_on_all_of_the_data(make, unequal_layers, whole):
    for seed, start in itertools.product(range(3), [greedy(unequal_layers), [0] * 6]):
        choice = start if isinstance(start, list) else start.choice
        search = make(unequal_layers, start, seed, whole=whole)
        assert search.best.choice.tolist() == list(choice)  # before anything is measured
        asked = run(search, unequal_layers)
        assert any(c.tolist() == list(choice) for ask in asked if ask.tokens is None for c in ask.candidates) or (
            search.best.loss < measured(unequal_layers, choice)
        )
        assert search.best.loss <= measured(unequal_layers, choice)


def test_an_ask_says_its_tokens_and_rounds_have_draws_of_their_own(make, unequal_layers):
    asked = run(make(unequal_layers), unequal_layers)
    assert len({ask.draw for ask in asked}) == len(asked)
    assert all(ask.tokens is None or ask.tokens >= 1 for ask in asked)
    places = [(ask.generation, ask.round) for ask in asked]
    assert places == sorted(set(places))


def test_the_books_are_right(make, unequal_layers):
    search = make(unequal_layers, total_tokens=1000)
    asked = run(search, unequal_layers)
    assert search.evaluations == sum(len(ask.candidates) for ask in asked)
    assert search.evaluated_tokens == sum(len(ask.candidates) * (ask.tokens or 1000) for ask in asked)
    assert search.generations is None or asked[-1].generation <= search.generations
    unknown = make(unequal_layers)
    run(unknown, unequal_layers)
    assert unknown.evaluated_tokens is None


def test_the_seed_decides_the_course(make, unequal_layers):
    first, again, other = (course(run(make(unequal_layers, seed=seed), unequal_layers)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("between", [False, True], ids=["after a tell", "between ask and tell"])
def test_stopping_saving_loading_and_going_on_is_never_having_stopped(make, unequal_layers, whole, between):
    search = make(unequal_layers, seed=5, whole=whole)
    asked, states = [], []
    while not search.done:
        if between:
            search.ask()
        states.append(through_json(search.state_dict()))
        asked.append(step(search, unequal_layers, failing_at_times))
    expected, end = course(asked), search.state_dict()
    for number, state in enumerate(states):
        resumed = make(unequal_layers, seed=5, whole=whole)
        resumed.load_state_dict(state)
        assert course(run(resumed, unequal_layers, failing_at_times)) == expected[number:]
        assert resumed.best.choice.tolist() == search.best.choice.tolist()
        assert resumed.best.loss == search.best.loss
        assert (resumed.evaluations, resumed.evaluated_tokens) == (search.evaluations, search.evaluated_tokens)
        assert resumed.state_dict() == end


def test_a_finished_search_can_be_loaded_and_is_finished(make, unequal_layers):
    search = make(unequal_layers)
    run(search, unequal_layers)
    loaded = make(unequal_layers)
    loaded.load_state_dict(through_json(search.state_dict()))
    assert loaded.done
    assert loaded.best.loss == search.best.loss


def test_a_state_is_not_continued_by_another_search(make, unequal_layers):
    state = make(unequal_layers, seed=1).state_dict()
    others = [
        make(unequal_layers, seed=2),
        make(unequal_layers, [0] * 6, seed=1),
        make(unequal_layers, seed=1, total_tokens=5000),
        make(replace(unequal_layers, budgets={"bits": 40.0}), seed=1),
    ]
    for wrong in [*({"load": state, "into": other} for other in others), {"load": {}, "into": make(unequal_layers)}]:
        with pytest.raises(UsageError, match="another problem, start or settings"):
            wrong["into"].load_state_dict(wrong["load"])


def test_asking_twice_asks_the_same_and_changes_nothing(make, unequal_layers):
    search = make(unequal_layers)
    before = through_json(search.state_dict())
    assert course([search.ask()]) == course([search.ask()])
    assert through_json(search.state_dict()) == before


def test_candidates_that_failed_never_become_the_best(make, unequal_layers):
    def broken(problem, choice, ask):
        return (
            [math.nan, math.inf, -math.inf][int(choice.sum()) % 3] if choice[2] >= 2 else measured(problem, choice, ask)
        )

    search = make(unequal_layers, [0] * 6, seed=1)
    run(search, unequal_layers, broken)
    assert search.best.choice[2] < 2
    assert search.best.loss == measured(unequal_layers, search.best.choice)


@pytest.mark.parametrize("whole", [False, True])
def test_when_everything_fails_the_search_ends_within_the_budgets_and_without_a_loss(make, unequal_layers, whole):
    search = make(unequal_layers, greedy(unequal_layers), whole=whole)
    run(search, unequal_layers, lambda *_: math.nan)
    assert search.best.choice.tolist() == greedy(unequal_layers).choice.tolist()
    assert search.best.loss is None


def test_tied_units_agree(make, unequal_layers):
    for ask in run(make(unequal_layers), unequal_layers):
        assert all(choice[0] == choice[1] for choice in ask.candidates)


def test_fixed_units_stay(make, unequal_layers):
    fixed = replace(unequal_layers, fixed={4: 0, 0: 2, 1: 2})
    for ask in run(make(fixed), fixed):
        assert all(choice[[0, 1, 4]].tolist() == [2, 2, 0] for choice in ask.candidates)


def test_nothing_told_is_lost_when_an_evaluation_raises(make, unequal_layers):
    search, unbroken = make(unequal_layers, seed=2), make(unequal_layers, seed=2)
    asked = []
    for count in itertools.count():
        if search.done:
            break
        before = search.ask()
        if count % 2:
            with pytest.raises(ZeroDivisionError):
                search.tell([1 / 0 for _ in search.ask().candidates])
        asked.append(step(search, unequal_layers, measured))
        assert course([before]) == course(asked[-1:])
    assert course(asked) == course(run(unbroken, unequal_layers))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda losses: [*losses[:-1], "0.5"],
        lambda losses: [*losses[:-1], None],
        lambda losses: [*losses[:-1], [0.5, 0.5]],
        lambda losses: losses[:-1],
        lambda losses: [*losses, 0.5],
        lambda losses: 0.5,
    ],
    ids=["text", "None", "a list", "one too few", "one too many", "one number for all"],
)
def test_what_is_no_loss_for_each_candidate_is_refused_and_changes_nothing(make, unequal_layers, spoil):
    search = make(unequal_layers)
    before = through_json(search.state_dict())
    with pytest.raises(UsageError, match=r"not a number|losses told for|one loss for each"):
        search.tell(spoil([1.0] * len(search.ask().candidates)))
    assert through_json(search.state_dict()) == before


def test_going_on_after_the_end_is_refused(make, unequal_layers):
    search = make(unequal_layers)
    run(search, unequal_layers)
    with pytest.raises(UsageError, match="done"):
        search.ask()
    with pytest.raises(UsageError, match="done"):
        search.tell([])


def test_impossible_budgets_and_starts_are_refused(make, unequal_layers):
    with pytest.raises(InfeasibleBudget, match="bits"):
        make(replace(unequal_layers, budgets={"bits": 20.0}))
    with pytest.raises(UsageError, match=r"of 39\.6"):
        make(unequal_layers, [3] * 6)
    with pytest.raises(UsageError, match="tied"):
        make(unequal_layers, [0, 1, 0, 0, 0, 0])
    with pytest.raises(UsageError, match="least bits"):
        make(replace(unequal_layers, budgets={}, minimize="bits", max_loss=100.0))
    with pytest.raises(UsageError, match="seed"):
        make(unequal_layers, seed=-1)


def test_a_problem_with_one_allocation_is_measured_and_done(make):
    problem = Problem(costs={"bits": [[1.0, 2.0], [1.0, 2.0]]}, budgets={"bits": 2.0}, losses=[[1.0, 0.5]] * 2)
    search = make(problem, whole=True)
    asked = run(search, problem)
    assert {choice.tobytes() for ask in asked for choice in ask.candidates} == {np.array([0, 0]).tobytes()}
    assert len(asked) <= 2
    assert search.best.loss == 2.0


# --- the stop rules ---


def test_evaluations_and_tokens_are_never_exceeded_and_used_almost_up(make, unequal_layers):
    for whole, limit in itertools.product([False, True], [60, 77]):
        search = make(unequal_layers, total_tokens=1000, whole=whole, stop=Stop(evaluations=limit))
        run(search, unequal_layers)
        assert limit - 24 <= search.evaluations <= limit
    for limit in (25_000, 33_333):
        search = make(unequal_layers, total_tokens=1000, stop=Stop(tokens=limit))
        run(search, unequal_layers)
        assert search.evaluated_tokens <= limit
        assert search.evaluations > 10


def test_patience_stops_a_search_that_no_longer_improves(make, unequal_layers):
    asked = run(make(unequal_layers, [0] * 6, stop=Stop(patience=3)), unequal_layers, lambda *_: 1.0)
    assert len({ask.generation for ask in asked}) == 3


def test_seconds_are_counted_over_stops_and_restores(make, unequal_layers):
    now = [100.0]

    def clocked():
        return make(unequal_layers, [0] * 6, stop=Stop(seconds=10.0), clock=lambda: now[0])

    def slow(problem, choice, ask):
        now[0] += 0.25
        return measured(problem, choice, ask)

    search = clocked()
    now[0] += 6.0
    step(search, unequal_layers, slow)
    state = through_json(search.state_dict())
    now[0] += 1000.0  # nobody searches
    resumed = clocked()
    resumed.load_state_dict(state)
    began = now[0]
    asked = run(resumed, unequal_layers, slow)
    assert len(asked) > 1  # the time before the restore was 6 seconds and a little, and not 1006
    assert now[0] - began < 4 + 0.25 * (len(asked[-1].candidates) + len(asked[-2].candidates) + 12)


def test_a_small_gap_to_a_bound_ends_the_search_and_no_sample_does(make, unequal_layers):
    bound = 0.5 * measured(unequal_layers, [0] * 6)
    stop = Stop(gap=0.5, lower_bound=bound)
    search = make(unequal_layers, [0] * 6, whole=True, stop=stop)
    run(search, unequal_layers)
    assert 0 <= search.best.loss - bound <= 0.5 * search.best.loss or search.best.loss < bound
    few = search.evaluations
    sampled = make(unequal_layers, [0] * 6, stop=replace(stop, evaluations=60))
    run(sampled, unequal_layers)
    assert few < sampled.evaluations <= 60


@pytest.mark.parametrize(
    "wrong",
    [
        {"evaluations": 0}, {"tokens": 0}, {"patience": 0}, {"seconds": -1.0}, {"seconds": math.nan},
        {"gap": 0.1}, {"lower_bound": 1.0}, {"gap": -0.1, "lower_bound": 1.0}, {"gap": 0.1, "lower_bound": math.inf},
    ],
)  # fmt: skip
def test_rules_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match="stop"):
        Stop(**wrong)


def test_a_limit_on_tokens_needs_to_know_how_many_there_are(make, unequal_layers):
    with pytest.raises(UsageError, match="needs total_tokens"):
        make(unequal_layers, stop=Stop(tokens=1000))
