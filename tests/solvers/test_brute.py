import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.solvers import Problem, brute


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_it_finds_the_optimum_whatever_binds_the_units(problems, brute_force, data):
    yes = st.booleans()
    form = {"nested": data.draw(st.integers(0, 3)), "interactions": data.draw(yes), "reverse": data.draw(yes)}
    problem = data.draw(problems(n_budgets=data.draw(st.integers(1, 2)), max_levels=3, negative=True, **form))
    optimum = brute_force(problem)
    if optimum is None:
        with pytest.raises(InfeasibleBudget, match="short by"):
            brute(problem)
    else:
        solution = brute(problem)
        assert (solution.objective, solution.lower_bound, solution.status) == (optimum, optimum, "optimal")
        assert problem.feasible(solution.choice)


def test_of_equal_losses_the_cheaper_and_of_equal_costs_the_lower_levels_are_taken():
    losses = np.ones((2, 3))
    costs = np.array([[2.0, 1.0, 1.0], [1.0, 3.0, 1.0]])
    assert brute(Problem(costs={"bits": costs}, losses=losses)).choice.tolist() == [1, 0]


def test_absent_units_are_counted_once_and_tied_ones_together():
    tables = {"costs": {"bits": np.ones((4, 3))}, "losses": np.ones((4, 3))}
    nested = Problem(**tables, nested={(0, 2): [1, 2]})  # (2 * 3 * 3 + 1) * 3
    tied = Problem(**tables, groups=[[0, 1, 2]])  # 3 * 3
    for problem, count in [(nested, 57), (tied, 9)]:
        assert brute(problem, max_allocations=count).loss is not None
        with pytest.raises(UsageError, match=f"{count} allocations, more than {count - 1}"):
            brute(problem, max_allocations=count - 1)


def test_more_allocations_than_a_chunk_are_all_looked_at(random_tables):
    problem = random_tables(8, 4, seed=0)  # 65,536
    best = min(range(4), key=lambda level: problem.losses[0, level])
    free = brute(Problem(costs=problem.costs, losses=problem.losses))
    assert free.choice[0] == best
    assert free.choice.tolist() == problem.losses.argmin(axis=1).tolist()


def test_sums_are_compared_exactly():
    losses = np.array([[1e16, 0.0], [1.0, 0.0], [-1e16, 0.5]])  # plainly added, 1e16 + 1 - 1e16 is 0
    fixed = {0: 0, 2: 0}
    assert brute(Problem(costs={"bits": np.zeros((3, 2))}, losses=losses, fixed=fixed)).choice.tolist() == [0, 1, 0]
