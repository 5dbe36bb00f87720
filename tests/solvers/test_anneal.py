import math

import numpy as np
import pytest

from layerwise.errors import UsageError
from layerwise.solvers import Anneal, Problem, Stop


@pytest.fixture
def equal_units():
    """Eight units with levels of cost 0, 1 and 2; additive losses."""
    losses = np.random.default_rng(0).uniform(0, 1, (8, 3))
    return Problem(costs={"bits": np.tile([0.0, 1.0, 2.0], (8, 1))}, budgets={"bits": 8.0}, losses=losses)


def walk(search, evaluate):
    """The allocation that the walk stands on, before every ask."""
    places = []
    while not search.done:
        places.append(search.state_dict()["current"])
        search.tell([evaluate(choice) for choice in search.ask().candidates])
    return places


def test_without_a_temperature_to_speak_of_the_walk_never_goes_up(equal_units):
    search = Anneal(equal_units, [1] * 8, temperature=0.0, stop=Stop(evaluations=200))
    losses = [equal_units.loss(place) for place in walk(search, equal_units.loss)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_at_a_high_temperature_the_walk_takes_the_best_neighbour_of_every_batch(equal_units):
    search = Anneal(equal_units, [1] * 8, temperature=1e9, cooling=1.0, stop=Stop(evaluations=100))
    while not search.done:
        here = search.state_dict()["current"]
        losses = {tuple(choice.tolist()): equal_units.loss(choice) for choice in search.ask().candidates}
        search.tell(list(losses.values()))
        losses.pop(tuple(here), None)
        assert tuple(search.state_dict()["current"]) == min(losses, key=losses.__getitem__)


def test_the_first_temperature_is_the_spread_of_the_first_ask_and_falls_geometrically(equal_units):
    search = Anneal(equal_units, [1] * 8, cooling=0.5, stop=Stop(evaluations=40))
    first = [equal_units.loss(choice) for choice in search.ask().candidates]
    search.tell(first)
    assert search.state_dict()["temperature"] == pytest.approx(np.std(first) * 0.5)
    search.tell([1.0] * len(search.ask().candidates))
    assert search.state_dict()["temperature"] == pytest.approx(np.std(first) * 0.25)


def test_a_step_for_the_worse_is_accepted_as_often_as_the_temperature_says(equal_units):
    accepted = 0
    for seed in range(400):
        search = Anneal(equal_units, [1] * 8, seed, batch=1, temperature=1.0, cooling=1.0)
        search.tell([0.7, 0.0])  # the neighbour, then the start
        accepted += search.state_dict()["current"] != [1] * 8
    assert accepted / 400 == pytest.approx(math.exp(-0.7), abs=4 * 0.5 / 20)  # four standard deviations


def test_on_samples_the_current_allocation_is_measured_with_its_neighbours(equal_units):
    search = Anneal(equal_units, [1] * 8, temperature=1e9, tokens_per_ask=8, stop=Stop(evaluations=60))
    while not search.done:
        ask, here = search.ask(), search.state_dict()["current"]
        assert ask.tokens is None or here in [choice.tolist() for choice in ask.candidates]
        search.tell([equal_units.loss(choice) for choice in ask.candidates])


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": math.nan}, {"cooling": 0.0}, {"cooling": 1.1}]
)
def test_settings_that_make_no_sense_are_refused(equal_units, wrong):
    with pytest.raises(UsageError):
        Anneal(equal_units, **wrong)
