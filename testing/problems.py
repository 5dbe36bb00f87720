"""Allocation problems that suites and tests share, each named after its case."""

from __future__ import annotations

import numpy as np

from layerwise.solvers import Problem


def random_tables(n_units: int, n_levels: int, seed: int, budget: float = 0.4, n_budgets: int = 1) -> Problem:
    """Real-valued tables like a model's: layers of some sizes, costs that rise and losses that fall by level.

    Args:
        n_units: layers.
        n_levels: levels of each.
        seed: of the tables.
        budget: as a share of the way from the least to the greatest cost.
        n_budgets: resources with a budget.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.choice([1.0, 3.0, 3.5], n_units)[:, None]
    bits = np.arange(2, 2 + n_levels)
    costs = {
        f"resource{index}": sizes * bits * rng.uniform(0.9, 1.1, (n_units, n_levels)) for index in range(n_budgets)
    }
    losses = rng.lognormal(0, 1, n_units)[:, None] * 4.0**-bits * rng.uniform(0.7, 1.3, (n_units, n_levels))
    problem = Problem(costs=costs, losses=losses)
    ends = {resource: problem.reachable(resource) for resource in costs}
    budgets = {resource: low + budget * (high - low) for resource, (low, high) in ends.items()}
    return Problem(costs=costs, losses=losses, budgets=budgets)


def tied_units() -> Problem:
    """Two attention projections that must share a level, and a third unit; the shared level costs and hurts twice."""
    return Problem(
        costs={"bits": np.array([[2.0, 4.0], [2.0, 4.0], [3.0, 6.0]])},
        losses=np.array([[5.0, 1.0], [0.5, 0.25], [4.0, 1.0]]),
        budgets={"bits": 11.0},
        groups=[[0, 1]],
        units=["q", "k", "o"],
        levels=["2b", "4b"],
    )


def unequal_layers() -> Problem:
    """Layers of three sizes, two of them tied, under a budget that no common level meets exactly."""
    rng = np.random.default_rng(0)
    bits = np.array([1.0, 1, 2, 3, 3, 2])[:, None] * np.array([2.0, 3, 4, 6])
    losses = rng.lognormal(0, 1, (6, 1)) * 3.0 ** -np.arange(4) * rng.uniform(0.6, 1.4, (6, 4))
    return Problem(costs={"bits": bits}, budgets={"bits": 3.3 * 12}, losses=losses, groups=[[0, 1]])


def two_budgets() -> Problem:
    """Costs that pull apart: what is cheap in bits is dear in ms. One unit lacks a level."""
    rng = np.random.default_rng(1)
    bits, losses = np.cumsum(rng.uniform(1, 3, (8, 4)), axis=1), rng.uniform(0, 1, (8, 4))
    bits[3, 1] = np.inf
    ms = np.cumsum(rng.uniform(1, 3, (8, 4)), axis=1)[:, ::-1]
    return Problem(costs={"bits": bits, "ms": ms}, budgets={"bits": 44.0, "ms": 46.0}, losses=losses)


def nested_blocks() -> Problem:
    """Three blocks with an attention and an MLP inside, these with layers; two levels of an MLP remove its second."""
    rng = np.random.default_rng(2)
    costs, losses = [], []
    nested: dict[tuple[int, int], list[int]] = {}
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
    return Problem(costs={"bits": np.array(costs)}, budgets={"bits": 24.0}, losses=np.array(losses), nested=nested)
