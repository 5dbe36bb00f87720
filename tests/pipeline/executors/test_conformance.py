"""What every executor promises to stages, whichever it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.pipeline.executors import EXECUTORS, RawExecutor, Resources, open_executor
from layerwise.pipeline.executors.inline import InlineExecutor
from layerwise.pipeline.executors.journal import JournaledExecutor


@pytest.fixture(params=["inline", "inline with pickle", pytest.param("ray", marks=pytest.mark.ray)])
def executor(request: pytest.FixtureRequest) -> RawExecutor:
    if request.param == "ray":
        executor: RawExecutor = request.getfixturevalue("ray_executor")
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
        return executor
    return InlineExecutor(check_pickle=request.param != "inline")


def ordered(stream: Iterator[tuple[int, Any]]) -> list[Any]:
    """The answers of a stream in the order of its items."""
    return [answer for _, answer in sorted(stream, key=lambda pair: pair[0])]


def square(number: int) -> int:
    return number * number


def refuse(number: int) -> int:
    if number == 2:
        raise InfeasibleBudget("bytes", 1.0, 2.0)
    return number


def leave_a_trace(folder: Path, name: str) -> str:
    (folder / f"{name}-{os.getpid()}-{len(list(folder.iterdir()))}").touch()
    return name


def load_square(folder: Path) -> Callable[[int], int]:
    leave_a_trace(folder, "load")
    return square


def load_refuse(folder: Path) -> Callable[[int], int]:
    leave_a_trace(folder, "load")
    return refuse


def fail_to_load() -> Callable[[int], int]:
    raise InfeasibleBudget("bytes", 1.0, 2.0)


def matmul(seed: int) -> tuple[int, bytes]:
    import torch

    left, right = (torch.randn(301, 1003, generator=torch.Generator().manual_seed(seed + i)) for i in range(2))
    return torch.get_num_threads(), (left @ right.T).numpy().tobytes() + left.sum().numpy().tobytes()


def test_every_item_is_answered_in_the_order_of_the_items(executor: RawExecutor) -> None:
    assert ordered(executor.stream(square, list(range(20)))) == [n * n for n in range(20)]
    assert sorted(executor.stream(square, list(range(20)))) == [(n, n * n) for n in range(20)]


def test_no_items_give_no_answers(executor: RawExecutor) -> None:
    assert ordered(executor.stream(square, [])) == []
    with executor.replicas(fail_to_load) as replicas:
        assert ordered(replicas.stream([])) == []


def test_an_exception_keeps_its_type_its_hint_and_its_fields_and_names_the_item(executor: RawExecutor) -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        ordered(executor.stream(refuse, [1, 2, 3], ["first", "second", "third"]))
    assert type(caught.value) is InfeasibleBudget
    assert caught.value.hint == InfeasibleBudget("bytes", 1.0, 2.0).hint
    assert caught.value.reachable == 2.0
    assert caught.value.__notes__ == ["while working on second"]


def test_an_item_without_a_name_is_named_by_its_position(executor: RawExecutor) -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        ordered(executor.stream(refuse, [1, 2, 3]))
    assert caught.value.__notes__ == ["while working on item 2 of 3"]


def test_a_replica_loads_once_and_keeps_what_it_loaded(executor: RawExecutor, tmp_path: Path) -> None:
    with executor.replicas(partial(load_square, tmp_path)) as replicas:
        assert not list(tmp_path.iterdir())  # nothing is loaded before there is something to do
        assert ordered(replicas.stream([3])) == [9]
        assert len(list(tmp_path.iterdir())) == 1  # one item never loads two
        assert ordered(replicas.stream(list(range(12)))) == [n * n for n in range(12)]
        assert ordered(replicas.stream(list(range(12)))) == [n * n for n in range(12)]
        assert len(list(tmp_path.iterdir())) <= executor.workers


def journaled(executor: RawExecutor, folder: Path) -> JournaledExecutor:
    return JournaledExecutor(executor, folder / "answers", tmp=folder / "tmp")


def load_squares() -> Callable[[tuple[int, ...]], list[int]]:
    return lambda numbers: [square(number) for number in numbers]


def load_refusals() -> Callable[[tuple[int, ...]], list[int]]:
    return lambda numbers: [refuse(number) for number in numbers]


@pytest.mark.parametrize("calls", [1, 2, 5, 20])
def test_parts_are_answered_in_their_order_however_they_are_gathered(
    executor: RawExecutor, tmp_path: Path, calls: int
) -> None:
    keys = [f"part {number}" for number in range(12)]
    with journaled(executor, tmp_path).replicas(load_squares) as replicas:
        assert replicas.map_together(range(12), keys=keys, calls=calls) == [n * n for n in range(12)]
        assert replicas.map_together([], keys=[], calls=calls) == []


def test_the_parts_that_were_worked_on_are_named(executor: RawExecutor, tmp_path: Path) -> None:
    with journaled(executor, tmp_path).replicas(load_refusals) as replicas, pytest.raises(InfeasibleBudget) as caught:
        replicas.map_together([1, 2, 3], keys=["first", "second", "third"], calls=1)
    assert caught.value.__notes__ == ["while working on first and 2 more"]


def test_what_a_replica_raises_keeps_its_type_and_replaces_the_replica(executor: RawExecutor, tmp_path: Path) -> None:
    with executor.replicas(partial(load_refuse, tmp_path)) as replicas:
        with pytest.raises(InfeasibleBudget) as caught:
            ordered(replicas.stream([2], ["candidate"]))
        assert caught.value.__notes__ == ["while working on candidate"]
        assert ordered(replicas.stream([1])) == [1]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_factory_raises_is_raised_by_the_first_item(executor: RawExecutor) -> None:
    with executor.replicas(fail_to_load) as replicas, pytest.raises(InfeasibleBudget):
        ordered(replicas.stream([1]))


def test_items_are_refused_while_replicas_hold_the_cores(executor: RawExecutor) -> None:
    with executor.replicas(fail_to_load), pytest.raises(AssertionError, match="replicas"):
        ordered(executor.stream(square, [1]))
    assert ordered(executor.stream(square, [2])) == [4]


def test_a_journal_around_it_answers_a_second_attempt(executor: RawExecutor, tmp_path: Path) -> None:
    keys = ["a", "b", "c"]
    for found in (0, 3):
        journal = journaled(executor, tmp_path)
        assert journal.map(square, [1, 2, 3], keys=keys) == [1, 4, 9]
        with journal.replicas(partial(load_square, tmp_path)) as replicas:
            assert replicas.map([2, 3, 4], keys=keys) == [4, 9, 16]
        assert (journal.items_total, journal.items_cached) == (6, 2 * found)


def test_memory_of_the_workers_is_measured(executor: RawExecutor) -> None:
    fresh = executor.sized(Resources())
    assert fresh.peak_rss_bytes == 0
    ordered(fresh.stream(square, [1]))
    assert fresh.peak_rss_bytes > 2**20


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_gives_the_same_bits_everywhere_with_as_many_threads_as_cpus(executor: RawExecutor, threads: int) -> None:
    here = matmul_with_threads(threads)
    assert here[0] == threads
    assert ordered(executor.sized(Resources(cpus=threads)).stream(matmul, [7])) == [here]


def matmul_with_threads(threads: int) -> tuple[int, bytes]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return matmul(7)
    finally:
        torch.set_num_threads(before)


def test_the_threads_of_the_host_are_given_back(executor: RawExecutor) -> None:
    import torch

    before = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    ordered(executor.sized(Resources(cpus=1 + before[0] % 2)).stream(square, [1]))
    assert (torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")) == before


def test_a_call_that_is_the_first_to_load_torch_has_its_threads_too() -> None:
    script = """
from layerwise.pipeline.executors import Resources, open_executor
def threads(item):
    import torch
    return torch.get_num_threads()
print(sorted(open_executor("inline", Resources(cpus=2)).stream(threads, [1, 2])))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    assert (
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        == "[(0, 2), (1, 2)]\n"
    )


def test_pickle_is_checked_before_ray_has_to() -> None:
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        ordered(InlineExecutor(check_pickle=True).stream(lambda number: number, [1]))
    items = [[1]]
    ordered(InlineExecutor(check_pickle=True).stream(list.clear, items))
    assert items == [[1]]  # a worker never changes the driver's objects


def test_every_executor_of_the_table_opens_and_an_unknown_one_is_answered_with_the_nearest() -> None:
    for name in EXECUTORS:
        open_executor(name, Resources(cpus=0.5)).close()
    with pytest.raises(UsageError, match="did you mean 'inline'"):
        open_executor("inlin")


@pytest.mark.parametrize("wrong", [{"cpus": 0}, {"cpus": float("nan")}, {"gpus": -1}, {"memory_bytes": 0}])
def test_impossible_resources_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="impossible"):
        Resources(**wrong)  # type: ignore[arg-type]
