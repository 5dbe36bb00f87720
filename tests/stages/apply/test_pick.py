"""Which one of several allocations is meant by a word, a budget or a few digits."""

from __future__ import annotations

import pytest

from layerwise.errors import UsageError
from layerwise.stages.allocate.allocation import Allocation
from layerwise.stages.apply.pick import pick


def measured(*points: tuple[float, float | None]) -> list[Allocation]:
    return [
        Allocation(f"{n:012x}", "ilp", f"bits={bits:g}", {}, (), {"bits": bits, "bytes": int(100 * bits)}, kl)
        for n, (bits, kl) in enumerate(points, 0xABC00)
    ]


BENT = measured((2, 1.0), (2.5, 0.3), (3, 0.05), (4, 0.04), (6, 0.039), (8, None), (5, 0.5))


@pytest.mark.parametrize(
    ("how", "bits"),
    [("knee", 3), ("best", 6), ("smallest", 2), ("bits=4", 4), ("bits=8", 8), ("0000000abc05", 8)],
)
def test_one_of_several_is_picked(how: str, bits: float) -> None:
    assert pick(BENT, how).sizes["bits"] == bits


def test_a_frontier_without_a_bend_gives_its_best() -> None:
    assert pick(measured((2, 1.0), (4, 0.5)), "knee").sizes["bits"] == 4
    assert pick(measured((3, 0.5)), "knee").sizes["bits"] == 3
    assert pick(measured((3, 0.5), (3, 0.5)), "smallest").sizes["bits"] == 3


@pytest.mark.parametrize("how", ["bits=7", "fff", "000", "kneee", ""])
def test_a_pick_that_fits_nothing_lists_what_there_is(how: str) -> None:
    with pytest.raises(UsageError, match=f"pick: '{how}' fits no allocation; there are bits=2 \\(0000000abc00\\)"):
        pick(BENT, how)


@pytest.mark.parametrize("how", ["knee", "best", "smallest"])
def test_nothing_is_best_when_nothing_was_finite(how: str) -> None:
    with pytest.raises(UsageError, match="no allocation has a finite KL"):
        pick(measured((2, None), (3, None)), how)
