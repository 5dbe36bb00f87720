"""Masks that move: at every step they let through what the schedule says, and nothing leaks past the one of the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.stages.levels.level import Level
from layerwise.stages.levels.mask import kept, mask_level
from layerwise.stages.recover.sparse_training import Masked, Params

ROWS, COLUMNS = 5, 22


def pruned(pattern: str | None, seed: int, dtype: torch.dtype = torch.float16) -> tuple[Level, torch.Tensor]:
    """A level, and the dense weight that it was made of. Its mask is not that of the greatest weights."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn((ROWS, COLUMNS), generator=generator)
    scores = torch.rand((ROWS, COLUMNS), generator=generator)
    if pattern is None:
        keep = scores > 0.6
    else:
        n, m = map(int, pattern.split(":"))
        padded = torch.nn.functional.pad(scores, (0, -COLUMNS % m), value=-1.0).unflatten(1, (-1, m))
        keep = (padded.argsort(2, descending=True).argsort(2) < n).flatten(1)[:, :COLUMNS]
    recipe = {"method": "made up", "sparsity": 0.6} | ({} if pattern is None else {"pattern": pattern})
    return mask_level("made up", recipe, W.to(dtype), keep), W


def params(**given: Any) -> Params:
    return Params.model_validate({"method": "sparse_training", "steps": 8, **given})


@given(
    pattern=st.sampled_from([None, "2:4", "1:4", "4:8"]), seed=st.integers(0, 99), initial=st.floats(0, 1),
    regrow=st.floats(0, 1), closing=st.floats(0, 1), rate=st.floats(0.001, 1),
)  # fmt: skip
def test_what_is_written_keeps_as_many_of_every_row_and_group_and_is_zero_elsewhere(
    pattern: str | None, seed: int, initial: float, regrow: float, closing: float, rate: float
) -> None:
    level, W = pruned(pattern, seed)
    part = Masked("unit", level, W, params(initial=initial, regrow=regrow, closing=closing))
    assert torch.equal(part.tensors()["unit"], level.decode()), "it begins as the level is"
    (leaf,) = part.free.values()
    leaf.requires_grad_(True)
    optimizer = torch.optim.AdamW([leaf], lr=rate)
    goal = torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(seed + 1))
    through = []
    for step in range(8):
        part.at_step(step)
        through.append(int((part.tensors()["unit"] != 0).sum()))
        ((part.tensors()["unit"] - goal) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    part.at_step(None)
    ends = part.tensors()["unit"].detach()
    made = part.levels()["unit"]
    assert torch.equal(made.decode(), ends), "the loss is that of what is written"
    width = COLUMNS if pattern is None else int(pattern.split(":")[1])
    for columns in torch.arange(COLUMNS).split(width):
        assert torch.equal(kept(made)[:, columns].sum(1), kept(level)[:, columns].sum(1))
    assert not ends[~kept(made)].any()
    assert made.tensors["values"].dtype == level.tensors["values"].dtype
    assert through == sorted(through, reverse=True), "masks only close"
    assert made.parameters == level.parameters


def test_a_mask_closes_as_the_schedule_says_and_what_is_missed_grows_back() -> None:
    level, W = pruned(None, 3)
    part = Masked("unit", level, W, params(initial=0.0, closing=1.0))
    gone = COLUMNS - kept(level).sum(1)
    for step in range(8):
        part.at_step(step)
        expected = (gone * (1 - (1 - step / 8) ** 3)).long()
        assert torch.equal(COLUMNS - part.keep().sum(1), expected)

    missed = (~kept(level)).nonzero()[0]
    goal = level.decode().clone()
    goal[tuple(missed)] = 9.0  # the loss asks for one weight that is pruned
    for regrow, grows in ((1.0, True), (0.0, False)):
        part = Masked("unit", level, W, params(closing=0.9, regrow=regrow, steps=400))
        leaf = part.values.requires_grad_(True)
        optimizer = torch.optim.AdamW([leaf], lr=0.02, weight_decay=0.0)
        for step in range(400):
            part.at_step(step)
            ((part.tensors()["unit"] - goal) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert bool(kept(part.levels()["unit"])[tuple(missed)]) == grows


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ({"encoding": "grid"}, "no values of its own"),
        ({"encoding": "mask", "block": [2, 2]}, "blocks go as a whole"),
        ({"encoding": "mask"}, None),
    ],
)
def test_levels_that_it_does_not_fit(recipe: dict[str, Any], why: str | None) -> None:
    found = params().misfit(recipe)
    assert found is None if why is None else why in str(found)
